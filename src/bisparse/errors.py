"""Errors that several packages raise: of files, and of an extra that is not installed."""

from __future__ import annotations

import unicodedata
from pathlib import Path

__all__ = ["CheckpointError", "install_extra", "printable"]

INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of what moves a cursor, reorders text or cannot be encoded: controls, formats, surrogates, separators."""


def printable(text: str) -> str:
    """Text from outside as a terminal may show it: escape sequences, newlines and the like as ``\\x1b``, ``\\n``.

    >>> print(printable("a\\x1b[31m\\nb"))
    a\\x1b[31m\\nb
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one.encode("unicode_escape").decode() if unicodedata.category(one) in INVISIBLE else one for one in text)


def install_extra(extra: str) -> str:
    """The command that installs one of the extras in pyproject.toml, for error messages. bisparse is installed from a clone."""
    return f"install it with: pip install '.[{extra}]' in your clone of bisparse"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, pruned or written. The message names the file, the problem and what to do."""

    def __init__(self, path: str | Path, problem: str, remedy: str, *, tensor: str = "") -> None:
        self.path, self.problem, self.remedy, self.tensor = Path(path), problem, remedy, tensor
        where = f"{path}: tensor {tensor}" if tensor else f"{path}"
        super().__init__(printable(f"{where} {problem}; {remedy}"))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.path, self.problem, self.remedy, self.tensor)


def _rebuild(path: Path, problem: str, remedy: str, tensor: str) -> CheckpointError:
    return CheckpointError(path, problem, remedy, tensor=tensor)
