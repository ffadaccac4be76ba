"""Folders other than a model's own: Hugging Face caches are resolved, and other formats are refused by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bisparse.checkpoint.input_file import open_input, read_json
from bisparse.errors import CheckpointError

__all__ = ["check_kind", "resolve_cache"]

COMMIT = re.compile(r"[0-9A-Za-z._-]{1,128}")
DEEPSPEED = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
MAX_REF_BYTES = 256


def resolve_cache(path: Path) -> Path:
    """The snapshot of the main branch of a Hugging Face cache entry (``models--org--name``); other paths are returned unchanged.

    Raises:
        CheckpointError: several snapshots without a main branch, or a folder of such entries.
    """
    snapshots = path / "snapshots"
    if path.is_dir() and not (path / "config.json").exists() and snapshots.is_dir() and (path / "blobs").is_dir():
        present = sorted(one.name for one in snapshots.iterdir() if one.is_dir())
        main = path / "refs" / "main"
        if main.is_file():
            file = open_input(main)
            commit = bytes(file.read(0, min(file.size, MAX_REF_BYTES))).decode("utf-8", "replace").strip()
            if commit in present and COMMIT.fullmatch(commit):
                return snapshots / commit
        if len(present) == 1:
            return snapshots / present[0]
        raise CheckpointError(
            path,
            f"is a Hugging Face cache entry with {len(present)} snapshots"
            + (", none of them main" if present else ": its download did not finish"),
            f"name one of them: {', '.join(str(snapshots / one) for one in present[:4])}" if present else "download it again",
        )
    return path


def check_kind(folder: Path) -> None:
    """Raise CheckpointError, with a remedy, for folders of formats that are not read.

    Raises:
        CheckpointError: a diffusers pipeline, a DeepSpeed checkpoint, a TensorFlow SavedModel, or a folder
            of Hugging Face cache entries.
    """
    names = sorted(os.listdir(folder))
    if "model_index.json" in names:
        raise _pipeline(folder)
    steps = [folder, *(folder / name for name in names if name.startswith("global_step") and (folder / name).is_dir())]
    if any(DEEPSPEED.fullmatch(name) for step in steps for name in os.listdir(step)):
        raise CheckpointError(
            folder,
            "is a DeepSpeed checkpoint, whose weights may be parted over its ranks",
            "make whole weights of it: python zero_to_fp32.py . out (the script is in the folder); without ZeRO stage 3 naming "
            "mp_rank_00_model_states.pt is enough",
        )
    if entries := [name for name in names if name.startswith("models--")]:
        raise CheckpointError(
            folder, f"is a Hugging Face cache of {len(entries)} models", f"name one of them, such as {folder / entries[0]}"
        )
    if "saved_model.pb" in names:
        raise CheckpointError(
            folder, "is a TensorFlow SavedModel", "load it with TensorFlow and save the weights with safetensors"
        )


def _pipeline(folder: Path) -> CheckpointError:
    _, index = read_json(folder / "model_index.json")
    parts = [
        name
        for name in index
        if not name.startswith("_")
        and Path(name).name == name
        and (folder / name).is_dir()
        and any(file.endswith((".safetensors", ".bin")) for file in os.listdir(folder / name))
    ]
    return CheckpointError(
        folder,
        f"is a diffusers pipeline of several models ({', '.join(parts) or 'none of them here'})",
        f"name its parts one by one, such as {folder / (parts[0] if parts else 'unet')}" if parts else "download its parts",
    )
