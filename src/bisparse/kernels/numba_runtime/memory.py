"""Memory for the outputs of the CPU kernels.

Fresh memory is cleared by the system page by page, which takes a fifth of the time of a large 2:4-T mask, and on pages of
4 KiB longer than the search itself. So large outputs lie on huge pages where there are any; and memory that nobody holds any
more is used again for the next output of that size. Once an output of another size is asked for, it is marked as free for the
system to take; not at once, since the mark takes a while where several threads run.
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
"""Bytes from which the system's pages are worth a thought; with half as many, two threads lost by it more than they gained."""
KEPT = 2
"""Regions kept at most: a mask's and its prices'."""
MARKS = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")

CONSTRUCTORS: dict[torch.dtype, Callable[..., Tensor]] = {torch.bool: torch.BoolTensor, torch.int32: torch.IntTensor}
"""On cold caches these take 10 us and torch.empty 20, of the 400 for a mask of 1024 x 1024."""

_free: list[mmap.mmap] = []
_unmarked: list[mmap.mmap] = []
"""Those of `_free` that the system cannot take yet."""
_lock = threading.RLock()  # again by the same thread, where the collector ends an array while the lock is held


def _new_lock() -> None:
    """In a child of a fork, where another thread of the parent's may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of any content."""
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
