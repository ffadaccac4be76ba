"""The compiled kernels: one pass over a tensor and its mask.

Plain torch widens the mask to integers, negates them and ANDs them with the values, which are three passes and a temporary
tensor of the size of the values. Where that does not fit into the caches, torch takes 3.5 ns per weight and a kernel 1 ns
(4096 x 4096 in float32, in place, one core).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands

__all__ = ["add_masked_each", "keep_only_each", "masked"]

PER_THREAD = 1 << 15
"""As in torch's own elementwise operators."""
GRANULE = 64


def masked(out: Tensor, tensor: Tensor, mask: Tensor, *, kept: bool) -> None:
    """See `bisparse.kernels.masking.dispatch.masked`."""
    code = _mask_kernel(tensor.element_size())
    over_bands(code, (out, tensor, mask, 0 if kept else -1), tensor.numel(), GRANULE, PER_THREAD)


def keep_only_each(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """See `bisparse.kernels.masking.dispatch.keep_only_each`."""
    _over_rows(
        _keep_kernel(pairs[0][0].element_size()),
        [(tensor.numel(), tensor.data_ptr(), mask.data_ptr()) for tensor, mask in pairs],
        KEEP_ROW,
    )


def add_masked_each(rows: Sequence[tuple[Tensor, Tensor, Tensor, float]], *, in_place: bool) -> None:
    """See `bisparse.kernels.masking.dispatch.add_masked_each`."""
    _over_rows(
        _add_kernel(in_place),
        [
            (values.numel(), target.data_ptr(), values.data_ptr(), mask.data_ptr(), int(np.float32(alpha).view(np.int32)))
            for target, values, mask, alpha in rows
        ],
        ADD_ROW,
    )


def _over_rows(code: Kernel, rows: Sequence[tuple[int, ...]], width: int) -> None:
    """Run a kernel over tensors one after the other, each from a multiple of `GRANULE` on; a row begins with their size."""
    numbers, count = [], 0
    for row in rows:
        numbers += [count, *row]
        count += -(-row[0] // GRANULE) * GRANULE
    assert len(numbers) == width * len(rows)
    table = torch.tensor(numbers, dtype=torch.int64)
    over_bands(code, (table, len(rows)), count, GRANULE, PER_THREAD)


@intrinsic
def _fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return types.float32(*(types.float32,) * 3), lambda context, b, signature, args: b.fma(*args)


# The compiler vectorises a loop over arrays that it knows to be the same, or that it finds to be apart.


KEEP_ROW = 4
"""Numbers per tensor: where it begins, its size, the addresses of values and mask."""
ADD_ROW = 6
"""Where it begins, its size, the addresses of target, values and mask, and the factor's bits."""
INTEGERS: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@cache
def _mask_kernel(size: int) -> Kernel:
    integer = INTEGERS[size]

    def mask_band(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers = array_at(arguments, (4,), np.int64)
        count = last - first
        values = array_at(numbers[1] + first * size, (count,), integer)
        kept = array_at(numbers[2] + first, (count,), np.uint8)
        out = array_at(numbers[0] + first * size, (count,), integer)
        flip = integer(numbers[3])
        for k in range(count):
            out[k] = values[k] & (flip ^ -integer(kept[k]))
        return 1

    return kernel(mask_band)


@cache
def _keep_kernel(size: int) -> Kernel:
    integer = INTEGERS[size]

    def keep_band(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers = array_at(arguments, (2,), np.int64)
        for number in range(numbers[1]):
            row = array_at(numbers[0] + 8 * KEEP_ROW * number, (KEEP_ROW,), np.int64)
            begin, count = max(first - row[0], 0), min(last - row[0], row[1])
            if begin >= count:
                continue
            count -= begin
            values = array_at(row[2] + begin * size, (count,), integer)
            kept = array_at(row[3] + begin, (count,), np.uint8)
            for k in range(count):
                values[k] &= -integer(kept[k])
        return 1

    return kernel(keep_band)


@cache
def _add_kernel(in_place: bool) -> Kernel:
    def add_band(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers = array_at(arguments, (2,), np.int64)
        for number in range(numbers[1]):
            address = numbers[0] + 8 * ADD_ROW * number
            row = array_at(address, (ADD_ROW,), np.int64)
            begin, count = max(first - row[0], 0), min(last - row[0], row[1])
            if begin >= count:
                continue
            count -= begin
            values = array_at(row[3] + 4 * begin, (count,), np.float32)
            kept = array_at(row[4] + begin, (count,), np.uint8)
            target = values if in_place else array_at(row[2] + 4 * begin, (count,), np.float32)
            alpha = array_at(address + 40, (1,), np.float32)[0]
            for k in range(count):
                target[k] = _fma(alpha, np.float32(0.0) if kept[k] else values[k], target[k])
        return 1

    return kernel(add_band)
