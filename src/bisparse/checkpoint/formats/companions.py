"""Selects the other files in a model's folder that are copied next to pruned weights.

Text (configurations, tokenizers, code, licences), binary tokenizers and pictures are copied. Files that contain weights, judged
by content, are not, since they would be a dense model next to the pruned one. Neither are folders with weights, such as earlier
training checkpoints, unless the model's modules.json names them as parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Set
from pathlib import Path

from bisparse.checkpoint.formats.recognize import Format, is_text, recognize
from bisparse.checkpoint.input_file import open_input
from bisparse.errors import CheckpointError

__all__ = ["companions"]

NOT_OF_THE_MODEL = (".git", ".cache", "__pycache__", ".ipynb_checkpoints", "runs", "wandb", "lightning_logs")
OF_A_TRAINING = ("trainer_state.json", "zero_to_fp32.py", "latest")
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".gguf",
    ".ggml", ".tflite", ".mlmodel", ".mlpackage", ".pb", ".npz", ".npy", ".pkl", ".pickle", ".jit", ".engine", ".plan", ".pt2",
    ".distcp", ".nemo", ".pdparams", ".params", ".index.json", ".mar", ".llamafile",
)  # fmt: skip
"""Suffixes of weights, also of formats that cannot be recognised by content."""
TOKENIZERS = (".model", ".spm", ".vocab", ".bpe", ".tiktoken", ".dict")
PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"%PDF")
MAX_TOKENIZER_BYTES = 64 << 20
HEAD = 4096
SHOWN = 12


def companions(folder: Path, used: Set[str], ours: Set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files to copy, relative to the folder, and notes that list them and those left out.

    Args:
        used: files that are read as weights.
        ours: files that bisparse writes itself.
    """
    kept: list[str] = []
    left: list[str] = []
    notes: tuple[str, ...] = ()
    modules = _modules(folder)
    dense: list[str] = []
    for name in _top_level(folder):
        path = folder / name
        if path.is_dir():
            inner = [f"{name}/{one}" for one in _files(path)]
            weights = [one for one in inner if _holds_weights(folder / one)]
            if weights and name not in modules:
                left.append(f"{name}/")
                continue
            dense += weights
            kept += [one for one in inner if one in weights or _belongs(folder / one)]
            left += [one for one in inner if one not in weights and not _belongs(folder / one)]
        elif name not in used and name not in ours:
            (kept if _belongs(path) else left).append(name)
    if left:
        left.sort(key=lambda name: not name.endswith("/"))
        notes += (f"not copied, since they may contain dense weights or do not belong to a model: {_listed(left)}",)
    if dense:
        notes += (f"copied unchanged, with dense weights, since modules.json names them as parts of the model: {_listed(dense)}",)
    if links := sorted(path.name for path in folder.rglob("*") if path.is_symlink() and path.is_dir()):
        notes += (f"links to folders are not followed, so these are not copied: {_listed(links)}",)
    if unreadable := sorted(_unreadable(folder)):
        notes += (f"not copied, since they are links that lead nowhere, pipes or devices: {_listed(unreadable)}",)
    if kept:
        notes += (f"copied: {', '.join(kept)}",)
    return tuple(kept), notes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _top_level(folder: Path) -> Iterator[str]:
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if path.is_dir():
            if name not in NOT_OF_THE_MODEL and ".bisparse-" not in name and not path.is_symlink():
                yield name
        elif path.is_file():
            yield name


def _unreadable(folder: Path) -> Iterator[str]:
    """Yield the relative paths of what is neither a file nor a folder, such as a link of a download that was not finished."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_OF_THE_MODEL and ".bisparse-" not in name]
        for name in names:
            if not (path := Path(root) / name).is_file():
                yield path.relative_to(folder).as_posix()


def _files(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files below a folder."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_OF_THE_MODEL and ".bisparse-" not in name)
        for name in sorted(names):
            if (path := Path(root) / name).is_file():
                yield path.relative_to(folder).as_posix()


def _modules(folder: Path) -> set[str]:
    """The folders that sentence-transformers' modules.json names as parts of the model."""
    path = folder / "modules.json"
    if not path.is_file():
        return set()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    names = [one.get("path") for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    return {name.split("/")[0] for name in names if isinstance(name, str) and name}


def _holds_weights(path: Path) -> bool:
    if path.name.lower().endswith(WEIGHT_SUFFIXES):
        return True
    return _format(path) not in (None, Format.JSON, Format.EMPTY, Format.HTML, Format.LFS_POINTER, Format.COMPRESSED)


def _belongs(path: Path) -> bool:
    """Whether a file is copied: text, a tokenizer or a picture, but neither weights nor a Git LFS pointer."""
    if path.name in OF_A_TRAINING or _holds_weights(path) or _format(path) is Format.LFS_POINTER:
        return False
    with path.open("rb") as file:
        head = file.read(HEAD)
    if is_text(head) or head.startswith(PICTURES):
        return True
    return path.name.lower().endswith(TOKENIZERS) and path.stat().st_size <= MAX_TOKENIZER_BYTES


def _format(path: Path) -> Format | None:
    try:
        return recognize(open_input(path))
    except CheckpointError:
        return None
