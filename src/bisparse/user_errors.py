"""Errors of code that is not ours, a user's model or a library's loader, told in one line with the place they came from."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

__all__ = ["ends_the_process", "told"]

LONGEST = 300
"""Characters of an error that are shown; libraries answer with whole pages."""
TERMINATED = 128 + 15
"""The exit code of a process that SIGTERM ended."""


def ends_the_process(error: BaseException) -> bool:
    """Whether it is a signal that ends the process, and no error: a `sys.exit` of the user's would end the job without a word."""
    return isinstance(error, SystemExit) and error.code == TERMINATED


def told(error: BaseException) -> str:
    """The type of an error, what it says and where it was raised: ``RuntimeError: no such file (mine.py:12)``."""
    if isinstance(error, SyntaxError):
        # Where it was raised is in Python's importer; where it is, it says itself.
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    text = " ".join(str(error).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 4]} ..."
    place = _place(error)
    return type(error).__name__ + (f": {text}" if text else "") + (f" ({place})" if place else "")


def _place(error: BaseException) -> str:
    """File and line, of the innermost frame that is neither ours nor an installed library's if there is one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    ours = str(Path(__file__).parents[1])
    own = [frame for frame in frames if not frame.filename.startswith((*installed, ours))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
