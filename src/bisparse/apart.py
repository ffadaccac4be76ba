"""Checks of paths that users name: they can exist, are regular files, and an output never overlaps what it is made from."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from bisparse.errors import CheckpointError

__all__ = ["check_apart", "check_path", "origin_of", "read_text"]


def check_apart(target: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse an output that is, contains or is inside one of its inputs, before anything is written.

    Paths are compared with all links resolved, and existing ones by what they are on disk, so that a second name of a folder
    or a hard link of a file is found too. Files in an input folder may be links into the target: those are found as well.

    Args:
        target: the file or folder to be written; it need not exist.
        inputs: files and folders that are read, by what they are: ``{"source": path}``. None is skipped.

    Raises:
        CheckpointError: they overlap; names both. Or a name is too long.
    """
    here = check_path(target)
    written = {_identity(path): path for path in _files(here)}
    for what, given in inputs.items():
        if given is None:
            continue
        there = check_path(given)
        within, around = _holds(there, here), _holds(here, there)
        if within or around:
            relation = "is" if within and around else "is inside" if within else "contains"
            raise _overlap(target, f"{relation} the {what} {given}, which is never written to or replaced")
        for path in _files(there) if written else ():
            if (same := written.get(_identity(path))) is not None:
                raise _overlap(target, f"and the {what} {given} share a file: {same} and {path} are two names of it")


def check_path(path: str | Path) -> Path:
    """A path with all links resolved, whether or not there is anything.

    Raises:
        CheckpointError: no system could have such a path.
    """
    if not os.fspath(path):  # which Path takes for the current folder
        raise CheckpointError(Path("''"), "is no path (it is empty)", "choose another name")
    try:
        real = Path(os.path.realpath(path))
        os.lstat(real)
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise CheckpointError(Path(repr(str(path))), f"is no path ({error})", "choose another name") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(Path(path), "has a name that is too long", "choose a shorter one") from error
    return real


def read_text(path: str | Path) -> str:
    """The content of a regular file of UTF-8 text; what is no file, such as a pipe, would be waited for.

    Raises:
        CheckpointError: no system could have such a path, or it is a folder, a pipe or a device, or cannot be read.
        FileNotFoundError: there is no such file.
        UnicodeDecodeError: it is not UTF-8 text.
    """
    check_path(path)
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(path, "is no regular file", "name a text file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})", "name a text file") from error


def origin_of(model: nn.Module) -> Path | None:
    """The folder or file that a transformers model was loaded from; None for other models, and where it is not there."""
    name = getattr(model, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and os.path.exists(name) else None


def _overlap(target: str | Path, problem: str) -> CheckpointError:
    return CheckpointError(Path(target), problem, "choose a place that is neither inside it nor around it")


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `inner`, with links resolved, is `outer` or inside it."""
    identity = _identity(outer)
    return any(path == outer or (identity is not None and _identity(path) == identity) for path in (inner, *inner.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    """What a path is on disk, whatever its name; None where there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or the files of a folder; links to nothing left out."""
    if path.is_file():
        yield path
    for root, _, names in os.walk(path):
        yield from (file for name in names if (file := Path(root) / name).is_file())
