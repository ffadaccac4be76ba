"""The n largest of every group of entries; of equal ones those with the lower index.

An entry is kept if fewer than n of its group are larger, or equal and before it. For the usual groups of float32 all of this
happens in vector lanes, one group per lane: a quarter of the time.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.memory import empty
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, numpy_type, over_bands

__all__ = ["keep_largest"]

IN_LANES = (4, 8, 16, 32)
"""Sizes of groups with a kernel in lanes, which compares all pairs; each is compiled when it is first used."""
LANES = 128
"""Groups that are processed at a time."""


def keep_largest(groups: torch.Tensor, n: int) -> torch.Tensor:
    """`ops.keep_largest` on CPU."""
    if groups.dtype in (torch.float16, torch.bfloat16):
        groups = groups.float()
    groups = groups.contiguous()
    count, entries = groups.shape
    mask = empty((count, entries), torch.bool)
    if groups.dtype == torch.float32 and entries in IN_LANES:
        over_bands(lanes_kernel(entries), (groups, mask, count, n), count, LANES, 65536 // entries)
    else:
        over_bands(largest_kernel(groups.dtype), (groups, mask, count, entries, n), count, 1, max(1, 65536 // max(entries, 1)))
    return mask


@cached_njit(from_python=False)
def lanes_band(groups, n, words, side, first, last):  # type: ignore[no-untyped-def]
    """Groups first..last of as many entries as `side` has; a word of the mask is four entries, one byte each."""
    m = len(side)
    lanes, word = np.empty(m * LANES, np.float32), np.empty(LANES, np.int32)
    most = np.int32(n)
    for start in range(first, last, LANES):
        count = min(LANES, last - start)
        for t in range(count):
            for i in range(m):
                lanes[i * LANES + t] = groups[(start + t) * m + i]
        for i in range(m):
            byte = np.int32(1 << (8 * (i % 4)))
            for t in range(LANES):
                own, before = lanes[i * LANES + t], np.int32(0)
                for j in range(m):
                    other = lanes[j * LANES + t]
                    before += np.int32(other >= own) if j < i else np.int32(other > own)
                kept = byte if before < most else np.int32(0)
                word[t] = kept if i % 4 == 0 else word[t] | kept
            if i % 4 == 3:
                for t in range(count):
                    words[(start + t) * (m // 4) + i // 4] = word[t]
    return 0


@cached_njit(from_python=False)
def largest_band(groups, n, mask, first, last):  # type: ignore[no-untyped-def]
    """Keep an entry if fewer than n of its group are larger, or equal and before it."""
    m = groups.shape[1]
    for g in range(first, last):
        for i in range(m):
            score = groups[g, i]
            before = 0
            for j in range(i):
                before += groups[g, j] >= score
            for j in range(i + 1, m):
                before += groups[g, j] > score
            mask[g, i] = before < n
    return 0


@cache
def lanes_kernel(m: int) -> Kernel:
    """`lanes_band` for groups of m float32. Arguments: groups, mask; groups, n."""
    side = (0,) * m

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        groups, mask, count, n = array_at(arguments, (4,), np.int64)
        words = array_at(mask, (count * m // 4,), np.int32)
        return 1 + lanes_band(array_at(groups, (count * m,), np.float32), n, words, side, first, last)

    return kernel(entry)


@cache
def largest_kernel(dtype: torch.dtype) -> Kernel:
    """`largest_band` for groups of a type. Arguments: groups, mask; groups, entries of a group, n."""
    number = numpy_type(dtype)

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        given = array_at(arguments, (5,), np.int64)
        shape = given[2], given[3]
        return 1 + largest_band(array_at(given[0], shape, number), given[4], array_at(given[1], shape, np.bool_), first, last)

    return kernel(entry)
