"""What a path holds: weight files with their tensors, config.json, and the other files that belong to the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bisparse.checkpoint.input_file import InputFile, read_json
from bisparse.checkpoint.sidecar import MASKS, SIDECAR
from bisparse.checkpoint.stored_tensor import StoredTensor, build_header, in_file_order, read_header
from bisparse.checkpoint.torch_file import read_state_dict
from bisparse.errors import CheckpointError

__all__ = ["Shard", "Source", "open_source"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
OTHER_FORMATS = (".onnx", ".h5", ".msgpack", ".ot", ".gguf", ".tflite", ".mlmodel")
"""Weights in formats that are not pruned; copying them would leave a dense model beside the pruned one."""


@dataclass(frozen=True)
class Shard:
    """One file of weights to write, as safetensors, and where its tensors are read."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    """In the order in which they are written."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been looked at, but not read."""

    path: Path
    shards: tuple[Shard, ...]
    index: tuple[str, str] | None = None
    """The index of a sharded checkpoint to write: file name and content."""
    config: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    """Further files that belong to the model, relative to its folder."""
    notes: tuple[str, ...] = ()
    inputs: tuple[InputFile, ...] = ()
    """The files that all this was read from: weights, index and config.json."""

    def check_unchanged(self) -> None:
        """Raise if the checkpoint changed since it was opened; to be called after its last tensor is read.

        Raises:
            CheckpointError: weights, index or config.json were changed, replaced or removed.
        """
        for file in self.inputs:
            file.check_unchanged()

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name, shard by shard, in file order."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers of the safetensors files say of them, such as the framework that wrote them."""
        found: dict[str, str] = {}
        for shard in self.shards:
            found |= json.loads(shard.header[8:]).get("__metadata__") or {}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(path: str | Path) -> Source:
    """Find a checkpoint's weights: a folder of safetensors or of torch files, sharded or not, or a single such file.

    In a folder, safetensors are taken before torch files, and a whole file before an index, as transformers does: what the
    others are, such as an index left over from a conversion, is not read. Sharded weights need their index.

    Raises:
        CheckpointError: no weights, missing shards, an index that does not fit its shards, corrupt files.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(path, "does not exist", "check the path")
    if not path.is_dir():
        return _open_file(path)
    single = _find_weights(path)
    if single.name.endswith(".index.json"):
        return _open_sharded(path, single)
    opened = _open_file(single)
    shard = opened.shards[0]
    name = shard.file if single.suffix == ".safetensors" else "model.safetensors"
    others, notes = _others(path, {single.name})
    written = Shard(name, shard.header, shard.tensors)
    return Source(path, (written,), None, opened.config, others, opened.notes + notes, opened.inputs)


def _open_file(path: Path) -> Source:
    """A single file, without its neighbours; its config.json is read if there is one."""
    config_files, config = _config(path.parent)
    if path.suffix in TORCH_SUFFIXES:
        file, tensors, notes = read_state_dict(path)
        shard = _converted(f"{path.stem}.safetensors", tensors)
        return Source(path, (shard,), config=config, notes=notes, inputs=(file, *config_files))
    if path.suffix == ".json":
        raise CheckpointError(path, "is JSON, not weights", "name the folder that it is in")
    file, header, tensors = read_header(path)
    shard = Shard(path.with_suffix(".safetensors").name, header, tuple(tensors.values()))
    return Source(path, (shard,), config=config, inputs=(file, *config_files))


def _converted(file: str, tensors: Mapping[str, StoredTensor]) -> Shard:
    ordered = in_file_order(tensors.values())
    header = build_header(((one.name, one.dtype, one.shape, one.nbytes) for one in ordered), {"format": "pt"})
    return Shard(file, header, tuple(ordered))


def _find_weights(folder: Path) -> Path:
    """The file of weights in a folder, or the index of its shards."""
    for whole, pattern in (("model.safetensors", "*.safetensors.index.json"), ("pytorch_model.bin", "*.bin.index.json")):
        if os.path.lexists(folder / whole):
            return folder / whole
        indices = sorted(folder.glob(pattern))
        if len(indices) > 1:
            raise CheckpointError(folder, f"holds {len(indices)} indices of shards", "keep one checkpoint per folder")
        if indices:
            return indices[0]
    return _single_file(folder)


def _single_file(folder: Path) -> Path:
    candidates = [file for file in sorted(folder.glob("*.safetensors")) if file.name != MASKS]
    candidates = candidates or [file for suffix in TORCH_SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(file.name for file in candidates[:6])
        raise CheckpointError(
            folder,
            f"holds several weight files and no index ({names})",
            "name one of them, or add the index that tells its shards",
        )
    raise CheckpointError(
        folder,
        "holds no weights",
        "expected model.safetensors, its shards with model.safetensors.index.json, or pytorch_model.bin",
    )


def _open_sharded(folder: Path, index: Path) -> Source:
    index_file, content = read_json(index)
    weight_map = content.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())):
        raise CheckpointError(index, "has no 'weight_map' from tensors to files", "fetch the index again")
    files = sorted(set(weight_map.values()))
    if unsafe := [file for file in files if Path(file).name != file]:
        raise CheckpointError(index, f"names {unsafe[0]}, outside its folder", "fetch the index again")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(folder, f"lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:4])}", "fetch them")
    shards: list[Shard] = []
    inputs = [index_file]
    notes: tuple[str, ...] = ()
    for file in files:
        opened = _open_file(folder / file)
        shard = opened.shards[0]
        present, expected = {one.name for one in shard.tensors}, {name for name, place in weight_map.items() if place == file}
        if lacking := sorted(expected - present):
            raise CheckpointError(
                folder / file,
                f"lacks {lacking[0]} ({len(lacking)} in all), which {index.name} places there",
                "fetch shard and index again",
            )
        if unlisted := sorted(present - expected):
            raise CheckpointError(
                folder / file,
                f"holds {unlisted[0]} ({len(unlisted)} in all), which {index.name} does not place there",
                "fetch both again",
            )
        shards.append(Shard(_shard_name(file), shard.header, shard.tensors))
        notes += opened.notes
        inputs.append(opened.inputs[0])
    written = {name: _shard_name(file) for name, file in weight_map.items()}
    name = index.name if index.name.endswith(".safetensors.index.json") else "model.safetensors.index.json"
    text = (
        index_file.read(0, index_file.size).decode("utf-8")
        if written == weight_map
        else json.dumps({**content, "weight_map": written}, indent=2) + "\n"
    )
    others, left = _others(folder, {*files, index.name})
    config_files, config = _config(folder)
    return Source(folder, tuple(shards), (name, text), config, others, notes + left, (*inputs, *config_files))


def _shard_name(file: str) -> str:
    if file.endswith(".safetensors"):
        return file
    return Path(file).with_suffix(".safetensors").name.replace("pytorch_model", "model")


def _config(folder: Path) -> tuple[tuple[InputFile, ...], Mapping[str, Any]]:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return (), {}
    file, content = read_json(path)
    return (file,), content


def _others(folder: Path, used: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files to copy, and a note on those left out: other copies of the weights, which would be dense."""
    kept: list[str] = []
    left: list[str] = []
    for name in _files(folder):
        suffix = Path(name).suffix
        if name in used or name in (SIDECAR, MASKS):
            continue
        is_copy = "/" not in name and (suffix in (".safetensors", *TORCH_SUFFIXES) or name.endswith(".index.json"))
        (left if is_copy or suffix in OTHER_FORMATS else kept).append(name)
    notes: tuple[str, ...] = (f"not copied, since these may hold the dense weights: {', '.join(left)}",) if left else ()
    if links := sorted(path.name for path in folder.rglob("*") if path.is_symlink() and path.is_dir()):
        notes += (f"links to folders are not followed, so these are not copied: {', '.join(links)}",)
    return tuple(kept), notes


def _files(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != ".git" and ".bisparse-" not in name)
        for name in sorted(files):
            path = Path(root) / name
            if path.is_file():
                yield path.relative_to(folder).as_posix()
