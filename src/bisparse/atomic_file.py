"""A file that is either as it was or whole, whenever the process dies; nothing but a regular file is ever replaced."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bisparse.errors import CheckpointError

__all__ = ["PICTURE", "WEB_PAGE", "atomic_file", "check_output_file", "explained", "explaining"]

WEB_PAGE = {"a web page": (b"<!doctype html", b"<html")}
PICTURE = {"a picture": (b"\x89png", b"%pdf", b"<?xml", b"<svg")}
"""What writers make and may replace; see `check_output_file`."""

UNTOUCHED = "nothing was left half written"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """An empty file to write, which becomes `path` when the block ends without an error, and vanishes otherwise.

    Missing parent folders are made. A link is followed: the file that it points to is replaced and the link stays. A file
    that is replaced keeps its permissions.

    Raises:
        ValueError: `path` is a folder, a device, a pipe or a socket; see `check_output_file`.
        CheckpointError: it cannot be written, for example because of its permissions or a full disk; names `path`.
    """
    with explaining(path):
        yield from _atomic_file(path)


@contextmanager
def explaining(path: str | Path) -> Iterator[None]:
    """A context manager that turns the system's errors while `path` is written into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise explained(error, Path(os.fsdecode(error.filename)) if error.filename else Path(path)) from error


def explained(error: OSError, path: Path) -> CheckpointError:
    """What the system said about a path that is written, with what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            problem, remedy = "could not be written: the disk is full or a quota is used up", "free space or choose another disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            problem, remedy = "could not be written: permission denied", "choose a folder that you may write"
        case errno.ENOTDIR | errno.EEXIST:
            problem, remedy = "could not be written: there is a file where a folder is needed", "choose another place"
        case _:
            problem, remedy = f"could not be read or written ({error.strerror or error})", "check the path and the disk"
    return CheckpointError(path, problem, f"{remedy}; {UNTOUCHED}")


def _atomic_file(path: str | Path) -> Iterator[Path]:
    given, target = Path(path), check_output_file(path)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.part")
    created = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # O_EXCL: the name is new, so neither a file nor a link of the user's is opened.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        created = True
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode) & 0o777)
        yield temporary
        check_output_file(target)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)) == temporary:
            error.filename = str(given)
            error.filename2 = None
        raise
    finally:
        if created:
            temporary.unlink(missing_ok=True)


def check_output_file(path: str | Path, *, replaces: Mapping[str, Sequence[bytes]] | None = None) -> Path:
    """The file that writing to `path` would create or replace, links followed; a long job asks before it begins.

    Args:
        replaces: what the writer makes, such as "a web page", with the bytes that such files begin with; a file that begins
            otherwise and is not empty is not replaced. None: any file may be.

    Raises:
        ValueError: `path` is a folder, a device, a pipe, a socket, a link that cannot be followed to a file, or a file that
            `replaces` does not allow to replace.
    """
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        found = path.stat()
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise ValueError(f"{str(path)!r} is no path ({error}); name the file to write") from error
    except FileNotFoundError:
        if os.path.islink(target):
            raise ValueError(f"{path} is a link that cannot be followed; name the file to write") from None
        return target
    except OSError:
        if not os.path.islink(path):
            return target  # writing says what is wrong: no permission, a file where a folder is needed
        raise ValueError(f"{path} is a link that cannot be followed; name the file to write") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder; name the file to write, such as {path / 'report.html'}")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_kind(found.st_mode)}; only a regular file is replaced, name one or a new file")
    # /dev/stdout and /proc/self/fd/1 lead to open files, which may have no name any more.
    if not (target.exists() and os.path.samestat(found, target.stat())):
        raise ValueError(f"{path} is an open file without a name; name the file to write")
    if replaces and found.st_size and not _begins(target, itertools.chain.from_iterable(replaces.values())):
        raise ValueError(f"{path} exists and is not {' or '.join(replaces)}, so it is not replaced: name another file")
    return target


def _begins(path: Path, starts: Iterable[bytes]) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return False
    return any(head.startswith(one.lower()) for one in starts)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "no regular file"
