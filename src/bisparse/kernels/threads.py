"""Run a kernel that releases the GIL on several bands of tiles at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["over_bands"]


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="bisparse")


# The threads of a pool do not survive a fork; the child makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def over_bands(kernel: Callable[[int, int], int], count: int, granule: int, worth: int) -> list[int]:
    """Call ``kernel(first, last)`` on bands that cover ``range(count)``, on up to `torch.get_num_threads` threads.

    Bands start at multiples of `granule` and hold at least `worth` items, so the result does not depend on the threads.
    """
    threads = max(1, min(torch.get_num_threads(), count // max(worth, 1)))
    size = -(-count // (threads * granule)) * granule if threads > 1 else count
    bands = [(first, min(first + size, count)) for first in range(0, count, max(size, 1))]
    if len(bands) <= 1:
        return [kernel(*band) for band in bands]
    others = [_pool(threads - 1).submit(kernel, *band) for band in bands[1:]]
    return [kernel(*bands[0]), *(other.result() for other in others)]
