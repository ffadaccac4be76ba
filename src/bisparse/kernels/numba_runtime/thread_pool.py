"""Run a kernel on several bands of tiles at once, on the threads that torch's own operators use.

A second pool would compete with torch's for the cores: idle OpenMP threads spin for a while after each operator, so layers that
alternate between the two pools were up to twice as slow as either. So a band is run by whichever thread of torch's OpenMP
team is free. Where torch's OpenMP library cannot be called (it is not GNU's or LLVM's), and in a forked child, whose OpenMP
threads are gone, Python's threads are used.

A kernel is compiled by `kernel` and called as ``kernel(arguments, first, last)`` with the address of its arguments, one int64
each; an array is passed as the address of its first entry (see `array_at`). It returns 1 plus its flags, because compiled code
that fails returns 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from bisparse.kernels.numba_runtime.cache import cached_cfunc, cached_njit
from bisparse.kernels.numba_runtime.llvm import I8, I32, I64

__all__ = ["ARGUMENTS", "Call", "Kernel", "address_of", "array_at", "kernel", "numpy_type", "over_bands", "prepared", "run"]

Kernel = Any  # numba's CFunc
Argument = int | torch.Tensor | np.ndarray[Any, Any]
BANDS_PER_THREAD = 4

# A call: the next band and the flags raised so far, which threads write and which have a cache line of their own, 8 numbers
# wide; constants; the kernel's arguments.
NEXT, FLAGS, CODE, SIZE, COUNT, BANDS, ARGUMENTS = 0, 1, 8, 9, 10, 11, 12
UNUSED = (0,) * CODE
FAILED = 1 << 62
"""The flag of a kernel that failed."""


def _place(b: Any, address: Any, index: Any) -> Any:
    return b.inttoptr(b.add(address, b.mul(index, ir.Constant(I64, 8))), I64.as_pointer())


@intrinsic
def _increase(typing: Any, address: Any, index: Any) -> Any:
    """Add 1 to the number at `address[index]` atomically; returns the previous number."""

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
def _call(typing: Any, code: Any, arguments: Any, first: Any, last: Any) -> Any:
    """Call the kernel at an address with ``(arguments, first, last)``."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.call(b.inttoptr(args[0], ir.FunctionType(I64, [I64] * 3).as_pointer()), args[1:])

    return types.int64(*(types.int64,) * 4), codegen


@intrinsic
def _on_team(typing: Any, parallel: Any, function: Any, argument: Any, threads: Any) -> Any:
    """``GOMP_parallel(function, argument, threads, 0)``: run a function on the threads of the caller's OpenMP team."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        type_ = ir.FunctionType(ir.VoidType(), [I64, I64, I32, I32])
        b.call(b.inttoptr(args[0], type_.as_pointer()), [args[1], args[2], b.trunc(args[3], I32), ir.Constant(I32, 0)])
        return context.get_dummy_value()

    return types.none(*(types.int64,) * 4), codegen


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
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype.type


def kernel(function: Callable[[int, int, int], int]) -> Kernel:
    """Compile a kernel, or load it from numba's cache."""
    return cached_cfunc("int64(int64, int64, int64)", function)


@cached_njit()
def _take_bands(call):  # type: ignore[no-untyped-def]
    """Run bands of a call until none is left."""
    numbers = array_at(call, (ARGUMENTS,), np.int64)
    code, size, count, bands = numbers[CODE], numbers[SIZE], numbers[COUNT], numbers[BANDS]
    while True:
        band = _increase(call, NEXT)
        if band >= bands:
            return
        returned = _call(code, call + 8 * ARGUMENTS, band * size, min((band + 1) * size, count))
        if returned != 1:
            _raise_flags(call, FLAGS, returned - 1 if returned else FAILED)


@cached_njit()
def _share(parallel, member, call, threads):  # type: ignore[no-untyped-def]
    """Run the bands of a call on an OpenMP team of so many threads."""
    _on_team(parallel, member, call, threads)


