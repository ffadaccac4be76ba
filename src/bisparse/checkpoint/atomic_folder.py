"""An output folder that is either absent or whole, whenever the process dies.

Everything is written into a hidden folder beside the target, forced to disk, and renamed. The folder's name starts with
``.TARGET.bisparse-``; one that a killed process left behind is removed by the next run with the same target. A lock on it,
which the system drops when a process dies, tells it from the folder of a run that is still going.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bisparse.errors import CheckpointError

__all__ = ["check_room", "check_target", "check_writable", "output_folder", "written_here"]

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100


@contextmanager
def output_folder(target: Path, *, overwrite: bool, ours: str) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error, and vanishes otherwise.

    Args:
        overwrite: an existing target is replaced, in one step where the system can exchange two names (Linux), in two
            renames elsewhere. Only an empty folder or one that holds a file named `ours` is.

    Raises:
        CheckpointError: the target exists, cannot be written, another run is writing it, or the disk is full.
    """
    given, target = target, Path(os.path.realpath(target))
    temporary = _hidden(target.parent, target)
    try:
        _restore(target)
        check_target(target, overwrite, ours)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        temporary.mkdir()
    except OSError as error:
        raise _explained(error, given, temporary) from error
    lock = _lock(temporary)
    try:
        yield temporary
        _flush(temporary)
        check_target(target, overwrite, ours)
        _publish(temporary, target)
    except OSError as error:
        raise _explained(error, given, temporary) from error
    except CheckpointError as error:
        if not error.path.is_relative_to(temporary):
            raise
        path = _as_given(error.path, given, temporary)
        raise CheckpointError(path, error.problem, error.remedy, tensor=error.tensor) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def written_here(folder: Path, ours: str) -> bool:
    """Whether a folder may be replaced: it is empty, or holds the file `ours`."""
    return folder.is_dir() and ((folder / ours).is_file() or not any(folder.iterdir()))


def check_room(folder: Path, needed: int) -> None:
    """Refuse, before anything is written, a job whose output cannot fit the disk.

    Raises:
        CheckpointError: fewer than `needed` bytes are free.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            folder, f"needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free", "free some or choose another disk"
        )


def check_target(target: Path, overwrite: bool, ours: str) -> None:
    """Refuse a target that may not be written, as `output_folder` does; a long job asks before it begins.

    Raises:
        CheckpointError: the target exists, and `overwrite` does not allow to replace it.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointError(target, "exists already", "choose another name, or pass overwrite (--overwrite)")
    if not written_here(target, ours):
        raise CheckpointError(
            target,
            f"was not written by bisparse (it holds no {ours})",
            "remove it yourself or choose another name; it is not replaced",
        )


def check_writable(target: Path) -> None:
    """Refuse a target in a place where nothing can be written, by trying it; a long job asks before it begins.

    Raises:
        CheckpointError: there is a file where a folder is needed, no permission, or no room.
    """
    existing = next(parent for parent in Path(os.path.realpath(target)).parents if os.path.lexists(parent))
    if not existing.is_dir():
        raise CheckpointError(existing, "is a file, where a folder is needed", f"choose another place than {target}")
    probe = _hidden(existing, target)
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise _explained(error, target, probe) from error


def _hidden(folder: Path, target: Path) -> Path:
    """A name for what is to become the target."""
    return folder / f".{target.name}.bisparse-{secrets.token_hex(4)}"


def _as_given(path: Path, target: Path, hidden: Path) -> Path:
    """The path by which the user knows what stands below a hidden folder."""
    return target / path.relative_to(hidden) if path.is_relative_to(hidden) else path


def _lock(folder: Path) -> int | None:
    """Hold a folder for this process; None where the system or file system has no such locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_stale(target: Path) -> None:
    for left in target.parent.glob(f".{_escaped(target.name)}.bisparse-*"):
        try:
            lock = _lock(left)
        except BlockingIOError as error:
            raise CheckpointError(
                target, f"is being written by another process, in {left}", "wait for it or choose another name"
            ) from error
        except FileNotFoundError:
            continue  # that process has just finished
        if lock is not None:
            shutil.rmtree(left)
            os.close(lock)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _restore(target: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if _aside(target).exists():
        if target.exists():
            shutil.rmtree(_aside(target))
        else:
            os.rename(_aside(target), target)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _flush(folder: Path) -> None:
    """Force every file and folder name below `folder` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        os.rename(target, _aside(target))
        os.rename(temporary, target)
        shutil.rmtree(_aside(target))
    _fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _explained(error: OSError, target: Path, hidden: Path) -> CheckpointError:
    path = _as_given(Path(error.filename or target), target, hidden)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            problem, remedy = "could not be written: the disk is full or a quota is used up", "free space or choose another disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            problem, remedy = "could not be written: permission denied", "choose a folder that you may write"
        case _:
            problem, remedy = f"could not be read or written ({error.strerror or error})", "check the path and the disk"
    return CheckpointError(path, problem, f"{remedy}; nothing was left half written")
