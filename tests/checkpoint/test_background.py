"""Calls on a thread of their own: in order, with their errors, and none left running."""

import threading

import pytest

from bisparse.checkpoint.background import WAITING, InBackground


def fail() -> None:
    raise OSError("no space")


def test_calls_are_made_in_order_and_all_of_them_before_the_end() -> None:
    seen: list[int] = []
    with InBackground() as background:
        for number in range(100):
            background.call(lambda number=number: seen.append(number))
    assert seen == list(range(100))


def test_no_more_than_so_many_calls_wait() -> None:
    go, finished = threading.Event(), threading.Event()

    def caller() -> None:
        with InBackground() as background:
            for _ in range(WAITING + 1):
                background.call(lambda: bool(go.wait(30)))
            finished.set()

    thread = threading.Thread(target=caller)
    thread.start()
    assert not finished.wait(0.2)
    go.set()
    thread.join(30)
    assert finished.is_set()


def test_an_error_is_raised_by_a_later_call_or_at_the_end() -> None:
    seen: list[str] = []
    with pytest.raises(OSError, match="no space"), InBackground() as background:
        background.call(fail)
        for _ in range(WAITING + 1):
            background.call(lambda: seen.append("after"))
        seen.append("not reached")
    assert "not reached" not in seen
    with pytest.raises(OSError, match="no space"), InBackground() as background:
        background.call(fail)


def test_an_error_of_the_block_is_raised_when_the_call_that_runs_has_ended() -> None:
    threads = threading.active_count()
    seen: list[str] = []
    started, go = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        go.wait(30)
        seen.append("first")

    with pytest.raises(KeyboardInterrupt), InBackground() as background:
        background.call(slow)
        background.call(lambda: seen.append("second"))
        started.wait(30)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt
    assert seen == ["first"]
    assert threading.active_count() <= threads


def test_calls_are_made_at_once_while_python_shuts_down() -> None:
    seen: list[int] = []
    with InBackground() as background:
        background.call(lambda: seen.append(0))
        background._pool.shutdown(wait=False)  # as the interpreter does: no call can be submitted from then on
        background.call(lambda: seen.append(1))
        assert seen == [0, 1]
