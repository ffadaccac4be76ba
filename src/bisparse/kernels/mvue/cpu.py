"""The 2:4 estimate of a gradient on CPU: one pass over the groups, where plain torch needs about forty."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bisparse.kernels.mvue.philox import MULTIPLIERS, ROUNDS, WEYL
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, numpy_type, over_bands

__all__ = ["estimate_2to4"]

OUTPUTS = 64  # a block's share of the transposed result stays in the first cache
WORTH = 1 << 14
FIRST_MULTIPLIER, SECOND_MULTIPLIER = (np.uint64(number) for number in MULTIPLIERS)
FIRST_WEYL, SECOND_WEYL = (np.uint64(number) for number in WEYL)
LOW, HALF, UNUSED = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)


def estimate_2to4(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    """`estimate.estimate_2to4` on a CPU."""
    tokens, outputs = gradient.shape
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    numbers = torch.zeros((4 * groups, outputs), dtype=dtype)
    numbers[:tokens] = gradient.detach()
    found = torch.empty((outputs, 4 * groups), dtype=dtype)
    arguments = numbers, found, seed, groups, outputs
    over_bands(estimate_kernel(dtype), arguments, outputs, OUTPUTS, max(1, WORTH // max(1, groups)))
    return found.to(gradient.dtype)


@njit(nogil=True, cache=True)
def draw_uniforms(seed, four_groups, first, uniform, scale):  # type: ignore[no-untyped-def]
    """`philox.uniforms` of four groups and of the outputs from the first on."""
    for k in range(uniform.shape[1]):
        c0, c1, c2, c3 = np.uint64(first + k), np.uint64(four_groups), np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(seed) & LOW, np.uint64(seed) >> HALF
        for _ in range(ROUNDS):
            one, two = FIRST_MULTIPLIER * c0, SECOND_MULTIPLIER * c2
            c0, c1, c2, c3 = (two >> HALF) ^ c1 ^ k0, two & LOW, (one >> HALF) ^ c3 ^ k1, one & LOW
            k0, k1 = (k0 + FIRST_WEYL) & LOW, (k1 + SECOND_WEYL) & LOW
        for j, number in enumerate((c0, c1, c2, c3)):
            uniform[j, k] = np.int32(number >> UNUSED) * scale


@njit(nogil=True, cache=True, error_model="numpy")
def estimate_band(numbers, found, seed, first, last, zero, half, smallest, scale):  # type: ignore[no-untyped-def]
    """The estimate of some outputs, in the order of operations of the specification."""
    uniform = np.empty((4, OUTPUTS), numbers.dtype)
    for block in range(first, last, OUTPUTS):
        end = min(block + OUTPUTS, last)
        for group in range(numbers.shape[0] // 4):
            if group % 4 == 0:
                draw_uniforms(seed, group // 4, block, uniform[:, : end - block], scale)
            t = 4 * group
            for o in range(block, end):
                g0, g1, g2, g3 = numbers[t, o], numbers[t + 1, o], numbers[t + 2, o], numbers[t + 3, o]
                e0, e1, e2, e3 = estimate_group(g0, g1, g2, g3, uniform[group % 4, o - block], zero, half, smallest)
                found[o, t], found[o, t + 1], found[o, t + 2], found[o, t + 3] = e0, e1, e2, e3


@njit(nogil=True, cache=True, error_model="numpy")
def estimate_group(g0, g1, g2, g3, uniform, zero, half, smallest):  # type: ignore[no-untyped-def]
    """The estimate of four entries."""
    s0, s1, s2, s3 = abs(g0), abs(g1), abs(g2), abs(g3)
    low, high, other_low, other_high = min(s0, s1), max(s0, s1), min(s2, s3), max(s2, s3)
    rest = min(high, other_high) + low + other_low
    total = s0 + s1 + s2 + s3
    tau = max(rest if max(high, other_high) > rest else half * total, smallest)
    c0, c1, c2, c3 = s0 >= tau, s1 >= tau, s2 >= tau, s3 >= tau
    one, two = c0 | c1 | c2 | c3, (c0 & c1) | (c2 & c3) | ((c0 | c1) & (c2 | c3))
    r0 = zero if c0 else s0
    r1 = r0 + (zero if c1 else s1)
    r2 = r1 + (zero if c2 else s2)
    first = uniform * tau
    second = first if one else first + tau
    k0 = (first < r0) & (not two)
    k1 = (((r0 <= first) & (first < r1)) | ((r0 <= second) & (second < r1))) & (not two)
    k2 = (((r1 <= first) & (first < r2)) | ((r1 <= second) & (second < r2))) & (not two)
    k3 = (r2 <= second) & (s3 > zero) & (not two)
    broken = total - total  # NaN where a gradient is not finite, which must not pass for a zero
    return (
        (np.copysign(max(s0, tau), g0) if c0 | k0 else zero) + broken,
        (np.copysign(max(s1, tau), g1) if c1 | k1 else zero) + broken,
        (np.copysign(max(s2, tau), g2) if c2 | k2 else zero) + broken,
        (np.copysign(max(s3, tau), g3) if c3 | k3 else zero) + broken,
    )


@cache
def estimate_kernel(dtype: torch.dtype) -> Kernel:
    """`estimate_band` in a type. Arguments: numbers, found, seed; groups, outputs."""
    number = numpy_type(dtype)
    zero, half, smallest, scale = number(0), number(0.5), np.finfo(number).smallest_subnormal, number(2.0**-24)

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers, found, seed, groups, outputs = array_at(arguments, (5,), np.int64)
        estimate_band(
            array_at(numbers, (4 * groups, outputs), number),
            array_at(found, (outputs, 4 * groups), number),
            array_at(seed, (1,), np.int64)[0],
            first,
            last,
            zero,
            half,
            smallest,
            scale,
        )
        return 1

    return kernel(entry)
