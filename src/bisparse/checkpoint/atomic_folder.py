"""An output folder that is either absent or complete, even if the process is killed.

Everything is written into a new hidden folder next to the target, ``.TARGET.bisparse-RANDOM``, forced to disk, and renamed:

* `output` is what becomes the target;
* `previous` is the old target, where two names cannot be exchanged in one step and it has to be moved out of the way;
* `bisparse-temporary` marks the folder as bisparse's, and contains the name of the target.

A folder that a killed process left behind is removed by the next run with the same target, after its `previous` was restored.
So is an empty folder of such a name, left by a kill before the mark was written. Other folders without the mark are never
touched. A lock, which the system releases when a process dies, distinguishes leftovers from the folder of a running job.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bisparse.arguments import check_flag
from bisparse.atomic_file import explained
from bisparse.errors import CheckpointError
from bisparse.folder_lock import lock_folder

__all__ = ["PLAIN", "QUANTIZATION", "SIDECAR", "check_room", "check_target", "check_writable", "output_folder", "written_here"]

MARK, OUTPUT, PREVIOUS = "bisparse-temporary", "output", "previous"
SIDECAR, QUANTIZATION = "bisparse.json", "bisparse-quantization.json"
"""The files that mark folders of pruned and of quantised weights."""
PLAIN = "bisparse-plain.json"
"""The file that marks a folder of plain weights, which has no sidecar."""
RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100
ATTEMPTS = 20
"""New folders that are made until one can be locked."""


@contextmanager
def output_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error, and is removed otherwise.

    Args:
        overwrite: replace an existing target, if it is empty or bisparse wrote it (see `written_here`); atomically on Linux,
            by two renames on other systems.

    Raises:
        CheckpointError: the target exists, cannot be written, another run is writing it, or the disk is full.
    """
    given, target = target, Path(os.path.realpath(target))
    hidden: Path | None = None
    lock: int | None = None
    # Errors name paths below the target, not below this folder.
    temporary = target
    leftovers: list[tuple[Path, int | None]] = []
    try:
        leftovers = _leftovers(target)
        _restore(target, [folder for folder, _ in leftovers])
        check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden, lock = _locked_hidden(target)
        temporary = hidden / OUTPUT
        (hidden / MARK).write_text(_mark(target), encoding="utf-8")
        temporary.mkdir()
        _remove([folder for folder, held in leftovers if held is not None])
        _remove_empty(target)
        _unlock(leftovers)
        yield temporary
        _flush(temporary)
        check_target(target, overwrite)
        _publish(temporary, target)
    except OSError as error:
        raise _explained(error, given, temporary) from error
    except CheckpointError as error:
        if not error.path.is_relative_to(temporary):
            raise
        path = _as_given(error.path, given, temporary)
        raise CheckpointError(path, error.problem, error.remedy, tensor=error.tensor) from error
    finally:
        # A previous output that could not be restored is not removed.
        try:
            if hidden is not None and (not (hidden / PREVIOUS).exists() or os.path.lexists(target)):
                _remove_tree(hidden, ignore_errors=True)
        finally:
            _unlock([*leftovers, (target, lock)])


def written_here(folder: Path) -> bool:
    """Whether a folder may be replaced: it is empty, or a file in it says that bisparse wrote it, whichever command did."""
    if not folder.is_dir():
        return False
    marked = any(_says(folder / one, {"schema_version", "layers"}) for one in (SIDECAR, QUANTIZATION))
    return marked or _says(folder / PLAIN, {"schema_version", "written_by"}) or not any(folder.iterdir())


def _says(path: Path, keys: set[str]) -> bool:
    """Whether a file contains a JSON object with these keys."""
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= content.keys()


def check_room(folder: Path, needed: int) -> None:
    """Check that there is enough disk space, before anything is written.

    Raises:
        CheckpointError: fewer than `needed` bytes are free.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            folder, f"needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free", "free some or choose another disk"
        )


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a target may be written, like `output_folder`; for long jobs, before they start.

    Raises:
        CheckpointError: the target exists and may not be replaced.
    """
    check_flag("overwrite", overwrite)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointError(target, "exists already", "choose another name, or pass overwrite (--overwrite)")
    if not written_here(target):
        raise CheckpointError(
            target,
            f"was not written by bisparse (it has no valid {SIDECAR}, {QUANTIZATION} or {PLAIN})",
            "remove it yourself or choose another name; it is not replaced",
        )


