"""The compiled kernels: one pass over a tensor and its mask.

Plain torch widens the mask to integers, negates them and ANDs them with the values, which are three passes and a temporary
tensor of the size of the values. Where that does not fit into the caches, torch takes 3.5 ns per weight and a kernel 1 ns
(4096 x 4096 in float32, in place, one core).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands

__all__ = ["add_masked", "masked"]

PER_THREAD = 1 << 15
"""As in torch's own elementwise operators."""
GRANULE = 64


def masked(out: Tensor, tensor: Tensor, mask: Tensor, *, kept: bool) -> None:
    """See `bisparse.kernels.masking.dispatch.masked`."""
    code = _mask_kernel(tensor.element_size(), out is tensor)
    over_bands(code, (out, tensor, mask, 0 if kept else -1), tensor.numel(), GRANULE, PER_THREAD)


def add_masked(target: Tensor, values: Tensor, mask: Tensor, alpha: float) -> None:
    """See `bisparse.kernels.masking.dispatch.add_masked`."""
    factor = int(np.float32(alpha).view(np.int32))
    over_bands(_add_kernel(target is values), (target, values, mask, factor), values.numel(), GRANULE, PER_THREAD)


@intrinsic
def _fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return types.float32(*(types.float32,) * 3), lambda context, b, signature, args: b.fma(*args)


# The compiler vectorises a loop over arrays that it knows to be the same, or that it finds to be apart.


@cache
def _mask_kernel(size: int, in_place: bool) -> Kernel:
    integer: Any = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[size]

    def mask_band(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers = array_at(arguments, (4,), np.int64)
        count = last - first
        values = array_at(numbers[1] + first * size, (count,), integer)
        kept = array_at(numbers[2] + first, (count,), np.uint8)
        out = values if in_place else array_at(numbers[0] + first * size, (count,), integer)
        flip = integer(numbers[3])
        for k in range(count):
            out[k] = values[k] & (flip ^ -integer(kept[k]))
        return 1

    return kernel(mask_band)


@cache
def _add_kernel(in_place: bool) -> Kernel:
    def add_band(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers = array_at(arguments, (4,), np.int64)
        count = last - first
        values = array_at(numbers[1] + 4 * first, (count,), np.float32)
        kept = array_at(numbers[2] + first, (count,), np.uint8)
        target = values if in_place else array_at(numbers[0] + 4 * first, (count,), np.float32)
        alpha = array_at(arguments + 24, (1,), np.float32)[0]
        for k in range(count):
            target[k] = _fma(alpha, np.float32(0.0) if kept[k] else values[k], target[k])
        return 1

    return kernel(add_band)