@cache
def _team() -> tuple[int, int]:
    """Addresses of the OpenMP function that runs a team, and of a function for its threads; zeros where there is none."""
    try:
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        found = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD).GOMP_parallel  # of the library that torch itself was linked to
    except (OSError, AttributeError):
        return 0, 0

    def member(call):  # type: ignore[no-untyped-def]
        _take_bands(call)

    return ctypes.cast(found, ctypes.c_void_p).value or 0, cached_cfunc("void(int64)", member).address


@cache
def _call_type(arguments: int) -> type[ctypes.Array[ctypes.c_int64]]:
    return ctypes.c_int64 * (ARGUMENTS + arguments)


_forked = False
_executor: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked, _executor
    _forked, _executor = True, None  # neither OpenMP's threads nor Python's survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _on_python_threads(call: ctypes.Array[ctypes.c_int64], held: object, threads: int) -> None:
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(thread_name_prefix="bisparse")

    def work(_: object) -> None:  # a thread that begins late, after an interruption, must not find freed memory
        _take_bands(ctypes.addressof(call))

    started: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # the system refuses more threads, or the interpreter is about to exit
        started.extend(_executor.submit(work, held) for _ in range(threads - 1))
    work(held)
    wait(started)


class Call(NamedTuple):
    """A kernel with its arguments and bands, ready to run."""

    numbers: ctypes.Array[ctypes.c_int64]
    """See `NEXT` and the following; the kernel's arguments begin at `ARGUMENTS`."""
    threads: int
    """1 to run it on the calling thread alone."""

    def copy(self) -> Call:
        """A copy with its own numbers, to run at the same time or with other arguments."""
        return Call(type(self.numbers).from_buffer_copy(self.numbers), self.threads)


def prepared(code: Kernel, arguments: Sequence[int], count: int, granule: int, min_items: int) -> Call:
    """A call of `over_bands` as numbers, for callers that run it more than once; `count` is at least 1."""
    threads = max(1, min(torch.get_num_threads(), count // max(min_items, 1)))
    bands = 1 if threads == 1 else min(BANDS_PER_THREAD * threads, count // max(min_items, 1))
    size = -(-count // (bands * granule)) * granule
    return Call(_call_type(len(arguments))(*UNUSED, code.address, size, count, -(-count // size), *arguments), threads)


def run(call: Call, held: object) -> int:
    """Run a call once; returns the flags raised.

    Args:
        held: what owns the memory of the call's arguments; kept alive until no thread works on it.

    Raises:
        MemoryError: the kernel failed.
    """
    numbers, threads = call
    parallel, member = (0, 0) if threads == 1 or _forked else _team()
    if threads == 1:
        _take_bands(ctypes.addressof(numbers))
    elif parallel:
        # All of the team: OpenMP would end the threads that a smaller one does not need, and torch would start them again.
        _share(parallel, member, ctypes.addressof(numbers), torch.get_num_threads())
    else:
        _on_python_threads(numbers, held, threads)
    flags: int = numbers[FLAGS]
    if flags & FAILED:
        raise MemoryError("a compiled kernel failed, probably out of memory; its own error is on standard error")
    return flags


def over_bands(code: Kernel, arguments: Sequence[Argument], count: int, granule: int, min_items: int) -> int:
    """Call a kernel on bands that cover ``range(count)``, on up to `torch.get_num_threads` threads; the flags raised.

    Bands start at multiples of `granule`; `min_items` is the least work per thread. Each free thread takes the next band, so
    one that wakes late delays no other. The result of a band does not depend on the number of threads.

    Raises:
        MemoryError: a kernel failed.
    """
    if count <= 0:
        return 0
    numbers = [one if isinstance(one, int) else address_of(one) for one in arguments]
    return run(prepared(code, numbers, count, granule, min_items), arguments)
