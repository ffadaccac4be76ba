"""Reads weights that are stored in several parts as plain tensors, piece by piece.

* compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask``: the kept values, and a bit per weight.
* ``torch.nn.utils.prune``: ``weight_orig`` times ``weight_mask``.
* dynamic training with bisparse: ``parametrizations.weight.original`` where ``parametrizations.weight.0.mask`` is set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64, Shaped

from bisparse.checkpoint.stored_tensor import StoredTensor, as_bytes
from bisparse.errors import CheckpointError

__all__ = ["fold"]

BITMASK = ("bitmask", "compressed", "shape")
PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.(.+)")
PIECE = 1 << 20
"""Bytes of a bit mask that are processed at a time."""


@dataclass(frozen=True)
class _Bitmask(StoredTensor):
    """A matrix stored as a bit mask and the values of the set entries, row by row."""

    bitmask: StoredTensor
    """(rows, ceil(columns / 8)) bytes, the first weight in the lowest bit."""
    values: StoredTensor

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " R1"]:
        """The number of values before each row, and their total at the end.

        Raises:
            CheckpointError: the total is not the number of stored values.
        """
        rows, width = self.bitmask.shape
        counts = np.zeros(rows, dtype=np.int64)
        step = max(1, PIECE // max(width, 1))
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            counts[row:stop] = self._bits(row, stop).sum(1)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()])
        if starts[-1] != self.values.size:
            raise CheckpointError(
                self.path,
                f"has {self.values.size:,} values where its bit mask has {starts[-1]:,} bits",
                "fetch it again",
                tensor=self.name,
            )
        return starts

    def _bits(self, row: int, stop: int) -> Shaped[np.ndarray, "R C"]:
        width = self.bitmask.shape[1]
        packed = self.bitmask.read(row * width, stop * width).view(stop - row, width).numpy()
        return np.unpackbits(packed, axis=1, count=self.shape[1], bitorder="little")

    def read_bytes(self, start: int, stop: int) -> bytearray:
        itemsize = self.nbytes // max(self.size, 1)
        columns = self.shape[1] * itemsize
        row, last = start // columns, -(-stop // columns)
        kept = torch.from_numpy(self._bits(row, last)).bool()
        first, end = (int(self._starts[one]) for one in (row, last))
        dense = torch.zeros(last - row, self.shape[1], dtype=_integers(itemsize), device="cpu")
        dense[kept] = self.values.read(first, end).view(dense.dtype)
        return bytearray(as_bytes(dense)[start - row * columns : stop - row * columns])


@dataclass(frozen=True)
class _Product(StoredTensor):
    """A weight where its mask is not zero, and zero elsewhere."""

    weight: StoredTensor
    mask: StoredTensor

    def read_bytes(self, start: int, stop: int) -> bytearray:
        itemsize = self.nbytes // max(self.size, 1)
        first, last = start // itemsize, -(-stop // itemsize)
        weight, mask = self.weight.read(first, last), self.mask.read(first, last)
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(
                self.path,
                "is not a mask: it has numbers other than 0 and 1",
                "multiply it into the weight",
                tensor=self.mask.name,
            )
        bits = weight.view(_integers(itemsize)).masked_fill_(mask == 0, 0)
        return bytearray(as_bytes(bits)[start - first * itemsize : stop - first * itemsize])


def _integers(itemsize: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]


def fold(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor | None], tuple[str, ...]]:
    """The weights of a checkpoint that are stored in parts, by the name of the part they replace, and notes.

    The names of their other parts are included with None.

    Raises:
        CheckpointError: parts that do not match, a weight that is also stored as a whole, or a parametrization of bisparse that
            cannot be read without the model.
    """
    replaced: dict[str, StoredTensor | None] = {}
    kinds: dict[str, int] = {}
    for name, tensor in tensors.items():
        if (folded := _fold(name, tensor, tensors)) is None:
            continue
        whole, parts, kind = folded
        if whole.name in tensors:
            problem = f"is stored both as a whole and in parts ({name})"
            raise CheckpointError(whole.path, problem, "remove one of them", tensor=whole.name)
        replaced |= {name: whole, **dict.fromkeys(parts)}
        kinds[kind] = kinds.get(kind, 0) + 1
    return replaced, tuple(f"{count} weights are stored as {kind}; they are read as plain ones" for kind, count in kinds.items())


def _fold(name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> tuple[StoredTensor, Sequence[str], str] | None:
    """(the whole weight, the names of its other parts, the name of the format) for a first part."""
    base, _, last = name.rpartition(".")
    if last == "compressed" and all(f"{base}.{part}" in tensors for part in BITMASK):
        return _bitmask(base, tensors)
    if last.endswith("_orig") and (mask := tensors.get(f"{name.removesuffix('_orig')}_mask")) is not None:
        return _masked(name.removesuffix("_orig"), tensor, mask), (mask.name,), "weight_orig and weight_mask"
    found = PARAMETRIZED.fullmatch(name)
    if found is None or found[3] != "original":
        return None
    prefix = f"{found[1]}.parametrizations.{found[2]}." if found[1] else f"parametrizations.{found[2]}."
    own = {other.removeprefix(prefix): other for other in tensors if other.startswith(prefix)}
    if set(own) == {"original", "0.mask"}:
        mask = tensors[own["0.mask"]]
        weight = f"{found[1]}.{found[2]}" if found[1] else found[2]
        return _masked(weight, tensor, mask), (mask.name,), "the state of a training run (original and mask)"
    if set(own) == {"original", "0.mask", "0.scale"}:
        raise CheckpointError(
            tensor.path,
            "is trained with a soft threshold (S-STE): its weight follows from a pattern that the file does not hold",
            "build the model, call sparsify_, load the state into it, call finalize_ and save it with bisparse.save",
            tensor=name,
        )
    return None


def _masked(name: str, weight: StoredTensor, mask: StoredTensor) -> StoredTensor:
    if weight.shape != mask.shape or weight.torch_dtype is None or mask.torch_dtype is None or weight.torch_dtype.is_complex:
        raise CheckpointError(
            weight.path,
            f"of shape {weight.shape}, {weight.dtype}, does not fit {mask.name} of shape {mask.shape}, {mask.dtype}",
            "fetch or save it again",
            tensor=weight.name,
        )
    return _Product(name, weight.dtype, weight.shape, weight.path, weight.nbytes, weight, mask)


def _bitmask(base: str, tensors: Mapping[str, StoredTensor]) -> tuple[StoredTensor, Sequence[str], str]:
    bitmask, values, stored_shape = (tensors[f"{base}.{part}"] for part in BITMASK)
    name = base if base.rsplit(".", 1)[-1] == "weight" else f"{base}.weight"

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(values.path, problem, "fetch it again", tensor=base)

    if stored_shape.dtype not in ("I64", "I32") or stored_shape.size != 2:
        raise refuse(f"has a shape of {stored_shape.size} entries, {stored_shape.dtype}; two integers are expected")
    rows, columns = (int(side) for side in stored_shape.read().tolist())
    if values.torch_dtype is None or values.torch_dtype.is_complex or values.torch_dtype == torch.bool:
        raise refuse(f"has values of dtype {values.dtype}")
    if min(rows, columns) < 1 or bitmask.dtype != "U8" or bitmask.shape != (rows, -(-columns // 8)):
        raise refuse(f"of shape ({rows}, {columns}) has a bit mask of shape {bitmask.shape}, {bitmask.dtype}")
    nbytes = math.prod((rows, columns)) * values.torch_dtype.itemsize
    whole = _Bitmask(name, values.dtype, (rows, columns), values.path, nbytes, bitmask, values)
    offsets = f"{base}.row_offsets"
    others: Iterable[str] = (bitmask.name, stored_shape.name, *((offsets,) if offsets in tensors else ()))
    return (
        whole,
        tuple(others),
        f"bit masks of compressed-tensors ({'sparse-bitmask' if offsets in tensors else 'sparse-24-bitmask'})",
    )
