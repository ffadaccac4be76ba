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
def estimate_band(numbers, uniform, found, first, last, zero, one, two, half):  # type: ignore[no-untyped-def]
    """The estimate of some outputs, in the order of operations of the specification."""
    for block in range(first, last, OUTPUTS):
        for group in range(uniform.shape[0]):
            t = 4 * group
            for o in range(block, min(block + OUTPUTS, last)):
                g0, g1, g2, g3 = numbers[t, o], numbers[t + 1, o], numbers[t + 2, o], numbers[t + 3, o]
                s0, s1, s2, s3 = abs(g0), abs(g1), abs(g2), abs(g3)
                total = s0 + s1 + s2 + s3
                largest = max(max(s0, s1), max(s2, s3))
                rest = total - largest
                clipped = largest > rest
                scale = one if clipped else two
                whole = rest if clipped else total
                whole = whole if whole > zero else one
                # The first of the largest is certain where one entry passes 1; no two do.
                c0 = clipped and s0 == largest
                c1 = clipped and s1 == largest and s0 < largest
                c2 = clipped and s2 == largest and max(s0, s1) < largest
                c3 = clipped and max(max(s0, s1), s2) < largest
                p0 = one if c0 else min(scale * s0 / whole, one)
                p1 = one if c1 else min(scale * s1 / whole, one)
                p2 = one if c2 else min(scale * s2 / whole, one)
                p3 = one if c3 else min(scale * s3 / whole, one)
                r0 = zero if p0 == one else p0
                r1 = r0 + (zero if p1 == one else p1)
                r2 = r1 + (zero if p2 == one else p2)
                r3 = np.floor(r2 + (zero if p3 == one else p3) + half)
                u = uniform[group, o]
                before = np.floor(-u)
                broken = total - total  # NaN where a gradient is not finite, which must not pass for a zero
                q0, q1, q2, q3 = np.floor(r0 - u), np.floor(r1 - u), np.floor(r2 - u), np.floor(r3 - u)
                found[o, t] = (g0 / (p0 if p0 > zero else one) if p0 == one or (q0 > before and p0 > zero) else zero) + broken
                found[o, t + 1] = (g1 / (p1 if p1 > zero else one) if p1 == one or (q1 > q0 and p1 > zero) else zero) + broken
                found[o, t + 2] = (g2 / (p2 if p2 > zero else one) if p2 == one or (q2 > q1 and p2 > zero) else zero) + broken
                found[o, t + 3] = (g3 / (p3 if p3 > zero else one) if p3 == one or (q3 > q2 and p3 > zero) else zero) + broken


@cache
def estimate_kernel(dtype: torch.dtype) -> Kernel:
    """`estimate_band` in a type. Arguments: numbers, uniform, found; groups, outputs."""
    number = numpy_type(dtype)
    zero, one, two, half = (number(constant) for constant in (0, 1, 2, 0.5))

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers, uniform, found, groups, outputs = array_at(arguments, (5,), np.int64)
        estimate_band(
            array_at(numbers, (4 * groups, outputs), number),
            array_at(uniform, (groups, outputs), number),
            array_at(found, (outputs, 4 * groups), number),
            first,
            last,
            zero,
            one,
            two,
            half,
        )
        return 1

    return kernel(entry)
