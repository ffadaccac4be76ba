"""A journal of what is being done to a model: originals to go back to, and finished layers to resume from.

One safetensors file a layer, in a folder. A file appears whole or not at all: it is written under another name and renamed. Each
says whose it is and of which job: one that was damaged, or copied from elsewhere, is refused.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bisparse.atomic_file import atomic_file

__all__ = ["Journal", "JournalError", "remove_journal"]

ABOUT = "about.json"


class JournalError(ValueError):
    """The folder holds the journal of another job, or a damaged one."""


class Journal:
    """Layers' tensors on disk, by kind and name.

    Args:
        folder: kept after an interruption, so that the same job resumes from it; None: a temporary folder.
        about: what the job is; a journal that was begun with something else is refused.
        keep: leave the folder at the end of a job that succeeds, too.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any], *, keep: bool = False) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="bisparse-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else str(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(about, sort_keys=True, indent=1)
        self._job = hashlib.sha256(text.encode()).hexdigest()
        self._keep = keep
        self._held: dict[tuple[str, str], Any] = {}
        path = self.folder / ABOUT
        if path.exists():
            if path.read_text() != text:
                before, now = _record(path), json.loads(text)
                differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
                raise JournalError(
                    f"{self.folder} is the journal of another job (it differs in {', '.join(differing)}): resume with the same "
                    "model, data, pattern and method, or give another folder"
                )
        else:
            if any(self.folder.iterdir()):
                raise JournalError(f"{self.folder} is not empty and holds no journal: give a new or empty folder")
            self._write(path, lambda to: to.write_text(text))

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    @staticmethod
    def _write(path: Path, write: Any) -> None:
        with atomic_file(path) as unfinished:
            write(unfinished)

    def put(self, kind: str, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Write a layer's tensors and a small record that fits JSON."""
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"name": name, "job": self._job, "about": json.dumps(about or {})}
        self._write(self._path(kind, name), lambda to: save_file(held, to, metadata=metadata))

    def has(self, kind: str, name: str) -> bool:
        """Whether the layer was written."""
        return self._path(kind, name).exists()

    def get(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A layer's tensors and record.

        Raises:
            JournalError: the file is missing or damaged, or was written for another layer or by another job.
        """
        return self._read(self._open(kind, name))

    def hold(self, kind: str, name: str) -> None:
        """Keep a layer's file mapped: `held` finds what it holds even when the file is gone. Costs no memory until it is read.

        Raises:
            JournalError: as for `get`.
        """
        self._held[kind, name] = self._open(kind, name)

    def held(self, kind: str, name: str) -> dict[str, Tensor]:
        """The tensors of a layer whose file is on hold."""
        return self._read(self._held[kind, name])[0]

    @staticmethod
    def _read(file: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118

    def _open(self, kind: str, name: str) -> Any:
        path = self._path(kind, name)
        advice = f"delete {path.name} to have {name} done again, or all of {self.folder} to begin anew"
        try:
            file: Any = safe_open(path, framework="pt")
            metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise JournalError(f"{path}, which the journal has for {name}, is missing or damaged ({error}): {advice}") from error
        if metadata.get("name") != name or metadata.get("job") != self._job:
            whose = f"of {metadata.get('name')!r}" if metadata.get("name") != name else "of another job"
            raise JournalError(f"{path} should hold what was done to {name}, but is {whose}: {advice}")
        return file

    def close(self, *, remove: bool) -> None:
        """Forget everything (`remove`, and always for a temporary folder) or leave the folder to resume from."""
        # Some systems do not delete a file that is mapped.
        self._held.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
        elif remove:
            _remove(self.folder)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(remove=kind is None and not self._keep)


def _record(path: Path) -> dict[str, Any]:
    """What a journal says of its job."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise JournalError(f"{path} is damaged ({error}): delete {path.parent} and begin anew") from error
    if not isinstance(found, dict):
        raise JournalError(f"{path} holds a {type(found).__name__}, not a job: delete {path.parent} and begin anew")
    return found


def remove_journal(folder: str | Path) -> None:
    """Remove the journal of a job that was to keep it, those of its ranks included; what else is in the folder stays."""
    for one in [*Path(folder).glob("rank-*-of-*"), Path(folder)]:
        if (one / ABOUT).exists() or (one.is_dir() and not any(one.iterdir())):
            _remove(one)


def _remove(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob(".*.safetensors.*.part"), folder / ABOUT]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
