"""Tensors in files, read in pieces and written sequentially, to save memory.

The safetensors library maps a whole file and writes a whole shard at once; reading and writing by offsets needs only a buffer.
Files written here are read back with the library.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bisparse.checkpoint.input_file import InputFile
from bisparse.errors import CheckpointError
from bisparse.tiles import Layout

__all__ = [
    "DTYPES",
    "FileTensor",
    "MemoryTensor",
    "SafetensorsWriter",
    "StoredTensor",
    "StridedTensor",
    "build_header",
    "read_header",
]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""Names in safetensors of all dtypes that torch has too."""

CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 1 << 22
"""Bytes copied at a time."""


@dataclass(frozen=True)
class StoredTensor(ABC):
    """A tensor that has not been read yet."""

    name: str
    dtype: str
    """safetensors' name of it, such as ``"BF16"``."""
    shape: tuple[int, ...]
    path: Path
    nbytes: int
    operand: Layout | str | None = field(default=None, kw_only=True)
    """The layout of its product according to the file, or why there is none; None for formats that only have tensors."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype; None if torch lacks it."""
        return DTYPES.get(self.dtype)

    @abstractmethod
    def read_bytes(self, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop`` of the contiguous tensor."""

    def read(self, start: int = 0, stop: int | None = None) -> Shaped[Tensor, " S"]:
        """Entries ``start`` to ``stop`` of the flattened tensor, as a new tensor."""
        dtype = self.torch_dtype
        if dtype is None:
            raise CheckpointError(self.path, f"has dtype {self.dtype}, which torch lacks", "convert it first", tensor=self.name)
        stop = self.size if stop is None else stop
        if start == stop:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self.read_bytes(start * dtype.itemsize, stop * dtype.itemsize), dtype=dtype)

    def pieces(self) -> Iterator[bytearray]:
        """Yield the tensor's bytes in pieces."""
        for start in range(0, self.nbytes, PIECE):
            yield self.read_bytes(start, min(start + PIECE, self.nbytes))


class Content(Protocol):
    """Bytes that are read by offset: a file or a part of one."""

    def read(self, offset: int, length: int, tensor: str = "") -> bytearray:
        """Read `length` bytes from `offset`; errors name `tensor`."""


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor at an offset in a file, or in a record inside it."""

    offset: int
    content: Content

    def read_bytes(self, start: int, stop: int) -> bytearray:
        return self.content.read(self.offset + start, stop - start, self.name)


@dataclass(frozen=True)
class MemoryTensor(StoredTensor):
    """A tensor that is in memory."""

    tensor: Shaped[Tensor, "..."]

    def read_bytes(self, start: int, stop: int) -> bytearray:
        return bytearray(as_bytes(self.tensor)[start:stop])


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """A transposed or otherwise strided view, which is read as a whole each time, since no piece is contiguous."""

    span: FileTensor
    """The part of the storage from the view's first entry to its last."""
    stride: tuple[int, ...]

    def read_bytes(self, start: int, stop: int) -> bytearray:
        view = self.span.read().as_strided(self.shape, self.stride)
        return bytearray(as_bytes(view)[start:stop])


def as_bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """A tensor's bytes in row-major order, without a copy if it is contiguous."""
    resolved = tensor.detach().cpu().resolve_conj().resolve_neg()  # views that are conjugated or negated only when they are read
    return memoryview(resolved.contiguous().flatten().view(torch.uint8).numpy())


def memory_tensor(name: str, tensor: Shaped[Tensor, "..."], path: Path) -> MemoryTensor:
    """A tensor that is to be written to a file.

    Raises:
        CheckpointError: a dtype or storage layout that safetensors lacks.
    """
    code = CODES.get(tensor.dtype)
    if code is None or tensor.layout != torch.strided or tensor.is_meta:
        what = "is on the meta device" if tensor.is_meta else f"is stored as {tensor.layout}, {tensor.dtype}"
        raise CheckpointError(path, f"{what}, which safetensors cannot hold", "make it a dense tensor first", tensor=name)
    return MemoryTensor(name, code, tuple(tensor.shape), path, tensor.numel() * tensor.dtype.itemsize, tensor.detach())


def in_file_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Tensors in the order of the library: wider dtypes first, so that every tensor is aligned, then by name."""
    return sorted(tensors, key=lambda one: (-DTYPES[one.dtype].itemsize, one.name))


def read_header(file: InputFile) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header of a safetensors file, including its length, and the tensors in file order.

    Raises:
        CheckpointError: truncated or corrupt.
    """
    path = file.path
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks the header, and that its tensors cover the file without gaps
        length = int.from_bytes(file.read(0, 8), "little")
        text = bytes(file.read(8, length))
        entries = json.loads(text)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            path, f"is truncated or no safetensors file ({error})", "fetch it again, or compare its size and checksum"
        ) from error
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    entries.pop("__metadata__", None)
    tensors = [
        FileTensor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            entry["data_offsets"][1] - entry["data_offsets"][0],
            8 + length + entry["data_offsets"][0],
            file,
        )
        for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    return length.to_bytes(8, "little") + text, {tensor.name: tensor for tensor in tensors}


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header, including its length, for tensors (name, dtype, shape, bytes) in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes a safetensors file sequentially; checks that it is complete when the `with` block ends without an error."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self._expected = len(header) + _data_length(header)
        self._file = path.open("xb")
        self._file.write(header)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append a tensor's bytes, or a piece of them."""
        self._file.write(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                if self._file.tell() != self._expected:
                    raise AssertionError(f"{self.path}: {self._file.tell()} bytes written, the header says {self._expected}")
        finally:
            self._file.close()


def _data_length(header: bytes) -> int:
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
