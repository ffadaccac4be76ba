"""Recognises the format of a file by its content: formats that are read, and those that are refused with a remedy."""

from __future__ import annotations

import zipfile
from enum import StrEnum

from bisparse.checkpoint.input_file import InputFile
from bisparse.errors import CheckpointError

__all__ = ["READABLE", "Format", "is_text", "recognize", "unreadable"]

LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19."
"""The number 0x1950a86a20f9469cfc6c, with which torch < 1.6 began its files, as pickle writes it."""
MAX_SAFETENSORS_HEADER = 100_000_000
"""Maximum bytes of a safetensors header, as in the library."""
HEAD = 4096
ONNX_GRAPH = 7
ONNX_FIELDS = {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}
"""Fields of onnx.ModelProto."""
CORE_ML_TYPES = 200
"""First of the fields for the types of Core ML models."""
MAX_FIELDS = 64
"""Maximum number of different fields of a protocol buffer that are examined."""
MAX_VARINTS = 20
"""Maximum bytes of a tag and a length."""


class Format(StrEnum):
    """A file format; the value is its description in messages."""

    SAFETENSORS = "a safetensors file"
    TORCH_ARCHIVE = "a torch archive"
    TORCH_LEGACY = "a torch file of torch < 1.6"
    TORCHSCRIPT = "a TorchScript program"
    ONNX = "an ONNX model"
    LFS_POINTER = "a Git LFS pointer, not the file that it stands for"
    EMPTY = "empty"
    HTML = "a web page, not weights"
    JSON = "JSON, not weights"
    PT2 = "a torch.export archive (.pt2)"
    PICKLE = "a Python pickle that torch.save did not write"
    NPZ = "a NumPy archive (.npz)"
    NPY = "a NumPy array (.npy)"
    GGUF = "a GGUF file"
    HDF5 = "an HDF5 file (Keras, TensorFlow)"
    KERAS = "a Keras archive (.keras)"
    TFLITE = "a TensorFlow Lite model"
    SAVED_MODEL = "a TensorFlow SavedModel"
    CORE_ML = "a Core ML model"
    MSGPACK = "a msgpack file (Flax)"
    TAR = "a tar archive"
    COMPRESSED = "a compressed file"
    ZIP = "a zip archive that torch.save did not write"


READABLE = (Format.SAFETENSORS, Format.TORCH_ARCHIVE, Format.TORCH_LEGACY, Format.TORCHSCRIPT, Format.ONNX)
"""Formats that are read, in order of preference if a folder has several."""

TO_SAFETENSORS = "load it with the library that wrote it and save the weights with safetensors"
REMEDIES = {
    Format.LFS_POINTER: "fetch the file itself with `git lfs pull`, or download it again",
    Format.EMPTY: "fetch it again",
    Format.HTML: "download the file itself: the server answered with a page, often one that asks to log in",
    Format.JSON: "name the folder that it is in",
    Format.PT2: "save `program.state_dict` of the loaded program with torch.save or safetensors",
    Format.PICKLE: "it can run code when it is loaded, so it is not; if you trust it, load it yourself and save its tensors with "
    "safetensors",
    Format.NPZ: "save its arrays with safetensors.numpy.save_file",
    Format.NPY: "save its array with safetensors.numpy.save_file",
    Format.GGUF: "load it with transformers (from_pretrained with gguf_file=...) and write it with save_pretrained, or prune it "
    "with --method",
    Format.HDF5: TO_SAFETENSORS,
    Format.KERAS: TO_SAFETENSORS,
    Format.TFLITE: "use the model that it was converted from",
    Format.SAVED_MODEL: TO_SAFETENSORS,
    Format.CORE_ML: "use the model that it was converted from",
    Format.MSGPACK: "load it with transformers (from_flax=True) or flax and save the weights with safetensors",
    Format.TAR: "unpack it and name what it holds; a torch file of torch < 0.2 has to be loaded and saved again",
    Format.COMPRESSED: "unpack it and name what it holds",
    Format.ZIP: "unpack it and name what it holds; of a model, save `model.state_dict()` with torch.save or safetensors",
}
STARTS = (
    (b"version https://git-lfs.github.com/spec/", Format.LFS_POINTER),
    (b"GGUF", Format.GGUF), (b"\x89HDF\r\n\x1a\n", Format.HDF5), (b"\x93NUMPY", Format.NPY),
    (b"\x1f\x8b", Format.COMPRESSED), (b"BZh", Format.COMPRESSED), (b"\xfd7zXZ\x00", Format.COMPRESSED),
    (b"\x28\xb5\x2f\xfd", Format.COMPRESSED), (b"7z\xbc\xaf\x27\x1c", Format.COMPRESSED),
)  # fmt: skip


