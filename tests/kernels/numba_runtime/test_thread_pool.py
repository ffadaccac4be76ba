"""Bands of work on several threads: all of them, once each, whatever the threads do."""

import _thread
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bisparse.kernels.numba_runtime import thread_pool as pool
from bisparse.kernels.numba_runtime.thread_pool import _increase, array_at, kernel, over_bands

MEETING = 1 << 32
"""How often a band looks for another one: for more than ten seconds, as busy machines need."""
LONG = 1 << 22


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    # A job in the background of a shell starts with interruptions ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "Python"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once on torch's threads, and once as where they cannot be used."""
    if request.param == "OpenMP" and not pool._team()[0]:
        pytest.skip("torch's OpenMP library cannot be called here")
    if request.param == "Python":
        monkeypatch.setattr(pool, "_team", lambda: (0, 0))
    return str(request.param)


pytestmark = pytest.mark.usefixtures("threads_of")


@kernel
def count_visits(arguments, first, last):  # type: ignore[no-untyped-def]
    """Arguments: visits, starts; their number. Each band raises a flag of its own, of 32."""
    visits, starts, count = array_at(arguments, (3,), np.int64)
    for index in range(first, last):
        array_at(visits, (count,), np.int64)[index] += 1
    array_at(starts, (count,), np.int64)[first] = 1
    return 1 + (1 << first % 32)


@kernel
def meet(arguments, first, last):  # type: ignore[no-untyped-def]
    """Wait until another band has begun as well; then, in the band that starts at `long`, for longer. A flag if they never met.

    Arguments: met, done, looked; how often to look for the other band, `long`, how often to look more.
    """
    met, done, looked, patience, long, more = array_at(arguments, (6,), np.int64)
    _increase(met, 0)
    alone = 1
    for _ in range(patience):
        _increase(looked, 0)
        if array_at(met, (1,), np.int64)[0] > 1:
            alone = 0
            break
    if first == long:
        for _ in range(more):
            _increase(looked, 0)
    _increase(done, 0)
    return 1 + alone


@kernel
def fail(arguments, first, last):  # type: ignore[no-untyped-def]
    """Fail in the band that starts at the argument."""
    if array_at(arguments, (1,), np.int64)[0] == first:
        raise ValueError("of a kernel")
    return 1


def they_meet(long: int = -1, more: int = LONG) -> bool:
    """Whether two threads take part, and both bands are done on return."""
    met, done, looked = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    alone = over_bands(meet, (met, done, looked, MEETING, long, more), 2, 1, 1)
    return not alone and done[0] == 2


def visit(count: int, granule: int = 1) -> tuple[np.ndarray, np.ndarray, bool]:
    """How often each item was visited; where bands started; whether the flags are those of the bands."""
    visits, starts = np.zeros(count, np.int64), np.zeros(count, np.int64)
    flags = over_bands(count_visits, (visits, starts, count), count, granule, 1)
    return visits, starts, {k for k in range(63) if flags >> k & 1} == set((starts.nonzero()[0] % 32).tolist())


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("number", [1, 2, 3, 70])
def test_bands_cover_everything_once(count: int, granule: int, number: int) -> None:
    torch.set_num_threads(number)
    visits, starts, flags_of_all = visit(count, granule)
    assert (visits == 1).all() and flags_of_all
    assert all(first % granule == 0 for first in starts.nonzero()[0])


def test_nothing_to_do() -> None:
    assert over_bands(count_visits, (np.zeros(0, np.int64), np.zeros(0, np.int64), 0), 0, 1, 1) == 0


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.05, 0.3])
def test_both_threads_take_part(pause: float) -> None:
    """Also after a pause in which the threads have gone to sleep."""
    time.sleep(pause)
    assert they_meet()


