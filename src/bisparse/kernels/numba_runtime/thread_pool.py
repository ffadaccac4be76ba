"""Run a kernel on several bands of tiles at once, without Python between the bands.

To wake a thread, or to hand it Python's lock, takes about as long as the masks of a small layer, and layers come one after the
other. So a call is a block of numbers that threads share: workers wait for calls, take bands and answer in compiled code, and
see Python only to sleep, after a moment without work.

A kernel is compiled by `kernel` and called as ``kernel(arguments, first, last)``, with the address of its arguments: an int64
for each, an array's being the address of its first entry (see `array_at`). It returns 1 plus the flags it raises, since
compiled code that fails returns 0.
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
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from bisparse.kernels.numba_runtime.llvm import I8, I64, call_llvm

__all__ = ["Kernel", "address_of", "array_at", "kernel", "numpy_type", "over_bands"]

Kernel = Any  # numba's CFunc
Argument = int | torch.Tensor | np.ndarray[Any, Any]
BANDS_A_THREAD = 4
AWAKE_S = 3e-4
"""How long a thread waits awake: longer than what lies between two layers of a model."""
CAN_PAUSE = platform.machine().lower() in ("x86_64", "amd64")
MOST_WORKERS = 255

# What threads change lies in a cache line of its own, 8 numbers wide. A call: the next band, and the flags that any band has
# raised; what stays; the kernel's arguments.
NEXT, FLAGS, CODE, SIZE, COUNT, BANDS, ARGUMENTS = 0, 1, 8, 9, 10, 11, 12
FAILED = 1 << 62
"""The flag of a kernel that failed."""
# A worker: its state; the address of the call that it has to take part in; whether it slept when it was called.
STATE, CALL, SLEPT, WORKER = 0, 1, 2, 8
IDLE, CALLED, RUNNING, AWAITED, ASLEEP = range(5)
DONE, RING, WAIT = range(3)


def _place(b: Any, address: Any, index: Any) -> Any:
    return b.inttoptr(b.add(address, b.mul(index, ir.Constant(I64, 8))), I64.as_pointer())


@intrinsic
def _read(typing: Any, address: Any, index: Any) -> Any:
    """The number there."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(_place(b, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _replace(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Put a number there; the number before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("xchg", _place(b, *args[:2]), args[2], "acq_rel")

    return types.int64(*(types.int64,) * 3), codegen


@intrinsic
def _increase(typing: Any, address: Any, index: Any) -> Any:
    """Add 1 there; the number before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _place(b, *args), ir.Constant(I64, 1), "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _raise_flags(typing: Any, address: Any, index: Any, flags: Any) -> Any:
    """Add flags to those there."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("or", _place(b, *args[:2]), args[2], "acq_rel")

    return types.int64(*(types.int64,) * 3), codegen


@intrinsic
def _replace_if(typing: Any, address: Any, index: Any, expected: Any, value: Any) -> Any:
    """Put a number there if the expected one is there. Was it?"""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.extract_value(b.cmpxchg(_place(b, *args[:2]), args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(*(types.int64,) * 4), codegen


@intrinsic
def _pause(typing: Any) -> Any:
    """A moment in which others have the core to themselves."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if CAN_PAUSE:
            call_llvm(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _call(typing: Any, code: Any, arguments: Any, first: Any, last: Any) -> Any:
    """Call the kernel at an address."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.call(b.inttoptr(args[0], ir.FunctionType(I64, [I64] * 3).as_pointer()), args[1:])

    return types.int64(*(types.int64,) * 4), codegen


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], I8.as_pointer())

    return types.voidptr(types.int64), codegen


@njit(nogil=True, cache=True, inline="always")
def array_at(address, shape, dtype):  # type: ignore[no-untyped-def]
    """For kernels: the array at an address, of a shape (a tuple) and of numpy's type."""
    return carray(_pointer(address), shape, dtype)


def address_of(array: torch.Tensor | np.ndarray[Any, Any]) -> int:
    """The address of an array's first entry."""
    return array.data_ptr() if isinstance(array, torch.Tensor) else int(array.ctypes.data)


def numpy_type(dtype: torch.dtype) -> Any:
    """Numpy's type of a tensor's numbers, for `array_at`."""
    return torch.empty(0, dtype=dtype).numpy().dtype.type


def kernel(function: Callable[[int, int, int], int]) -> Kernel:
    """Compile a kernel, or find it in the cache."""
    return cfunc("int64(int64, int64, int64)", cache=True)(function)


@njit(nogil=True, cache=True)
def _take_bands(call):  # type: ignore[no-untyped-def]
    """Whoever is free takes the next."""
    code, size, count, bands = _read(call, CODE), _read(call, SIZE), _read(call, COUNT), _read(call, BANDS)
    while True:
        band = _increase(call, NEXT)
        if band >= bands:
            return
        returned = _call(code, call + 8 * ARGUMENTS, band * size, min((band + 1) * size, count))
        if returned != 1:
            _raise_flags(call, FLAGS, returned - 1 if returned else FAILED)


@njit(nogil=True, cache=True)
def _wait_while(worker, state, looks):  # type: ignore[no-untyped-def]
    for _ in range(looks):
        if _read(worker, STATE) != state:
            return
        _pause()


