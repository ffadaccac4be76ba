"""Bands of work on several threads: all of them, once each, whatever the threads do."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bisparse.kernels import threads
from bisparse.kernels.threads import over_bands


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_call() -> set[int]:
    names = set()

    def kernel(first: int, last: int) -> int:
        names.add(threading.get_ident())
        busy(0.02)
        return 0

    over_bands(kernel, 16, 1, 1)
    return names


def busy(seconds: float) -> None:
    """Take time without the GIL, as a kernel does."""
    time.sleep(seconds)


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
@pytest.mark.parametrize("granule", [1, 8])
def test_bands_cover_everything_once(count: int, granule: int) -> None:
    taken: list[tuple[int, int]] = []
    over_bands(lambda first, last: taken.append((first, last)) or 0, count, granule, 1)
    assert sorted(index for first, last in taken for index in range(first, last)) == list(range(count))
    assert all(first % granule == 0 for first, _ in taken)


def test_both_threads_take_part_and_every_result_comes_back() -> None:
    assert sum(over_bands(lambda first, last: last - first, 100, 1, 1)) == 100
    assert len(threads_of_a_call()) == 2


def test_a_worker_that_has_gone_to_sleep_is_woken() -> None:
    for pause in (0.0, 10 * threads.AWAKE_S, 0.05):
        time.sleep(pause)
        assert len(threads_of_a_call()) == 2, f"after a pause of {pause} s"


def test_a_long_band_of_the_worker_is_waited_for() -> None:
    caller = threading.get_ident()
    done = []

    def kernel(first: int, last: int) -> int:
        busy(0.02 if threading.get_ident() == caller else 0.1)
        done.append(first)
        return 0

    results = over_bands(kernel, 2, 1, 1)
    assert sorted(done) == [0, 1] and len(results) == 2


@pytest.mark.parametrize("where", ["caller", "worker"])
def test_an_error_in_either_thread_reaches_the_caller(where: str) -> None:
    caller = threading.get_ident()

    def kernel(first: int, last: int) -> int:
        busy(0.005)
        if (threading.get_ident() == caller) == (where == "caller"):
            raise RuntimeError("of a kernel")
        return 0

    with pytest.raises(RuntimeError, match="of a kernel"):
        over_bands(kernel, 16, 1, 1)
    assert sum(over_bands(lambda first, last: last - first, 16, 1, 1)) == 16


def test_calls_from_several_threads_at_once_do_not_mix() -> None:
    sums: dict[int, list[int]] = {}

    def caller(size: int) -> None:
        sums[size] = [sum(over_bands(lambda first, last: busy(0.0002) or last - first, size, 1, 1)) for _ in range(20)]

    callers = [threading.Thread(target=caller, args=(size,)) for size in (10, 100, 1000)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert sums == {size: [size] * 20 for size in (10, 100, 1000)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    over_bands(lambda first, last: 0, 16, 1, 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if len(threads_of_a_call()) == 2 else 1)
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
