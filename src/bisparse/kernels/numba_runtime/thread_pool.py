"""Run a kernel on several bands of tiles at once, without Python between the bands.

Waking a thread, or passing it the GIL, takes about as long as the masks of a small layer, and layers follow each other
closely. So a call is an array of integers in shared memory: workers spin for calls, take bands and report in compiled code,
and enter Python only to sleep, after `SPIN_S` without work.

A kernel is compiled by `kernel` and called as ``kernel(arguments, first, last)`` with the address of its arguments, one int64
each; an array is passed as the address of its first entry (see `array_at`). It returns 1 plus its flags, because compiled code
that fails returns 0.
"""

from __future__ import annotations

import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from bisparse.kernels.numba_runtime.cache import cached_cfunc, cached_njit
from bisparse.kernels.numba_runtime.llvm import I8, I64, call_llvm

__all__ = ["Kernel", "address_of", "array_at", "kernel", "numpy_type", "over_bands"]

Kernel = Any  # numba's CFunc
Argument = int | torch.Tensor | np.ndarray[Any, Any]
BANDS_PER_THREAD = 4
SPIN_S = 3e-4
"""How long a thread spins before it sleeps: longer than the time between two layers of a model."""
CAN_PAUSE = platform.machine().lower() in ("x86_64", "amd64")
MAX_WORKERS = 255

# Fields that threads write have a cache line of their own, 8 numbers wide. A call: the next band and the flags raised so far;
# constants; the kernel's arguments.
NEXT, FLAGS, CODE, SIZE, COUNT, BANDS, ARGUMENTS = 0, 1, 8, 9, 10, 11, 12
FAILED = 1 << 62
"""The flag of a kernel that failed."""
# A worker: its state; the address of its current call; whether it was asleep when it was called.
STATE, CALL, WAS_ASLEEP, WORKER = 0, 1, 2, 8
IDLE, CALLED, RUNNING, AWAITED, ASLEEP = range(5)
DONE, WAKE, WAIT = range(3)


def _place(b: Any, address: Any, index: Any) -> Any:
    return b.inttoptr(b.add(address, b.mul(index, ir.Constant(I64, 8))), I64.as_pointer())


@intrinsic
def _read(typing: Any, address: Any, index: Any) -> Any:
    """The number at `address[index]`, read atomically."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(_place(b, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _replace(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Store a number atomically; returns the previous one."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("xchg", _place(b, *args[:2]), args[2], "acq_rel")

    return types.int64(*(types.int64,) * 3), codegen


@intrinsic
def _increase(typing: Any, address: Any, index: Any) -> Any:
    """Add 1 atomically; returns the previous number."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _place(b, *args), ir.Constant(I64, 1), "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _raise_flags(typing: Any, address: Any, index: Any, flags: Any) -> Any:
    """Or flags into a number atomically; returns the previous number."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("or", _place(b, *args[:2]), args[2], "acq_rel")

    return types.int64(*(types.int64,) * 3), codegen


@intrinsic
def _replace_if(typing: Any, address: Any, index: Any, expected: Any, value: Any) -> Any:
    """Compare and swap; returns whether the number was the expected one."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.extract_value(b.cmpxchg(_place(b, *args[:2]), args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(*(types.int64,) * 4), codegen


@intrinsic
def _pause(typing: Any) -> Any:
    """The CPU's spin-wait hint, which leaves the core to its other hardware thread."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if CAN_PAUSE:
            call_llvm(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _call(typing: Any, code: Any, arguments: Any, first: Any, last: Any) -> Any:
    """Call the kernel at an address with ``(arguments, first, last)``."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.call(b.inttoptr(args[0], ir.FunctionType(I64, [I64] * 3).as_pointer()), args[1:])

    return types.int64(*(types.int64,) * 4), codegen


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], I8.as_pointer())

    return types.voidptr(types.int64), codegen


@cached_njit(inline="always")
def array_at(address, shape, dtype):  # type: ignore[no-untyped-def]
    """For kernels: the array at an address, given its shape (a tuple) and numpy dtype."""
    return carray(_pointer(address), shape, dtype)


def address_of(array: torch.Tensor | np.ndarray[Any, Any]) -> int:
    """The address of an array's first entry."""
    return array.data_ptr() if isinstance(array, torch.Tensor) else int(array.ctypes.data)


def numpy_type(dtype: torch.dtype) -> Any:
    """The numpy dtype that corresponds to a torch dtype, for `array_at`."""
    return torch.empty(0, dtype=dtype).numpy().dtype.type


def kernel(function: Callable[[int, int, int], int]) -> Kernel:
    """Compile a kernel, or load it from numba's cache."""
    return cached_cfunc("int64(int64, int64, int64)", function)


@cached_njit()
def _take_bands(call):  # type: ignore[no-untyped-def]
    """Run bands of a call until none is left."""
    code, size, count, bands = _read(call, CODE), _read(call, SIZE), _read(call, COUNT), _read(call, BANDS)
    while True:
        band = _increase(call, NEXT)
        if band >= bands:
            return
        returned = _call(code, call + 8 * ARGUMENTS, band * size, min((band + 1) * size, count))
        if returned != 1:
            _raise_flags(call, FLAGS, returned - 1 if returned else FAILED)


@cached_njit()
def _wait_while(worker, state, spins):  # type: ignore[no-untyped-def]
    for _ in range(spins):
        if _read(worker, STATE) != state:
            return
        _pause()


