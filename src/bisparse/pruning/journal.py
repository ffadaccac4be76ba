"""A journal of a pruning job: original tensors for a rollback, and finished layers to resume from.

One safetensors file per layer, in a folder that one process locks at a time. Files are written under another name and renamed,
so they are always complete. Each file names its layer and job and has a digest of its content, so files that were damaged, or
copied from elsewhere, are refused. Only files with the journal's own names are ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bisparse.apart import check_path, read_text
from bisparse.atomic_file import atomic_file
from bisparse.errors import CheckpointError, printable
from bisparse.folder_lock import lock_folder

__all__ = ["Journal", "JournalError", "JournaledFit", "remove_journal"]

ABOUT = "about.json"
DIGEST = "sha256"
OURS = re.compile(r"(dense|done|block|fit)-[0-9a-f]{24}\.safetensors")
UNFINISHED = re.compile(rf"\.({OURS.pattern}|about\.json)\.[0-9a-f]{{16}}\.part")
"""Pattern of the temporary files that `atomic_file` leaves if the process is killed."""
FIT = ("fit", "the whole network")
"""Kind and name of the one fit that is long enough to be stored before its end."""
OF_A_RANK = re.compile(r"rank-\d+-of-\d+")


class JournalError(ValueError):
    """A journal cannot be used: it belongs to another job, is damaged, locked by another process, or cannot be written."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Journal:
    """Layers' tensors on disk, by kind ("dense", "done", "block" or "fit") and name.

    Args:
        folder: kept after an interruption, so that the same job resumes from it; None: a temporary folder.
        about: description of the job; a journal that was started with another one is refused.
        keep: keep the folder even after the job succeeds.

    Raises:
        JournalError: the folder belongs to another job, is damaged, locked by another process, or cannot be written.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any], *, keep: bool = False) -> None:
        with _explaining(Path(tempfile.gettempdir()) if folder is None else Path(folder), resumes=False):
            self._temporary = tempfile.TemporaryDirectory(prefix="bisparse-") if folder is None else None
            self.folder = Path(self._temporary.name if self._temporary else str(folder))
            self._lock = None if self._temporary else _make_and_lock(self.folder)
        self._keep = keep
        self._job = _digest_of_job(about)
        self._held: dict[tuple[str, str], Any] = {}
        try:
            self._begin(about)
        except BaseException:
            self.close(remove=False)
            raise

    def _begin(self, about: Mapping[str, Any]) -> None:
        """Check that the folder belongs to this job, or start a new journal in an empty one."""
        path = self.folder / ABOUT
        if path.exists():
            before, now = _record(path), json.loads(json.dumps(about))
            if before != now:
                differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
                raise JournalError(
                    f"{self.folder} is the journal of another job (it differs in {', '.join(differing)}): resume with the same "
                    "model, data, pattern and method, or pass another folder"
                )
            return
        with _explaining(self.folder, resumes=False):
            if not all(UNFINISHED.fullmatch(one.name) for one in self.folder.iterdir()):
                raise JournalError(f"{self.folder} is not empty and has no journal: pass a new or empty folder")
        text = json.dumps({**about, DIGEST: self._job}, sort_keys=True, indent=1)
        self._write(path, lambda to: to.write_text(text, encoding="utf-8"))

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        with _explaining(path, resumes=self._temporary is None), atomic_file(path) as unfinished:
            write(unfinished)

    def put(self, kind: str, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Write a layer's tensors and a small record of JSON values.

        Raises:
            JournalError: they cannot be written, for example because the disk is full; no partial file is left.
        """
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"name": name, "job": self._job, "about": json.dumps(about or {})}
        metadata[DIGEST] = _digest(metadata, held)
        self._write(self._path(kind, name), lambda to: save_file(held, to, metadata=metadata))

    def has(self, kind: str, name: str) -> bool:
        """Whether the layer was written."""
        return self._path(kind, name).exists()

    def get(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A layer's tensors and record.

        Raises:
            JournalError: the file is missing or damaged, or was written for another layer or by another job.
        """
        return self._read(kind, name, self._open(kind, name))

    def hold(self, kind: str, name: str) -> None:
        """Map a layer's file, so that `held` can read it even after it is deleted. Needs no memory until it is read.

        Raises:
            JournalError: as for `get`, except for damage that is only found by reading the tensors.
        """
        self._held[kind, name] = self._open(kind, name)

    def held(self, kind: str, name: str) -> dict[str, Tensor]:
        """The tensors of a layer whose file was mapped by `hold`.

        Raises:
            JournalError: the file was damaged after it was written.
        """
        return self._read(kind, name, self._held[kind, name])[0]

    def _read(self, kind: str, name: str, file: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise self._damaged(kind, name, f"({error})") from error
        if metadata.get(DIGEST) != _digest(metadata, tensors):
            raise self._damaged(kind, name, "(its content does not match its checksum)")
        about: dict[str, Any] = json.loads(metadata["about"])
        return tensors, about

    def _open(self, kind: str, name: str) -> Any:
        path = self._path(kind, name)
        try:
            file: Any = safe_open(path, framework="pt")
            metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self._damaged(kind, name, f"({error})") from error
        if not {"name", "job", "about", DIGEST} <= metadata.keys():
            raise self._damaged(kind, name, "(it does not name its layer)")
        if metadata["name"] != name or metadata["job"] != self._job:
            whose = f"of {metadata['name']!r}" if metadata["name"] != name else "of another job"
            raise JournalError(f"{path} should be the entry of {name}, but is {whose}, or damaged: {self._advice(kind, name)}")
        return file

    def _damaged(self, kind: str, name: str, how: str) -> JournalError:
        path = self._path(kind, name)
        return JournalError(f"{path}, which the journal has for {name}, is missing or damaged {how}: {self._advice(kind, name)}")

    def _advice(self, kind: str, name: str) -> str:
        redo = "restart the fit of the network; pruned layers are kept" if kind == FIT[0] else f"redo {name}"
        return f"delete {self._path(kind, name).name} to {redo}, or the whole folder {self.folder} to start over"

    def close(self, *, remove: bool) -> None:
        """Delete the journal (`remove`, and always for a temporary folder), or leave the folder to resume from."""
        # Some systems cannot delete mapped files.
        self._held.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
        elif remove:
            _remove(self.folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(remove=kind is None and not self._keep)


class JournaledFit:
    """The state of a fit that is under way, in a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers as they were stored last; None: nothing was.

        Raises:
            JournalError: the file is damaged.
        """
        return self._journal.get(*FIT) if self._journal.has(*FIT) else None

    def store(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Replace what was stored.

        Raises:
            JournalError: it cannot be written.
        """
        self._journal.put(*FIT, tensors, numbers)


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The digest of an entry: layer, job, record, and tensors with their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256(json.dumps([metadata["name"], metadata["job"], metadata["about"]]).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_job(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    """The job's description in a journal.

    Raises:
        JournalError: it is damaged.
    """
    advice = f"delete {path.parent} and start over"
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise JournalError(f"{path} is damaged ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise JournalError(f"{path} is a {type(found).__name__}, not a job: {advice}")
    if found.pop(DIGEST, None) != _digest_of_job(found):
        raise JournalError(f"{path} is damaged (its content does not match its checksum): {advice}")
    return found


def _make_and_lock(folder: Path) -> int | None:
    """Create a folder and lock it.

    Raises:
        JournalError: another process has locked it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_folder(folder)
            if lock is None or os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
            os.close(lock)
        except FileNotFoundError:
            continue  # the process that had locked it has just removed it
        except BlockingIOError as error:
            raise JournalError(
                f"{folder} is the journal of a running job, in this or another process: wait for it to end, or "
                "pass another folder"
            ) from error


@contextmanager
def _explaining(path: Path, *, resumes: bool) -> Iterator[None]:
    """A context manager that turns system errors while a journal is written into `JournalError`.

    Args:
        resumes: whether the folder has finished layers from which the job can continue.
    """
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        reason = cause.strerror or str(cause) if isinstance(cause, OSError) else str(cause)
        later = "; the layers finished so far are kept, and the same call continues from there" if resumes else ""
        raise JournalError(
            f"{path}: the journal, which stores original and finished layers, cannot be written ({reason}): free space, "
            f"or choose another folder (resume=, --resume; without it, TMPDIR). The model is unchanged{later}"
        ) from error


def remove_journal(folder: str | Path) -> None:
    """Remove a journal that was kept, including those of its ranks. Other files in the folder are not touched.

    A journal that another process has locked is not removed.

    Raises:
        ValueError: an empty text.
    """
    if not str(folder):
        raise ValueError("folder='': expected the folder of a journal")
    check_path(folder)
    folder = Path(folder)
    if not folder.is_dir():
        return
    ranks = [one for one in folder.iterdir() if OF_A_RANK.fullmatch(one.name) and one.is_dir() and not one.is_symlink()]
    for one in [*ranks, folder]:
        try:
            lock = lock_folder(one)
        except BlockingIOError:
            continue
        try:
            if _is_journal(one):
                _remove(one)
            elif not any(one.iterdir()):
                one.rmdir()
        finally:
            if lock is not None:
                os.close(lock)


def _is_journal(folder: Path) -> bool:
    try:
        _record(folder / ABOUT)
    except JournalError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove the files of a journal, its record last, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) or UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