@pytest.mark.parametrize("long", [0, 1])
def test_a_long_band_is_waited_for(long: int) -> None:
    for _ in range(3):
        assert they_meet(long)
        visits, _, flags_of_all = visit(100)
        assert (visits == 1).all() and flags_of_all


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", [0, 6, 14])
def test_a_kernel_that_fails_is_an_error_of_the_caller(where: int) -> None:
    with pytest.raises(MemoryError, match="a compiled kernel failed"):
        over_bands(fail, (where,), 16, 2, 1)
    assert over_bands(fail, (-1,), 16, 2, 1) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruptions_at_any_moment_lose_no_band() -> None:
    they_meet()
    visits, starts = np.zeros(64, np.int64), np.zeros(64, np.int64)
    calls = 0
    for index in range(150):
        timer = threading.Timer(1e-5 * (index % 50), _thread.interrupt_main)
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            while timer.is_alive():
                over_bands(count_visits, (visits, starts, 64), 64, 1, 1)
                calls += 1
            for _ in range(1000):  # it comes between two steps of Python, if it is not lost in a callback of the collector
                over_bands(count_visits, (visits, starts, 64), 64, 1, 1)
                calls += 1
        timer.join()
    over_bands(count_visits, (visits, starts, 64), 64, 1, 1)  # on a busy machine all others may have been interrupted
    assert (visits >= calls + 1).all()
    assert they_meet()


def test_what_an_interrupted_call_works_on_outlives_it(threads_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may still write when its caller is interrupted, so the call's arrays stay until it is done."""
    if threads_of == "OpenMP":
        pytest.skip("calls of OpenMP are interrupted only once they are over")
    caller, take = threading.current_thread(), pool._take_bands
    began, may_end = threading.Event(), threading.Event()

    def take_late(call: int) -> None:
        if threading.current_thread() is caller:
            assert began.wait(60)
            signal.raise_signal(signal.SIGINT)
        began.set()
        assert may_end.wait(60)
        take(call)

    monkeypatch.setattr(pool, "_take_bands", take_late)
    visits, starts = np.zeros(64, np.int64), np.zeros(64, np.int64)
    alive, visited = weakref.ref(starts), visits[:]
    with pytest.raises(KeyboardInterrupt):
        over_bands(count_visits, (visits, starts, 64), 64, 1, 1)
    del starts
    gc.collect()
    assert alive() is not None
    may_end.set()
    for _ in range(6000):
        if alive() is None:
            break
        time.sleep(0.01)
    assert alive() is None and (visited == 1).all()


def test_fewer_threads_where_the_system_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_team", lambda: (0, 0))
    monkeypatch.setattr(pool, "_executor", None)

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        assert (visit(100)[0] == 1).all()
    assert (visit(100)[0] == 1).all() and they_meet()


def test_calls_from_several_threads_at_once_do_not_mix() -> None:
    wrong: list[int] = []

    def caller(count: int) -> None:
        for _ in range(200):
            visits, _, flags_of_all = visit(count)
            if not (visits == 1).all() or not flags_of_all:
                wrong.append(count)

    callers = [threading.Thread(target=caller, args=(count,)) for count in (10, 100, 1000)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_uses_threads_of_its_own() -> None:
    """OpenMP's threads do not survive a fork, and a child that waited for them would hang."""
    visit(16)
    child = os.fork()
    if child == 0:
        os._exit(0 if they_meet() else 1)
    for _ in range(500):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_torch_and_kernels_share_their_threads(threads_of: str) -> None:
    """As many threads after torch's operators and ours in turns as after torch's alone; a process of its own counts them."""
    if threads_of != "OpenMP" or not os.path.exists("/proc/self/task"):
        pytest.skip("about torch's threads, on a system that counts them")
    code = """
import os, torch, bisparse
x = torch.rand(1024, 1024)
torch.set_num_threads(1)
bisparse.solve(x, "2:4-T")  # imports, which start threads of other libraries
torch.set_num_threads(2)
x @ x
before = len(os.listdir("/proc/self/task"))
bisparse.solve(x, "2:4-T")
x @ x
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0
