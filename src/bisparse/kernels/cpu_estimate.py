"""The 2:4 estimate of a gradient on CPU: one pass over the groups, where plain torch needs about forty."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bisparse.kernels.threads import Kernel, array_at, kernel, numpy_type, over_bands

__all__ = ["estimate_2to4"]

OUTPUTS = 64  # a block's share of the transposed result stays in the first cache
WORTH = 1 << 14


def estimate_2to4(gradient: Tensor, start: Tensor) -> Tensor:
    """`estimate.estimate_2to4` on a CPU."""
    (tokens, outputs), groups = gradient.shape, start.shape[0]
    dtype = torch.float64 if start.dtype == torch.float64 else torch.float32
    numbers = torch.zeros((4 * groups, outputs), dtype=dtype)
    numbers[:tokens] = gradient.detach()
    uniform = start.detach().to(dtype).contiguous()
    found = torch.empty((outputs, 4 * groups), dtype=dtype)
    arguments = numbers, uniform, found, groups, outputs
    over_bands(estimate_kernel(dtype), arguments, outputs, OUTPUTS, max(1, WORTH // max(1, groups)))
    return found.to(gradient.dtype)


@njit(nogil=True, cache=True, error_model="numpy")
def estimate_band(numbers, uniform, found, first, last, zero, half):  # type: ignore[no-untyped-def]
    """The estimate of some outputs, in the order of operations of the specification."""
    for block in range(first, last, OUTPUTS):
        for group in range(uniform.shape[0]):
            t = 4 * group
            for o in range(block, min(block + OUTPUTS, last)):
                g0, g1, g2, g3 = numbers[t, o], numbers[t + 1, o], numbers[t + 2, o], numbers[t + 3, o]
                e0, e1, e2, e3 = estimate_group(g0, g1, g2, g3, uniform[group, o], zero, half)
                found[o, t], found[o, t + 1], found[o, t + 2], found[o, t + 3] = e0, e1, e2, e3


@njit(nogil=True, cache=True, error_model="numpy")
def estimate_group(g0, g1, g2, g3, uniform, zero, half):  # type: ignore[no-untyped-def]
    """The estimate of four entries."""
    s0, s1, s2, s3 = abs(g0), abs(g1), abs(g2), abs(g3)
    low, high, other_low, other_high = min(s0, s1), max(s0, s1), min(s2, s3), max(s2, s3)
    rest = min(high, other_high) + low + other_low
    total = s0 + s1 + s2 + s3
    tau = rest if max(high, other_high) > rest else half * total
    c0, c1, c2, c3 = (s0 >= tau) & (s0 > zero), (s1 >= tau) & (s1 > zero), (s2 >= tau) & (s2 > zero), (s3 >= tau) & (s3 > zero)
    one, two = c0 | c1 | c2 | c3, (c0 & c1) | (c2 & c3) | ((c0 | c1) & (c2 | c3))
    r0 = zero if c0 else s0
    r1 = r0 + (zero if c1 else s1)
    r2 = r1 + (zero if c2 else s2)
    x = uniform * tau
    y = x if one else x + tau
    k0 = (x < r0) & (not two)
    k1 = (((r0 <= x) & (x < r1)) | ((r0 <= y) & (y < r1))) & (not two)
    k2 = (((r1 <= x) & (x < r2)) | ((r1 <= y) & (y < r2))) & (not two)
    k3 = (r2 <= y) & (s3 > zero) & (not two)
    broken = total - total  # NaN where a gradient is not finite, which must not pass for a zero
    return (
        (g0 if c0 else (np.copysign(tau, g0) if k0 else zero)) + broken,
        (g1 if c1 else (np.copysign(tau, g1) if k1 else zero)) + broken,
        (g2 if c2 else (np.copysign(tau, g2) if k2 else zero)) + broken,
        (g3 if c3 else (np.copysign(tau, g3) if k3 else zero)) + broken,
    )


@cache
def estimate_kernel(dtype: torch.dtype) -> Kernel:
    """`estimate_band` in a type. Arguments: numbers, uniform, found; groups, outputs."""
    number = numpy_type(dtype)
    zero, half = number(0), number(0.5)

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers, uniform, found, groups, outputs = array_at(arguments, (5,), np.int64)
        estimate_band(
            array_at(numbers, (4 * groups, outputs), number),
            array_at(uniform, (groups, outputs), number),
            array_at(found, (outputs, 4 * groups), number),
            first,
            last,
            zero,
            half,
        )
        return 1

    return kernel(entry)
