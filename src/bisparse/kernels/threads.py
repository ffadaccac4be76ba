"""Run a kernel that releases the GIL on several bands of tiles at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["over_bands"]

BANDS_A_THREAD = 4


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="bisparse")


# The threads of a pool do not survive a fork; the child makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def over_bands(kernel: Callable[[int, int], int], count: int, granule: int, worth: int) -> list[int]:
    """Call ``kernel(first, last)`` on bands that cover ``range(count)``, on up to `torch.get_num_threads` threads.

    Bands start at multiples of `granule` and hold at least `worth` items. Whoever is free takes the next, so a thread that
    wakes late or is interrupted delays nobody; what a band computes does not depend on the threads.
    """
    threads = max(1, min(torch.get_num_threads(), count // max(worth, 1)))
    if threads == 1:
        return [kernel(0, count)] if count > 0 else []
    bands = min(BANDS_A_THREAD * threads, count // max(worth, 1))
    size = -(-count // (bands * granule)) * granule
    firsts = iter(range(0, count, size))

    def work() -> list[int]:
        return [kernel(first, min(first + size, count)) for first in firsts]

    others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    results = work()
    for other in others:
        if not other.cancel():  # one that has not even begun has nothing left to do
            results += other.result()
    return results