@njit(nogil=True, cache=True)
def _serve(worker, looks):  # type: ignore[no-untyped-def]
    """Take part in calls until there has been none for `looks` looks, or a caller sleeps until it is told. Is it the former?"""
    _replace_if(worker, STATE, ASLEEP, IDLE)
    while True:
        _wait_while(worker, IDLE, looks)
        if _replace_if(worker, STATE, IDLE, ASLEEP):
            return True
        if _replace_if(worker, STATE, CALLED, RUNNING):
            _take_bands(_read(worker, CALL))
            if _replace(worker, STATE, IDLE) == AWAITED:
                return False


@njit(nogil=True, cache=True)
def _share(call, workers, count, looks, started):  # type: ignore[no-untyped-def]
    """Call workers, if that has not been done, take bands beside them, and wait for those that have begun.

    `DONE`; or `RING`, if workers that were called have to be woken first; or `WAIT`, if one is still busy and will tell.
    """
    if not started:
        asleep = False
        for k in range(count):
            worker = workers + 8 * WORKER * k
            _replace(worker, CALL, call)
            slept = _replace(worker, STATE, CALLED) == ASLEEP
            _replace(worker, SLEPT, np.int64(slept))
            asleep |= slept
        if asleep:
            return RING
    _take_bands(call)
    for k in range(count):
        worker = workers + 8 * WORKER * k
        if _replace_if(worker, STATE, CALLED, IDLE):
            continue  # it has not even begun, and nothing is left to do
        _wait_while(worker, RUNNING, looks)
        if _replace_if(worker, STATE, RUNNING, AWAITED) or _read(worker, STATE) == AWAITED:  # the latter after an interruption
            return WAIT
    return DONE


@cache
def _looks(seconds: float) -> int:
    state = np.zeros(1, np.int64)
    _wait_while(address_of(state), 0, 1)
    start = time.perf_counter()
    _wait_while(address_of(state), 0, 10_000)
    return max(1, int(seconds * 10_000 / (time.perf_counter() - start)))


@cache
def _layout(arguments: int) -> struct.Struct:
    """Of a call's numbers."""
    return struct.Struct(f"=qq48x4q{arguments}q")


class _Team:
    """A thread of the caller's and workers, which take part in one call at a time."""

    def __init__(self) -> None:
        self.call, self.workers = np.zeros(1 << 12, np.int64), np.zeros(MOST_WORKERS * WORKER, np.int64)
        self.block = self.call.data
        self.call_address, self.workers_address = address_of(self.call), address_of(self.workers)
        self.bells: list[threading.Semaphore] = []
        self.told = threading.Semaphore(0)
        self.looks = _looks(AWAKE_S)
        self.held: object = None

    def run(self, code: int, size: int, count: int, arguments: Sequence[Argument], workers: int) -> int:
        """Share the bands of a call out. The flags that any has raised."""
        workers = self._hire(workers)
        self.held = arguments  # must outlive the call, even where the wait for it is interrupted
        numbers = [one if isinstance(one, int) else address_of(one) for one in arguments]
        _layout(len(numbers)).pack_into(self.block, 0, 0, 0, code, size, count, -(-count // size), *numbers)
        try:
            state = _share(self.call_address, self.workers_address, workers, self.looks, False)
            if state != DONE:
                self._go_on(state, workers)
        except BaseException:  # Ctrl-C: workers may still be at it, and asleep or awake; to ring once too often does no harm
            self._go_on(RING, workers)
            self.held = None
            raise
        self.held = None
        return self.block[FLAGS]

    def _hire(self, workers: int) -> int:
        """Start threads that are not there yet, as far as the system gives any; how many there are, up to the number wanted."""
        while len(self.bells) < workers:
            bell, number = threading.Semaphore(0), len(self.bells)
            try:
                threading.Thread(target=self._work, args=(number, bell), name="bisparse", daemon=True).start()
            except RuntimeError:
                return number
            self.bells.append(bell)
        return workers

    def _go_on(self, state: int, workers: int) -> None:
        while state != DONE:
            if state == RING:
                for worker in range(workers):
                    if self.workers[WORKER * worker + SLEPT]:
                        self.bells[worker].release()
            else:
                self.told.acquire()
            state = _share(self.call_address, self.workers_address, workers, self.looks, True)

    def _work(self, worker: int, bell: threading.Semaphore) -> None:
        while True:
            if _serve(self.workers_address + 8 * WORKER * worker, self.looks):
                bell.acquire()
            else:
                self.told.release()


_idle: list[_Team] = []
# Threads do not survive a fork; the child makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


def over_bands(code: Kernel, arguments: Sequence[Argument], count: int, granule: int, worth: int) -> int:
    """Call a kernel on bands that cover ``range(count)``, on up to `torch.get_num_threads` threads; the flags raised.

    Bands start at multiples of `granule` and hold at least `worth` items. Whoever is free takes the next, so a thread that
    wakes late or is interrupted delays nobody; what a band computes does not depend on the threads.
    """
    if count <= 0:
        return 0
    threads = max(1, min(torch.get_num_threads(), count // max(worth, 1), MOST_WORKERS + 1))
    bands = 1 if threads == 1 else min(BANDS_A_THREAD * threads, count // max(worth, 1))
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
        if team.held is None:  # else the wait for the end of an interrupted call was interrupted too
            _idle.append(team)
    if flags & FAILED:
        raise MemoryError("a compiled kernel failed, as where memory ends; its own error is on standard error")
    return flags
