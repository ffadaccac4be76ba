"""Checkpoints of torch.distributed.checkpoint (DCP), read without running a pickle, on one process and without torch.distributed.

A folder holds `.metadata`, a pickle that says of each tensor its shape, its chunks and where these are, and `*.distcp` files in
which each chunk is an archive of its own, as `torch.save` writes it. Both are read as all torch files are: classes become stubs.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bisparse.checkpoint.formats.state_dicts import find_weights
from bisparse.checkpoint.formats.unpickle import StorageRef, Stub, TensorRef, load_pickle
from bisparse.checkpoint.input_file import FilePart, InputFile, open_input
from bisparse.checkpoint.stored_tensor import CODES, StoredTensor, as_bytes
from bisparse.checkpoint.torch_file import damage_named, read_tensor
from bisparse.errors import CheckpointError

__all__ = ["METADATA", "is_distributed", "read_distributed"]

METADATA = ".metadata"
AGAIN = "fetch or save it again"
CONVERT = "make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
Place = tuple[int, ...]


@dataclass(frozen=True)
class ChunkedTensor(StoredTensor):
    """A tensor whose chunks are stored apart, such as the shards of ranks."""

    chunks: tuple[tuple[Place, StoredTensor], ...]
    """Where each begins, and what it holds; together they cover the tensor."""

    def read_bytes(self, start: int, stop: int) -> bytearray:
        """Only chunks that hold some of the rows asked for are read."""
        assert self.torch_dtype is not None
        row = math.prod(self.shape[1:]) * self.torch_dtype.itemsize
        if not self.shape or row == 0:
            return bytearray()
        first, last = start // row, -(-stop // row)
        rows = torch.empty((last - first, *self.shape[1:]), dtype=self.torch_dtype, device="cpu")
        for (begin, *inner), chunk in self.chunks:
            low, high = max(begin, first), min(begin + chunk.shape[0], last)
            if low >= high:
                continue
            width = math.prod(chunk.shape[1:])
            read = chunk.read((low - begin) * width, (high - begin) * width).view(high - low, *chunk.shape[1:])
            sides = (slice(one, one + side) for one, side in zip(inner, chunk.shape[1:], strict=True))
            rows[(slice(low - first, high - first), *sides)] = read
        return bytearray(as_bytes(rows)[start - first * row : stop - first * row])


def is_distributed(folder: Path) -> bool:
    """Whether a folder is such a checkpoint, by the names in it."""
    return (folder / METADATA).is_file() and any(folder.glob("*.distcp"))


def read_distributed(
    folder: Path, key: str | None = None
) -> tuple[dict[str, StoredTensor], tuple[InputFile, ...], tuple[str, ...]]:
    """The weights of a checkpoint by name, the files that they are read from, and notes on what else it holds.

    Args:
        key: where the state dict is, such as ``"model"``; by default it is found.

    Raises:
        CheckpointError: damaged, no tensors, several state dicts, chunks that do not cover their tensor, or compressed ones.
    """
    file = open_input(folder / METADATA)
    with damage_named(file.path):
        content = load_pickle(io.BytesIO(file.read(0, file.size)))
        state = _state(content)
        known = {name: _state(one) for name, one in state["state_dict_metadata"].items() if "chunks" in _state(one)}
        stored = {
            (_state(index)["fqn"], tuple(_state(index).get("offset") or ())): _state(one)
            for index, one in state["storage_data"].items()
        }
        weights, notes = find_weights(_nested(known, state.get("planner_data")), folder, key)
        inputs: dict[str, InputFile] = {}
        tensors = {
            name: _tensor(folder, name, ref.storage.key, known[ref.storage.key], stored, inputs)
            for name, ref in weights.items()
            if isinstance(ref, TensorRef)
        }
    return tensors, (file, *inputs.values()), notes


def _state(stub: Any) -> dict[str, Any]:
    """The attributes of an object that was not loaded."""
    if not isinstance(stub, Stub) or not isinstance(stub.state, Mapping):
        if isinstance(stub, Stub) and not stub.state:
            return {}
        raise ValueError("no metadata of torch.distributed.checkpoint")
    return dict(stub.state)


def _nested(known: Mapping[str, dict[str, Any]], paths: Any) -> dict[Any, Any]:
    """The state dict as it was before its names were joined; a tensor is a reference with its joined name as storage."""
    nested: dict[Any, Any] = {}
    for name, one in known.items():
        path = paths.get(name, (name,)) if isinstance(paths, Mapping) else (name,)
        dtype, shape = _state_tuple(one["properties"])[0], tuple(int(side) for side in one["size"])
        if not isinstance(dtype, torch.dtype) or any(side < 0 for side in shape):
            raise ValueError(f"{name} has no dtype or shape")
        stride = tuple(itertools.accumulate((1, *reversed(shape[1:])), lambda x, y: x * y))[::-1] if shape else ()
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = TensorRef(StorageRef(name, dtype, math.prod(shape)), dtype, shape, stride, 0)
    return nested


def _state_tuple(stub: Any) -> tuple[Any, ...]:
    if not isinstance(stub, Stub) or not isinstance(stub.state, tuple) or not stub.state:
        raise ValueError("tensor properties in another form")
    return stub.state


def _tensor(
    folder: Path,
    name: str,
    joined: str,
    about: Mapping[str, Any],
    stored: Mapping[tuple[str, Place], dict[str, Any]],
    inputs: dict[str, InputFile],
) -> StoredTensor:
    shape, dtype = tuple(about["size"]), _state_tuple(about["properties"])[0]

    def refuse(problem: str, remedy: str = AGAIN) -> CheckpointError:
        return CheckpointError(folder, problem, remedy, tensor=name)

    chunks: list[tuple[Place, StoredTensor]] = []
    for chunk in about["chunks"]:
        offsets, sizes = tuple(_state(chunk)["offsets"]), tuple(_state(chunk)["sizes"])
        outside = any(not 0 <= begin <= begin + side <= whole for begin, side, whole in zip(offsets, sizes, shape, strict=True))
        place = stored.get((joined, offsets))
        if place is None or outside:
            raise refuse(f"is corrupt: its chunk at {offsets} is not there")
        if place.get("transform_descriptors"):
            raise refuse("is stored compressed or encrypted", f"{CONVERT} {folder} weights.pt, if you trust it")
        file = str(place["relative_path"])
        if Path(file).name != file:
            raise refuse(f"names {file}, outside its folder")
        whole = inputs.setdefault(file, open_input(folder / file))
        start, length = int(place["offset"]), int(place["length"])
        if not 0 <= start <= start + length <= whole.size:
            raise refuse(f"is corrupt: its chunk at {offsets} is beyond the end of {file}")
        one = read_tensor(FilePart(whole.path, whole.state, start, length), name)
        if one.shape != sizes or one.torch_dtype != dtype:
            raise refuse(
                f"is corrupt: its chunk at {offsets} has shape {one.shape} and {one.dtype}, the metadata say {sizes}, {dtype}"
            )
        if one.size:
            chunks.append((offsets, one))
    if sum(one.size for _, one in chunks) != math.prod(shape) or _overlap(chunks):
        raise refuse(f"is corrupt: its {len(chunks)} chunks do not cover its shape {shape}")
    if len(chunks) == 1:
        return chunks[0][1]
    if (code := CODES.get(dtype)) is None:
        raise refuse(f"has dtype {dtype}, which safetensors lacks", "convert it first")
    return ChunkedTensor(name, code, shape, folder, math.prod(shape) * dtype.itemsize, chunks=tuple(chunks))


def _overlap(chunks: list[tuple[Place, StoredTensor]]) -> bool:
    """Whether two chunks hold the same entries."""
    return any(
        all(max(a, b) < min(a + s, b + t) for a, b, s, t in zip(p, q, one.shape, other.shape, strict=True))
        for (p, one), (q, other) in itertools.combinations(chunks, 2)
    )
