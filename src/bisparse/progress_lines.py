"""Progress where no terminal shows a bar, such as in a batch job's log: plain lines with the time."""

from __future__ import annotations

import sys
import time

from bisparse.errors import printable

__all__ = ["ProgressLines"]

EVERY_S = 10.0


class ProgressLines:
    """A function (what, done, total) that prints a line to standard error: at the start, every ten seconds, and at the end.

    A line is ASCII without control characters, whatever the name of what is being done: ``2026-01-31 12:00:00  40 %  layer``.
    """

    def __init__(self, heading: str = "") -> None:
        self._heading = heading
        self._next = 0.0
        self._ended = False

    def __call__(self, what: str, done: int, total: int) -> None:
        ends, now = total > 0 and done >= total, time.monotonic()
        if self._ended or (now < self._next and not ends):
            return
        self._next, self._ended = now + EVERY_S, ends
        share = f"{100 * done // total:3d} %" if total > 0 else "  0 %"
        words = "  ".join(one for one in (self._heading, "done" if ends else printable(what)) if one)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {share}  {words}"
        sys.stderr.write(f"{line.rstrip().encode('ascii', 'backslashreplace').decode()}\n")
        sys.stderr.flush()
