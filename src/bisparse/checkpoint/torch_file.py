"""State dicts saved by `torch.save`: names, shapes and offsets, without reading the weights and without running a pickle."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bisparse.checkpoint.input_file import InputFile, open_input
from bisparse.checkpoint.stored_tensor import CODES, FileTensor, MemoryTensor, StoredTensor, StridedTensor
from bisparse.checkpoint.torch_archive import Archive, StorageRecord, is_archive, open_archive
from bisparse.errors import CheckpointError

__all__ = ["read_state_dict"]

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Where training checkpoints keep the model's weights."""
MAX_EXPANDED_BYTES = 1 << 26
"""Bytes that a tensor may take when its storage holds fewer: small expanded buffers are read, 40 GB from one entry are not."""
DAMAGE = (
    RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, AssertionError, OverflowError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What torch's unpickler raises on damaged bytes."""


def read_state_dict(path: Path) -> tuple[InputFile, dict[str, StoredTensor], tuple[str, ...]]:
    """A state dict file, its tensors, and notes on what else it holds.

    Loaded with ``weights_only=True``: nothing but tensors and plain containers is ever built.

    Raises:
        CheckpointError: not a state dict, a pickle of other objects, truncated or corrupt, or a tensor that is not a plain
            view of its storage.
    """
    file = open_input(path)
    # Files of torch < 1.6 are one pickle stream: no offsets to know, so they are read whole.
    archive = open_archive(file) if is_archive(file) else None
    content, places = _load(file) if archive is None else _load_outline(archive)
    weights, notes = _weights(content, path)
    tensors: dict[str, StoredTensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in weights.items():
        code = _check_plain(name, tensor, path)
        if archive is None:
            tensors[name] = MemoryTensor(name, code, tuple(tensor.shape), path, _nbytes(tensor), tensor)
            continue
        place = places.get(tensor.untyped_storage()._checkpoint_offset)
        if place is None:
            raise CheckpointError(path, "has no place in the file", "save it again with torch.save", tensor=name)
        if dtypes.setdefault(place, tensor.dtype) != tensor.dtype:
            raise CheckpointError(
                path, f"shares {place} with a tensor of dtype {dtypes[place]}", "save clones of both", tensor=name
            )
        tensors[name] = _stored(name, code, tensor, archive.record(place, name))
    file.check_unchanged()
    return file, tensors, notes


def _load(file: InputFile) -> tuple[Any, dict[int | None, str]]:
    with file.open() as handle, _torch_errors(file.path):
        return torch.load(handle, weights_only=True, map_location="cpu"), {}


def _load_outline(archive: Archive) -> tuple[Any, dict[int | None, str]]:
    """The pickle's content, of tensors without data, and which record each `_checkpoint_offset` stands for.

    torch is given an archive of the same pickle in which every storage is empty, so where it finds a storage names its record.
    """
    outline, places = io.BytesIO(), dict[int | None, str]()
    pickled = archive.content("data.pkl")
    if b"_rebuild_qtensor" in pickled:  # torch has no quantized tensors without data
        raise CheckpointError(archive.file.path, "holds quantized tensors (qint8 or the like)", "save dense tensors")
    with zipfile.ZipFile(outline, "w") as written:
        written.writestr("outline/data.pkl", pickled)
        written.writestr("outline/version", "3\n")
        written.writestr("outline/byteorder", sys.byteorder)
        for name in archive.entries:
            if name.startswith("data/"):
                written.writestr(f"outline/{name}", b"")
                places[outline.tell()] = name
    outline.seek(0)
    with _torch_errors(archive.file.path), FakeTensorMode():
        return torch.load(outline, weights_only=True, map_location="cpu"), places


@contextmanager
def _torch_errors(path: Path) -> Iterator[None]:
    """While open, what torch raises on a file that is no state dict, or a damaged one, is an error that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            path,
            f"is no state dict of tensors, or is corrupt (its pickle asks for {named[1] if named else 'more than tensors'})",
            "save `model.state_dict()` with torch.save, or use safetensors; other pickles can run code and are never loaded",
        ) from error
    except DAMAGE as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CheckpointError(path, f"is truncated or corrupt ({first})", "fetch or save it again") from error


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            path, f"holds a {type(content).__name__}, not a state dict", "save `model.state_dict()` with torch.save"
        )
    inner = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
    weights = content[inner] if inner else content
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise CheckpointError(
            path, f"holds no tensors; its keys are {list(content)[:8]}", "save `model.state_dict()` with torch.save"
        )
    notes = []
    if inner:
        others = [str(key) for key in content if key != inner]
        notes.append(
            f"{path.name}: only the weights under '{inner}' are kept" + (f", not {', '.join(others[:8])}" if others else "")
        )
    if dropped := [str(key) for key in weights if key not in tensors]:
        notes.append(f"{path.name}: entries that are no tensors are not kept: {', '.join(dropped[:8])}")
    return tensors, tuple(notes)


def _check_plain(name: str, tensor: Tensor, path: Path) -> str:
    """safetensors' name of a tensor's dtype; refuses every tensor that is more than a strided view of bytes."""

    def refuse(problem: str, remedy: str) -> CheckpointError:
        return CheckpointError(path, problem, remedy, tensor=name)

    if type(tensor) not in (Tensor, nn.Parameter, FakeTensor) or tensor.is_nested:
        raise refuse(f"is a {type(tensor).__name__}, not a plain tensor", "save dense tensors")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise refuse(f"is stored as {tensor.layout}, {tensor.dtype}", "save dense tensors")
    if tensor.device.type == "meta":
        raise refuse("is on the meta device and has no data", "save it from a device that holds it")
    if tensor.is_neg() or tensor.is_conj():
        what, how = ("negated", "resolve_neg") if tensor.is_neg() else ("conjugated", "resolve_conj")
        raise refuse(f"is a {what} view, whose bytes are not its values", f"save tensor.{how}()")
    if (code := CODES.get(tensor.dtype)) is None:
        raise refuse(f"has dtype {tensor.dtype}, which safetensors lacks", "convert it first")
    stored = tensor.untyped_storage().nbytes()
    if _nbytes(tensor) > max(stored, MAX_EXPANDED_BYTES):
        raise refuse(
            f"is expanded from {stored:,} bytes to shape {tuple(tensor.shape)}, which takes {_nbytes(tensor):,}",
            "save the tensor before it is expanded",
        )
    return code


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _stored(name: str, code: str, tensor: Tensor, record: StorageRecord) -> StoredTensor:
    path, shape, stride, itemsize = record.file.path, tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    nbytes, start = _nbytes(tensor), int(tensor.storage_offset()) * itemsize
    last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    span = (last + 1) * itemsize if nbytes else 0
    declared = tensor.untyped_storage().nbytes()
    # A storage that was cut from bytes may end within an entry: its record is longer by less than one.
    if not declared <= record.size < declared + itemsize or (nbytes and start + span > record.size):
        raise CheckpointError(
            path,
            f"is corrupt: {record.name} has {record.size} bytes, its storage {declared}, and the tensor ends at {start + span}",
            "fetch or save it again",
            tensor=name,
        )
    if tensor.is_contiguous():
        return FileTensor(name, code, shape, path, nbytes, start, record)
    whole = FileTensor(name, code, (last + 1,), path, span, start, record)
    return StridedTensor(name, code, shape, path, nbytes, whole, stride)
