"""Finds sources by their Hugging Face name in the local cache. Nothing is ever downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bisparse.checkpoint.formats.folders import resolve_cache
from bisparse.errors import CheckpointError

__all__ = ["find_source", "hub_id", "source_name"]

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
COMMIT_SHOWN = 12


def find_source(name: str | Path) -> Path:
    """The path of a source: the path itself if it exists, otherwise the snapshot of the model ``org/name`` in the cache.

    The cache is the one that `huggingface_hub` uses: ``HF_HUB_CACHE``, ``HF_HOME`` and its defaults. A cache entry
    (``models--org--name``) stands for the snapshot of its main branch.

    Raises:
        CheckpointError: neither exists; names the command that downloads the model.
    """
    path = Path(name)
    try:
        path.lstat()
    except ValueError as error:
        raise CheckpointError(path, f"is not a path ({error})", "check it") from error
    except (FileNotFoundError, NotADirectoryError):
        return _cached(path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror or error})", "check its permissions") from error
    if not path.exists():
        raise CheckpointError(path, "is a broken link", "check its target")
    return resolve_cache(path)


def _cached(path: Path) -> Path:
    name = path.as_posix()
    if not HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise CheckpointError(path, "does not exist", "check the path")
    place = "the local Hugging Face cache"
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        place += " (which needs huggingface_hub installed)"
    else:
        place = f"{place} {constants.HF_HUB_CACHE}"
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            entry = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
            if (entry / "snapshots").is_dir():
                return resolve_cache(entry)  # the entry has no main branch
    if "/" not in name:
        raise CheckpointError(path, "does not exist", "check the path")
    raise CheckpointError(
        path, f"does not exist, and {place} holds no model of that name", f"check the path, or download it: hf download {name}"
    )


def source_name(path: Path) -> str:
    """The name of a source: that of its folder or file; for a snapshot in the cache, the model's name and commit."""
    entry = hub_id(path)
    return f"{entry}@{Path(os.path.abspath(path)).name[:COMMIT_SHOWN]}" if entry else path.resolve().name


def hub_id(path: Path) -> str:
    """The Hugging Face name of a snapshot in the cache; empty for any other path."""
    path = Path(os.path.abspath(path))
    entry = path.parent.parent.name
    return entry.removeprefix("models--").replace("--", "/") if path.parent.name == "snapshots" and "models--" in entry else ""
