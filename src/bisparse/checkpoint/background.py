"""Writing a piece of a file on a thread, while the next one is read and worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

__all__ = ["InBackground"]

WAITING = 2
"""Calls that may be unfinished at once; each keeps its data in memory."""


class InBackground:
    """Makes calls one after another on one thread.

    Inside a ``with`` block, `call` returns at once unless `WAITING` calls are unfinished. The error of a call is raised by a
    later `call` or at the end of the block, which waits for all calls; those behind it may run all the same. If the block raises,
    calls that have not started are left out, and errors of calls are not reported. While Python shuts down, when no thread can be
    started, calls are made at once.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._behind: deque[Future[None]] = deque()

    def call(self, function: Callable[[], None]) -> None:
        """Make this call after those before it."""
        while len(self._behind) >= WAITING or (self._behind and self._behind[0].done()):
            self._behind.popleft().result()
        try:
            self._behind.append(self._pool.submit(function))
        except RuntimeError:  # Python shuts down
            while self._behind:
                self._behind.popleft().result()
            function()

    def __enter__(self) -> InBackground:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            while kind is None and self._behind:
                self._behind.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