@cached_njit()
def _serve(worker, spins):  # type: ignore[no-untyped-def]
    """Serve calls; returns True after `spins` spins without one, False where a sleeping caller has to be woken."""
    _replace_if(worker, STATE, ASLEEP, IDLE)
    while True:
        _wait_while(worker, IDLE, spins)
        if _replace_if(worker, STATE, IDLE, ASLEEP):
            return True
        if _replace_if(worker, STATE, CALLED, RUNNING):
            _take_bands(_read(worker, CALL))
            if _replace(worker, STATE, IDLE) == AWAITED:
                return False


@cached_njit()
def _share(call, workers, count, spins, started):  # type: ignore[no-untyped-def]
    """Call workers unless `started`, run bands alongside them, and wait for the workers that have begun.

    Returns `DONE`; `WAKE` if sleeping workers have to be woken first; `WAIT` if one is still busy and will release `done`.
    """
    if not started:
        asleep = False
        for k in range(count):
            worker = workers + 8 * WORKER * k
            _replace(worker, CALL, call)
            slept = _replace(worker, STATE, CALLED) == ASLEEP
            _replace(worker, WAS_ASLEEP, np.int64(slept))
            asleep |= slept
        if asleep:
            return WAKE
    _take_bands(call)
    for k in range(count):
        worker = workers + 8 * WORKER * k
        if _replace_if(worker, STATE, CALLED, IDLE):
            continue  # it has not even begun, and nothing is left to do
        _wait_while(worker, RUNNING, spins)
        if _replace_if(worker, STATE, RUNNING, AWAITED) or _read(worker, STATE) == AWAITED:  # the latter after an interruption
            return WAIT
    return DONE


@cache
def _spins(seconds: float) -> int:
    state = np.zeros(1, np.int64)
    _wait_while(address_of(state), 0, 1)
    start = time.perf_counter()
    _wait_while(address_of(state), 0, 10_000)
    return max(1, int(seconds * 10_000 / (time.perf_counter() - start)))


@cache
def _layout(arguments: int) -> struct.Struct:
    """Binary layout of a call with so many arguments."""
    return struct.Struct(f"=qq48x4q{arguments}q")


class _Team:
    """One calling thread and its workers; runs one call at a time."""

    def __init__(self) -> None:
        self.call, self.workers = np.zeros(1 << 12, np.int64), np.zeros(MAX_WORKERS * WORKER, np.int64)
        self.block = self.call.data
        self.call_address, self.workers_address = address_of(self.call), address_of(self.workers)
        self.wake: list[threading.Semaphore] = []
        self.done = threading.Semaphore(0)
        self.spins = _spins(SPIN_S)
        self.held: object = None

    def run(self, code: int, size: int, count: int, arguments: Sequence[Argument], workers: int) -> int:
        """Run a call's bands on the caller and its workers; returns the flags raised."""
        workers = self._start_workers(workers)
        numbers = [one if isinstance(one, int) else address_of(one) for one in arguments]
        _layout(len(numbers)).pack_into(self.block, 0, 0, 0, code, size, count, -(-count // size), *numbers)
        # They must outlive the call, even where the wait for it is interrupted. Only now: an interruption above loses nothing.
        self.held = arguments
        try:
            state = _share(self.call_address, self.workers_address, workers, self.spins, False)
            if state != DONE:
                self._go_on(state, workers)
        except BaseException:  # Ctrl-C: workers may still run, or be asleep; a superfluous wake-up is harmless
            self._go_on(WAKE, workers)
            self.held = None
            raise
        self.held = None
        return self.block[FLAGS]

    def _start_workers(self, workers: int) -> int:
        """Start missing threads; returns how many exist, fewer than `workers` where the system refuses more."""
        while len(self.wake) < workers:
            wake, number = threading.Semaphore(0), len(self.wake)
            try:
                threading.Thread(target=self._work, args=(number, wake), name="bisparse", daemon=True).start()
            except RuntimeError:
                return number
            self.wake.append(wake)
        return workers

    def _go_on(self, state: int, workers: int) -> None:
        while state != DONE:
            if state == WAKE:
                for worker in range(workers):
                    if self.workers[WORKER * worker + WAS_ASLEEP]:
                        self.wake[worker].release()
            else:
                self.done.acquire()
            state = _share(self.call_address, self.workers_address, workers, self.spins, True)

    def _work(self, worker: int, wake: threading.Semaphore) -> None:
        while True:
            if _serve(self.workers_address + 8 * WORKER * worker, self.spins):
                wake.acquire()
            else:
                self.done.release()


_idle: list[_Team] = []
# Threads do not survive a fork; the child starts its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def over_bands(code: Kernel, arguments: Sequence[Argument], count: int, granule: int, min_items: int) -> int:
    """Call a kernel on bands that cover ``range(count)``, on up to `torch.get_num_threads` threads; the flags raised.

    Bands start at multiples of `granule`; `min_items` is the least work per thread. Each free thread takes the next band, so
    one that wakes late delays no other. The result of a band does not depend on the number of threads.
    """
    if count <= 0:
        return 0
    threads = max(1, min(torch.get_num_threads(), count // max(min_items, 1), MAX_WORKERS + 1))
    bands = 1 if threads == 1 else min(BANDS_PER_THREAD * threads, count // max(min_items, 1))
    size = -(-count // (bands * granule)) * granule
    # No calls here: after a call CPython may raise Ctrl-C or switch threads, and the team would be lost, or taken twice.
    if _idle:
        team = _idle[-1]
        del _idle[-1]
    else:
        team = _Team()
    try:
        flags = team.run(code.address, size, count, arguments, threads - 1)
    finally:
        if team.held is None:  # otherwise the wait for an interrupted call was interrupted too
            _idle.append(team)
    if flags & FAILED:
        raise MemoryError("a compiled kernel failed, probably out of memory; its own error is on standard error")
    return flags
