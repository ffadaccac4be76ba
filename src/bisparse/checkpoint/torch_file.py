"""Reads names, shapes and offsets of state dicts saved by `torch.save`, without reading weights or executing pickles."""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bisparse.checkpoint.formats.semi_structured import semi_structured
from bisparse.checkpoint.formats.state_dicts import Stored, find_weights
from bisparse.checkpoint.formats.unpickle import NotPlain, StorageRef, Stub, TensorRef, Wrapped, load_pickle
from bisparse.checkpoint.input_file import InputFile
from bisparse.checkpoint.stored_tensor import CODES, FileTensor, StoredTensor, StridedTensor
from bisparse.checkpoint.torch_archive import Archive, StorageRecord, is_archive, open_archive
from bisparse.errors import CheckpointError

__all__ = ["damage_named", "read_state_dict", "read_tensor"]

MAX_EXPANDED_BYTES = 1 << 26
"""Maximum bytes of a tensor larger than its storage: small expanded buffers are read, but not 40 GB from one entry."""
DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, OverflowError,
    MemoryError, struct.error,
)  # fmt: skip
"""Exceptions that unpickling damaged bytes can raise."""
PROTOCOL = 1001
"""Protocol of torch files before 1.6."""

Places = Callable[[StorageRef, str], StorageRecord]
"""A function that locates a storage; its errors name the tensor."""


def read_state_dict(file: InputFile, key: str | None = None) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors of a torch file, and notes on its other content.

    Nothing is executed: classes in the pickle are not imported, and only the tensors of objects are read.

    Args:
        key: key of the state dict, such as ``"model.state_dict"``; by default it is found.

    Raises:
        CheckpointError: no tensors, several state dicts, truncated or corrupt, or a tensor that is not a plain view of its
            storage.
    """
    with damage_named(file.path):
        content, place = _open_archived(open_archive(file)) if is_archive(file) else _open_legacy(file)
        weights, notes = find_weights(content, file.path, key)
        dtypes: dict[str, torch.dtype] = {}
        tensors = {name: _stored(name, value, file.path, place, dtypes) for name, value in weights.items()}
    file.check_unchanged()
    return tensors, notes


def read_tensor(file: InputFile, name: str) -> StoredTensor:
    """The tensor that a torch file consists of, under a name.

    Raises:
        CheckpointError: it holds anything else, is damaged, or the tensor is not a plain view of its storage.
    """
    content, place = _open_archived(open_archive(file))
    if not isinstance(content, Stored):
        raise CheckpointError(file.path, f"is a {type(content).__name__}, not a tensor", "fetch or save it again", tensor=name)
    return _stored(name, content, file.path, place, {})


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """While open, what a damaged file raises is an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    except DAMAGE as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CheckpointError(path, f"is truncated or corrupt ({first})", "fetch or save it again") from error


def _open_archived(archive: Archive) -> tuple[Any, Places]:
    content = load_pickle(io.BytesIO(archive.content("data.pkl")))
    return content, lambda storage, tensor: archive.record(f"data/{storage.key}", tensor)


def _open_legacy(file: InputFile) -> tuple[Any, Places]:
    """Open a file of torch < 1.6: five pickles, then for each storage its number of entries and its bytes."""
    with file.open() as handle:
        load_pickle(handle)  # the magic number
        protocol, system, content, keys = (load_pickle(handle) for _ in range(4))
        if protocol != PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(
                file.path,
                f"has protocol {protocol!r}, system {system!r}; only protocol {PROTOCOL}, little-endian, is read",
                "load it with torch.load(path, weights_only=True) and write it again with torch.save",
            )
        start = handle.tell()
        sizes = {storage.key: storage.dtype.itemsize for storage in _storages(content)}
        offsets: dict[str, tuple[int, int]] = {}
        for key in keys:
            (count,) = struct.unpack("<q", file.read(start, 8))
            size = count * sizes.get(str(key), 0)
            if str(key) not in sizes or count < 0 or start + 8 + size > file.size:
                if str(key) not in sizes:
                    break  # the size of a storage that no tensor uses is not known, so later storages cannot be found
                raise CheckpointError(file.path, "ends before its last byte", "fetch the file again")
            offsets[str(key)] = (start + 8, size)
            start += 8 + size

    def place(storage: StorageRef, tensor: str) -> StorageRecord:
        if storage.key not in offsets:
            raise CheckpointError(
                file.path, f"is corrupt: it lacks the storage {storage.key}", "fetch or save it again", tensor=tensor
            )
        return StorageRecord(file, f"storage {storage.key}", *offsets[storage.key], None)

    return content, place


def _storages(content: Any) -> Iterator[StorageRef]:
    """Yield all storages that occur in a pickle."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, StorageRef):
            yield one
        elif isinstance(one, TensorRef):
            yield one.storage
        elif id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, dict):
                waiting.extend((*one, *one.values(), vars(one) if hasattr(one, "__dict__") else ()))
            elif isinstance(one, list | tuple | set | frozenset):
                waiting.extend(one)
            elif isinstance(one, Stub):
                waiting.extend((one.args, one.state, one.items, one.elements))


def _stored(name: str, value: Stored, path: Path, place: Places, dtypes: dict[str, torch.dtype]) -> StoredTensor:
    """The stored tensor of a pickled one; raises CheckpointError unless it is a strided view of bytes."""

    def refuse(problem: str, remedy: str) -> CheckpointError:
        return CheckpointError(path, problem, remedy, tensor=name)

    if isinstance(value, Wrapped):
        parts = {
            part: _stored(f"{name}.{part}", one, path, place, dtypes)
            for part, one in value.parts.items()
            if isinstance(one, TensorRef)
        }
        if (dense := semi_structured(name, path, value, parts)) is not None:
            return dense
        raise refuse(f"is a {value.kind.rsplit('.', 1)[-1]}, not a plain tensor", "save dense tensors")
    if isinstance(value, NotPlain) or value.problem:
        raise refuse(value.problem, value.remedy)
    storage = value.storage
    if dtypes.setdefault(storage.key, value.dtype) != value.dtype:
        raise refuse(f"shares data/{storage.key} with a tensor of dtype {dtypes[storage.key]}", "save clones of both")
    if (code := CODES.get(value.dtype)) is None:
        raise refuse(f"has dtype {value.dtype}, which safetensors lacks", "convert it first")
    shape, stride, itemsize = value.shape, value.stride, value.dtype.itemsize
    nbytes, start = math.prod(shape) * itemsize, value.offset * itemsize
    if nbytes > max(storage.nbytes, MAX_EXPANDED_BYTES):
        raise refuse(
            f"is expanded from {storage.nbytes:,} bytes to shape {shape}, which takes {nbytes:,}",
            "save the tensor before it is expanded",
        )
    record = place(storage, name)
    last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    span = (last + 1) * itemsize if nbytes else 0
    if record.size != storage.nbytes or (nbytes and start + span > record.size):
        raise refuse(
            f"is corrupt: {record.name} has {record.size} bytes, its storage {storage.nbytes}, and the tensor ends at "
            f"{start + span}",
            "fetch or save it again",
        )
    if nbytes == 0 or _is_contiguous(shape, stride):
        return FileTensor(name, code, shape, path, nbytes, start, record)
    whole = FileTensor(name, code, (last + 1,), path, span, start, record)
    return StridedTensor(name, code, shape, path, nbytes, whole, stride)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True