def recognize(file: InputFile) -> Format | None:
    """The format of a file, independent of its name; None if its first bytes are not recognised.

    Raises:
        CheckpointError: the file cannot be read, or has changed.
    """
    head = bytes(file.read(0, min(file.size, HEAD)))
    if not head:
        return Format.EMPTY
    # Tested first, since the length of the header may begin with the magic bytes of another format.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER:
        return Format.SAFETENSORS
    if (found := next((kind for start, kind in STARTS if head.startswith(start)), None)) is not None:
        return found
    if head.startswith(b"PK\x03\x04"):
        return _zip(file)
    if head[0] == 0x80 and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        return Format.TORCH_LEGACY if LEGACY_MAGIC in head[:64] else Format.PICKLE
    if head[4:8] == b"TFL3":
        return Format.TFLITE
    if head[257:262] == b"ustar":
        return Format.TAR
    if head[0] == 0x08 and (found := _protobuf(file)) is not None:
        return found
    if 0x81 <= head[0] <= 0x8F and (0xA1 <= head[1] <= 0xBF or head[1] == 0xD9):
        return Format.MSGPACK
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] in (b"{", b"[") and is_text(head):
        return Format.JSON
    return Format.HTML if text[:14].lower().startswith((b"<!doctype html", b"<html")) else None


def _zip(file: InputFile) -> Format:
    with file.open() as handle:
        try:
            with zipfile.ZipFile(handle) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
            return Format.TORCH_ARCHIVE  # its reader reports what is wrong
    inner = {name.partition("/")[2] for name in names}
    if {"archive_format", "models/model.json"} & (inner | set(names)):
        return Format.PT2
    if "data.pkl" in inner:
        return Format.TORCHSCRIPT if "constants.pkl" in inner else Format.TORCH_ARCHIVE
    if names and all(name.endswith(".npy") for name in names):
        return Format.NPZ
    return Format.KERAS if "model.weights.h5" in names else Format.ZIP


def _protobuf(file: InputFile) -> Format | None:
    """The format of a protocol buffer whose first field is a version, by its top-level fields."""
    fields: dict[int, int] = {}
    place = 0
    while place < file.size and len(fields) < MAX_FIELDS:
        piece = bytes(file.read(place, min(MAX_VARINTS, file.size - place)))
        tag, length = _varint(piece, 0)
        kind, field = tag & 7, tag >> 3
        value, end = _varint(piece, length) if kind in (0, 2) else (0, length)
        if kind not in (0, 2) or end == 0 or field == 0:
            return None
        fields.setdefault(field, value)
        place += end + (value if kind == 2 else 0)
    if place != file.size and len(fields) < MAX_FIELDS:
        return Format.ONNX if ONNX_GRAPH in fields and fields.keys() <= ONNX_FIELDS else None  # truncated
    if ONNX_GRAPH in fields and fields.keys() <= ONNX_FIELDS:
        return Format.ONNX
    if set(fields) == {1, 2} and fields[1] == 1:
        return Format.SAVED_MODEL
    return Format.CORE_ML if any(field >= CORE_ML_TYPES for field in fields) else None


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number and the position after it; (0, 0) if there is none."""
    value = 0
    for count, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    return 0, 0


def is_text(head: bytes) -> bool:
    """Whether the beginning of a file is text: UTF-8 without NULs, where the last character may be truncated."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
    return b"\x00" not in head


def unreadable(file: InputFile, found: Format | None) -> CheckpointError:
    """The error for a file whose format is not read."""
    if found is None:
        return CheckpointError(
            file.path,
            f"is in an unknown format (it begins with {bytes(file.read(0, min(8, file.size)))!r})",
            "fetch it again, or save the weights with safetensors or torch.save(model.state_dict(), ...)",
        )
    return CheckpointError(file.path, f"is {found}", REMEDIES[found])
