"""Memory for the outputs of the CPU kernels.

The system clears fresh memory page by page, which takes a fifth of the time of a large 2:4-T mask and, with pages of 4 KiB,
longer than the search itself. So large outputs use huge pages where available, and released memory is reused for the next output
of the same size. When an output of another size is requested, the cached memory is marked with MADV_FREE; not earlier, because
that call is slow while several threads run.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

__all__ = ["LARGE", "empty"]

LARGE = 1 << 23
"""Bytes from which reuse pays off; at half this size two threads were slower with it."""
KEPT = 2
"""Maximum number of cached regions: one for a mask, one for its prices."""
MARKS = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")

CONSTRUCTORS: dict[torch.dtype, Callable[..., Tensor]] = {torch.bool: torch.BoolTensor, torch.int32: torch.IntTensor}
"""On cold caches these take 10 us and torch.empty takes 20, out of 400 for a mask of 1024 x 1024."""

_free: list[mmap.mmap] = []
_unmarked: list[mmap.mmap] = []
"""Regions of `_free` that are not yet marked with MADV_FREE."""
_lock = threading.RLock()  # again by the same thread, where the collector ends an array while the lock is held


def _new_lock() -> None:
    """Reset in a forked child, where another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not MARKS:
        if _unmarked:
            _mark()
        return CONSTRUCTORS[dtype](*shape)
    region = _region(size)
    bytes_ = np.frombuffer(region, np.uint8, size)
    weakref.finalize(bytes_, _give_back, region).atexit = False
    return torch.from_numpy(bytes_).view(dtype).view(shape)


def _region(size: int) -> mmap.mmap:
    with _lock:
        for region in list(_free):
            if len(region) == size and _taken(region, _free):  # the collector may have come between
                _taken(region, _unmarked)
                return region
    _mark()
    region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system built without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _taken(region: mmap.mmap, regions: list[mmap.mmap]) -> bool:
    with suppress(ValueError):
        regions.remove(region)
        return True
    return False


def _mark() -> None:
    with _lock:
        while _unmarked:
            region = _unmarked.pop()
            try:
                region.madvise(mmap.MADV_FREE)
            except OSError:  # a system that does not know the mark: the region ends with its last reference
                _taken(region, _free)


def _give_back(region: mmap.mmap) -> None:
    with _lock:
        _free.append(region)
        _unmarked.append(region)
        for old in _free[:-KEPT]:
            _taken(old, _unmarked)
        del _free[:-KEPT]
