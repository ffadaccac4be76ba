"""Run a kernel that releases the GIL on several bands of tiles at once.

To wake a thread takes about as long as the masks of a small layer, and layers come one after the other: a worker that has
finished waits awake for a moment, without the GIL, before it sleeps.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from bisparse.kernels.llvm import call_llvm, data_of

__all__ = ["over_bands"]

Band = tuple[int, int]
BANDS_A_THREAD = 4
AWAKE_S = 3e-4
"""How long a thread waits awake: longer than what lies between two layers of a model."""
LET_GO_S = 1e-5
"""How long a worker stands by once it is called, while the caller enters its own kernel and lets go of the GIL."""
CAN_PAUSE = platform.machine().lower() in ("x86_64", "amd64")


@intrinsic
def _look(typing: Any, numbers: Any) -> Any:
    """The first number of an array, read from memory; takes a moment, in which others have the core to themselves."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        found = b.load_atomic(data_of(context, b, signature, args, 0), "acquire", 8)
        if CAN_PAUSE:
            call_llvm(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return found

    return types.int64(numbers), codegen


@njit(nogil=True, cache=True)
def _changes(numbers, value, looks, after):  # type: ignore[no-untyped-def]
    """Wait awake until the number is another one, for `looks` looks at most, and for `after` more once it is. Is it?"""
    for _ in range(looks):
        if _look(numbers) != value:
            for _ in range(after):
                _look(numbers)
            return True
    return False


@cache
def _looks(seconds: float) -> int:
    numbers = np.zeros(1, np.int64)
    _changes(numbers, 0, 1, 0)
    start = time.perf_counter()
    _changes(numbers, 0, 10_000, 0)
    return max(1, int(seconds * 10_000 / (time.perf_counter() - start)))


class _Work:
    """The bands of one call. Whoever is free takes the next."""

    def __init__(self, kernel: Callable[[int, int], int], bands: Iterator[Band]) -> None:
        self.kernel, self.bands = kernel, bands
        self.results: list[int] = []

    def run(self) -> None:
        for first, last in self.bands:
            self.results.append(self.kernel(first, last))


class _Worker:
    """A thread that takes part in one call at a time."""

    def __init__(self) -> None:
        self.lock, self.bell, self.finished = threading.Lock(), threading.Semaphore(0), threading.Semaphore(0)
        self.calls, self.answers = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.work: _Work | None = None
        self.error: BaseException | None = None
        self.asleep = self.awaited = False
        self.answered_before = 0
        self.awake, self.let_go = _looks(AWAKE_S), _looks(LET_GO_S)
        threading.Thread(target=self._serve, name="bisparse", daemon=True).start()

    def call(self, work: _Work) -> None:
        with self.lock:
            self.work, self.answered_before = work, int(self.answers[0])
            self.calls[0] += 1
            if self.asleep:
                self.asleep = False
                self.bell.release()

    def wait(self) -> None:
        """Until the worker has nothing more to do with the work; raises what the kernel raised there."""
        with self.lock:
            if self.work is not None:  # not even begun, and nothing is left to do
                self.work = None
                return
        if not _changes(self.answers, self.answered_before, self.awake, 0):
            with self.lock:
                self.awaited = bool(self.answers[0] == self.answered_before)
            if self.awaited:
                self.finished.acquire()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _serve(self) -> None:
        seen = 0
        while True:
            while not _changes(self.calls, seen, self.awake, self.let_go):
                with self.lock:
                    self.asleep = bool(self.calls[0] == seen)
                if self.asleep:
                    self.bell.acquire()
            with self.lock:
                seen, work, self.work = int(self.calls[0]), self.work, None
            if work is None:
                continue
            try:
                work.run()
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                self.error = error
            with self.lock:
                self.answers[0] += 1
                if self.awaited:
                    self.awaited = False
                    self.finished.release()


_idle: list[_Worker] = []
# Threads do not survive a fork; the child makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def _idle_worker() -> _Worker:
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()


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
    work = _Work(kernel, iter([(first, min(first + size, count)) for first in range(0, count, size)]))
    workers = [_idle_worker() for _ in range(threads - 1)]
    for worker in workers:
        worker.call(work)
    try:
        work.run()
    finally:
        for worker in workers:
            worker.wait()
    _idle.extend(workers)  # those of a call that was interrupted are not used again
    return work.results