def check_writable(target: Path) -> None:
    """Check that a target can be written, by writing next to it; for long jobs, before they start.

    Raises:
        CheckpointError: there is a file where a folder is needed, no permission, or no room.
    """
    existing = next(parent for parent in Path(os.path.realpath(target)).parents if os.path.lexists(parent))
    if not existing.is_dir():
        raise CheckpointError(existing, "is a file, where a folder is needed", f"choose another place than {target}")
    try:
        _make_hidden(existing, target).rmdir()
    except OSError as error:
        raise _explained(error, target, target) from error


def _make_hidden(folder: Path, target: Path) -> Path:
    """Create a folder that only its owner can access."""
    try:
        return Path(tempfile.mkdtemp(prefix=_prefix(target), dir=folder))
    except OSError as error:
        error.filename = str(target)
        raise


def _locked_hidden(target: Path) -> tuple[Path, int | None]:
    """A new hidden folder and its lock.

    Raises:
        CheckpointError: other runs take each new folder, which is empty at first, for a leftover.
    """
    for _ in range(ATTEMPTS):
        hidden = _make_hidden(target.parent, target)
        try:
            lock = lock_folder(hidden)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            with suppress(OSError):
                hidden.rmdir()
            continue
        if hidden.is_dir():
            return hidden, lock
        _unlock([(hidden, lock)])
    raise CheckpointError(target, "cannot be locked", "check whether other processes or programs hold new folders there")


def _prefix(target: Path) -> str:
    return f".{target.name}.bisparse-"


def _mark(target: Path) -> str:
    return f"bisparse writes {json.dumps(target.name)} here; if no such process runs, this folder can be deleted\n"


def _as_given(path: Path, target: Path, hidden: Path) -> Path:
    """The path below the target for a path below the hidden folder."""
    return target / path.relative_to(hidden) if path.is_relative_to(hidden) else path


def _leftovers(target: Path) -> list[tuple[Path, int | None]]:
    """The folders that killed runs with this target left behind, each with its acquired lock, if the system has locks.

    Raises:
        CheckpointError: one of them is still being written.
    """
    found: list[tuple[Path, int | None]] = []
    for folder in target.parent.iterdir() if target.parent.is_dir() else ():
        if not folder.name.startswith(_prefix(target)) or not _is_ours(folder, target):
            continue
        try:
            lock = lock_folder(folder)
        except BlockingIOError as error:
            _unlock(found)
            raise CheckpointError(
                target, f"is being written by another process, in {folder}", "wait for it or choose another name"
            ) from error
        except FileNotFoundError:
            continue  # the other process has just finished
        found.append((folder, lock))
    return found


def _is_ours(folder: Path, target: Path) -> bool:
    mark = folder / MARK
    if folder.is_symlink() or mark.is_symlink() or not mark.is_file():
        return False
    return mark.read_bytes() == _mark(target).encode()


def _unlock(locked: list[tuple[Path, int | None]]) -> None:
    while locked:
        if (lock := locked.pop()[1]) is not None:
            os.close(lock)


def _restore(target: Path, leftovers: list[Path]) -> None:
    """Undo a replacement that was killed between its two renames."""
    for folder in leftovers:
        if (folder / PREVIOUS).is_dir() and not os.path.lexists(target):
            os.rename(folder / PREVIOUS, target)


def _remove(leftovers: list[Path]) -> None:
    """Remove leftovers, except a previous output that could not be restored."""
    for folder in leftovers:
        if not ((folder / PREVIOUS).exists() and (folder / OUTPUT).exists()):
            _remove_tree(folder)


def _remove_tree(folder: Path, *, ignore_errors: bool = False) -> None:
    """Remove a hidden folder, its mark last, so that what a kill leaves is marked or empty."""
    for content in (folder / OUTPUT, folder / PREVIOUS):
        if content.is_dir() and not content.is_symlink():
            shutil.rmtree(content, ignore_errors=ignore_errors)
    shutil.rmtree(folder, ignore_errors=ignore_errors)


def _remove_empty(target: Path) -> None:
    """Remove empty folders that runs with this target left when they were killed before they wrote the mark."""
    for folder in target.parent.iterdir():
        if not folder.name.startswith(_prefix(target)) or folder.is_symlink():
            continue
        with suppress(OSError):  # no folder, not empty, held by the run that has just made it, or no longer there
            if not any(folder.iterdir()) and (lock := lock_folder(folder)) is not None:
                try:
                    folder.rmdir()
                finally:
                    os.close(lock)


def _flush(folder: Path) -> None:
    """Sync every file and folder below `folder` to disk."""
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
        previous = temporary.with_name(PREVIOUS)
        os.rename(target, previous)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(previous, target)
            raise
    _fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; returns False if the system or file system cannot."""
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
    return explained(error, _as_given(Path(error.filename or target), target, hidden))
