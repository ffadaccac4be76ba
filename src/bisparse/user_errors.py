"""Errors of foreign code (a user's model, a library's loader) as one line with the place they were raised."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

__all__ = ["ends_the_process", "error_in_one_line"]

LONGEST = 300
"""Characters of an error that are shown; some libraries raise pages of text."""
TERMINATED = 128 + 15
"""The exit code of a process that SIGTERM ended."""


def ends_the_process(error: BaseException) -> bool:
    """Whether the error is SIGTERM's exit; any other `SystemExit` is reported, so that no `sys.exit` ends a job silently."""
    return isinstance(error, SystemExit) and error.code == TERMINATED


def error_in_one_line(error: BaseException) -> str:
    """The type of an error, what it says and where it was raised: ``RuntimeError: no such file (mine.py:12)``."""
    if isinstance(error, SyntaxError):
        # It is raised in Python's importer; the error itself has the place in the user's file.
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    text = " ".join(str(error).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 4]} ..."
    place = _place(error)
    return type(error).__name__ + (f": {text}" if text else "") + (f" ({place})" if place else "")


def _place(error: BaseException) -> str:
    """File and line of the innermost frame outside bisparse and installed libraries; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    ours = str(Path(__file__).parents[1])
    own = [frame for frame in frames if not frame.filename.startswith((*installed, ours))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
