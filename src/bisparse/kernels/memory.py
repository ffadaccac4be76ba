"""Memory for the outputs of the CPU kernels.

Fresh memory is cleared by the system page by page, which takes a fifth of the time of a large 2:4-T mask, and on pages of
4 KiB longer than the search itself. So large outputs lie on huge pages where there are any; and memory that nobody holds any
more is marked as free for the system to take, but used again for the next output of that size if it has not been taken.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np

__all__ = ["LARGE", "empty"]

LARGE = 1 << 22
"""Bytes from which the system's pages are worth a thought."""
KEPT = 2
"""Regions kept at most: a mask's and its prices'."""
MARKS = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")

_free: list[mmap.mmap] = []
_lock = threading.RLock()  # again by the same thread, where the collector ends an array while the lock is held


def empty(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    """An array of any content."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not MARKS:
        return np.empty(shape, dtype)
    region = _region(size)
    bytes_ = np.frombuffer(region, np.uint8, size)
    weakref.finalize(bytes_, _give_back, region).atexit = False
    return bytes_.view(dtype).reshape(shape)


def _region(size: int) -> mmap.mmap:
    with _lock, suppress(ValueError):  # the collector may have come between
        for region in list(_free):
            if len(region) == size:
                _free.remove(region)
                return region
    region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system built without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _give_back(region: mmap.mmap) -> None:
    try:
        region.madvise(mmap.MADV_FREE)
    except OSError:  # a system that does not know the mark: the region ends with its last reference
        return
    with _lock:
        _free.append(region)
        del _free[:-KEPT]
