"""Opens a checkpoint: weight files with their tensors, config.json, and the other files of the model."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bisparse.checkpoint.distributed import METADATA, is_distributed, read_distributed
from bisparse.checkpoint.formats.companions import companions
from bisparse.checkpoint.formats.folded import fold
from bisparse.checkpoint.formats.folders import check_kind
from bisparse.checkpoint.formats.onnx_file import read_onnx
from bisparse.checkpoint.formats.recognize import READABLE, Format, recognize, unreadable
from bisparse.checkpoint.hub import find_source, hub_id, source_name
from bisparse.checkpoint.input_file import InputFile, open_input, read_json
from bisparse.checkpoint.schemas import Config, Index, validate
from bisparse.checkpoint.sidecar import OURS
from bisparse.checkpoint.stored_tensor import StoredTensor, build_header, in_file_order, read_header
from bisparse.checkpoint.torch_file import read_state_dict
from bisparse.errors import CheckpointError

__all__ = ["Shard", "Source", "open_source"]

WEIGHT_SUFFIXES = (".pth.tar", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".jit", ".onnx", ".safetensors")
"""Suffixes that are replaced by ``.safetensors`` in names of written files."""
NO_MODEL = r"optimizer.*|scheduler.*|scaler.*|training_args.*|rng_state.*|random_states.*"
"""Torch files that training writes next to the weights."""
FETCH = "fetch the index again"


@dataclass(frozen=True)
class Shard:
    """One safetensors file to write, and the stored tensors for it."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    """Tensors in the order in which they are written."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, whose weights have not been read."""

    path: Path
    shards: tuple[Shard, ...]
    index: tuple[str, str] | None = None
    """File name and content of the index to write, for a sharded checkpoint."""
    config: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    """Other files of the model, relative to its folder."""
    notes: tuple[str, ...] = ()
    inputs: tuple[InputFile, ...] = ()
    """The files that were read: weights, index and config.json."""
    only_read: Format | None = None
    """Description of a format that can be verified, but not pruned or converted; otherwise empty."""

    def check_unchanged(self) -> None:
        """Raise if the checkpoint has changed since it was opened. Call it after the last tensor is read.

        Raises:
            CheckpointError: weights, index or config.json were changed, replaced or removed.
        """
        for file in self.inputs:
            file.check_unchanged()

    def check_writable(self) -> None:
        """Raise if the checkpoint has a format that can only be verified, or if two files would be written under one name.

        Raises:
            CheckpointError: it is an ONNX model or a TorchScript program, or the names of its files differ by their suffix alone.
        """
        if self.only_read is not None:
            raise CheckpointError(
                self.path,
                f"is {self.only_read}: it can be verified, but not pruned or converted",
                "prune the model that it was made from, and export that again",
            )
        names = Counter((*self.files, *self.others, *OURS))
        if twice := [name for name in self.files if names[name] > 1]:
            raise CheckpointError(
                self.path,
                f"has weights that would be written as {twice[0]}, the name of another file of the output",
                "rename the file of these weights, and its entries in the index",
            )

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name, shard by shard, in file order."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata from the headers of the safetensors files, such as the framework that wrote them."""
        found: dict[str, str] = {}
        for shard in self.shards:
            found |= json.loads(shard.header[8:]).get("__metadata__") or {}
        return found

    @property
    def name(self) -> str:
        """The name of its folder or file, or of a Hugging Face model with its commit."""
        return source_name(self.path)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files to write, and of their index."""
        return (*(shard.file for shard in self.shards), *([self.index[0]] if self.index else []))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(path: str | Path, key: str | None = None) -> Source:
    """Open a checkpoint, recognised by content: a folder or file of safetensors or torch, or an ONNX model.

    In a folder, safetensors have precedence over torch files, and a single file over an index, as in transformers; other weight
    files, such as an index left over from a conversion, are not read. Sharded weights need their index. Weights that are stored
    in parts, such as bit masks and values, are combined; see `bisparse.checkpoint.formats`.

    Args:
        path: a folder, a file, or the name of a model in the local Hugging Face cache, ``org/name``; see `find_source`.
        key: where a torch file keeps the state dict, such as ``"model.state_dict"``; by default it is found.

    Raises:
        CheckpointError: no weights, missing shards, an index that does not fit its shards, corrupt files, or a format that is
            not read.
    """
    found = find_source(path)
    try:
        return _open(found, key)
    except CheckpointError as error:
        if not (model := hub_id(found)):
            raise
        again = f"{error.remedy}; `hf download {model}` fetches what the cache lacks"
        raise CheckpointError(error.path, error.problem, again, tensor=error.tensor) from error


def _open(path: Path, key: str | None) -> Source:
    if not path.is_dir():
        config_files, config, notes = _config_beside(path)
        read = _read_file(path, key)
        notes = (*read.notes, *notes)
        return _folded(Source(path, (read.shard,), None, config, (), notes, (*read.inputs, *config_files), read.only_read))
    single = _find_weights(path)
    if single.name == METADATA:
        tensors, inputs, notes = read_distributed(path, key)
        others, left = companions(path, {file.path.name for file in inputs}, OURS)
        config_files, config = _config(path)
        shard = _shard("model.safetensors", tensors.values())
        return _folded(Source(path, (shard,), None, config, others, (*notes, *left), (*inputs, *config_files)))
    if single.name.endswith(".index.json"):
        return _folded(_open_sharded(path, single, key))
    read = _read_file(single, key)
    others, notes = companions(path, {file.path.name for file in read.inputs}, OURS)
    config_files, config = _config(path)
    notes, inputs = (*read.notes, *notes), (*read.inputs, *config_files)
    return _folded(Source(path, (read.shard,), None, config, others, notes, inputs, read.only_read))


@dataclass(frozen=True)
class _Weights:
    """The content of one weight file."""

    shard: Shard
    inputs: tuple[InputFile, ...]
    notes: tuple[str, ...] = ()
    only_read: Format | None = None


def _read_file(path: Path, key: str | None) -> _Weights:
    """Read the header of a weight file, recognised by content."""
    file = open_input(path)
    found = recognize(file)
    if found is None and path.suffix == ".safetensors":
        found = Format.SAFETENSORS  # whose reader says what is wrong
    if key is not None and found not in (Format.TORCH_ARCHIVE, Format.TORCH_LEGACY, Format.TORCHSCRIPT):
        raise ValueError(f"key={key!r} (--key) chooses a state dict in a torch file; {path} is {found or 'none'}")
    name = _written_name(path.name)
    match found:
        case Format.SAFETENSORS:
            header, tensors = read_header(file)
            return _Weights(Shard(name, header, tuple(tensors.values())), (file,))
        case Format.TORCH_ARCHIVE | Format.TORCH_LEGACY | Format.TORCHSCRIPT:
            tensors, notes = read_state_dict(file, key)
            return _Weights(_shard(name, tensors.values()), (file,), notes, found if found is Format.TORCHSCRIPT else None)
        case Format.ONNX:
            tensors, inputs = read_onnx(file)
            return _Weights(_shard(name, tensors.values()), inputs, (), found)
    raise unreadable(file, found)


def _shard(file: str, tensors: Iterable[StoredTensor]) -> Shard:
    ordered = in_file_order(tensors)
    header = build_header(((one.name, one.dtype, one.shape, one.nbytes) for one in ordered), {"format": "pt"})
    return Shard(file, header, tuple(ordered))


def _written_name(name: str) -> str:
    """The name of the written file: the same, but with the suffix of safetensors and without "pytorch"."""
    if name.endswith(".safetensors"):
        return name
    ending = next((one for one in WEIGHT_SUFFIXES if name.lower().endswith(one) and len(name) > len(one)), "")
    stem = name[: len(name) - len(ending)]
    return f"{stem.removeprefix('pytorch_') if stem.startswith('pytorch_model') else stem}.safetensors"


def _folded(source: Source) -> Source:
    """The source, with weights that are stored in parts combined."""
    replaced, notes = fold(source.tensors)
    if not replaced:
        return source
    shards = []
    for shard in source.shards:
        whole = [replaced.get(one.name, one) for one in shard.tensors]
        kept = [one for one in whole if one is not None]
        shards.append(shard if kept == list(shard.tensors) else _shard(shard.file, kept))
    index = source.index
    if index is not None:
        weight_map = {one.name: shard.file for shard in shards for one in shard.tensors}
        total = sum(one.nbytes for shard in shards for one in shard.tensors)
        content = {**json.loads(index[1]), "metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        index = index[0], json.dumps(content, indent=2) + "\n"
    return replace(source, shards=tuple(shards), index=index, notes=(*source.notes, *notes))


def _find_weights(folder: Path) -> Path:
    """The weight file in a folder, or the index of its shards."""
    for whole, pattern in (("model.safetensors", "*.safetensors.index.json"), ("pytorch_model.bin", "*.bin.index.json")):
        if os.path.lexists(folder / whole):
            return folder / whole
        indices = sorted(folder.glob(pattern))
        if len(indices) > 1:
            raise CheckpointError(folder, f"holds {len(indices)} indices of shards", "keep one checkpoint per folder")
        if indices:
            return indices[0]
    if is_distributed(folder):
        return folder / METADATA
    check_kind(folder)
    return _single_file(folder)


def _single_file(folder: Path) -> Path:
    """The only weight file in a folder, under any name."""
    names = [name for name in sorted(os.listdir(folder)) if (folder / name).is_file() and name not in OURS]
    found = {name: recognize(open_input(folder / name)) for name in names if not re.fullmatch(NO_MODEL, name)}
    torch_files = (Format.TORCH_ARCHIVE, Format.TORCH_LEGACY)
    for kinds in ((Format.SAFETENSORS,), torch_files, (Format.TORCHSCRIPT,), (Format.ONNX,)):
        candidates = [name for name, kind in found.items() if kind in kinds or (kind is None and _expected(name) in kinds)]
        if len(candidates) == 1:
            return folder / candidates[0]
        if candidates:
            raise CheckpointError(
                folder,
                f"holds several weight files and no index ({', '.join(candidates[:6])})",
                "name one of them, or add the index that tells its shards",
            )
    for name in sorted(os.listdir(folder)):
        if name.endswith(WEIGHT_SUFFIXES) and name not in names:
            open_input(folder / name)  # raises for a pipe, a device or a broken link
    ignored = (None, Format.JSON, Format.EMPTY, Format.HTML, *READABLE)
    if others := [name for name, kind in found.items() if kind not in ignored]:
        raise unreadable(open_input(folder / others[0]), found[others[0]])
    inner = sorted(path.parent.name for path in folder.glob("*/*") if path.name.endswith((".safetensors", ".bin", ".index.json")))
    raise CheckpointError(
        folder,
        "holds no weights" + (f" itself, but its folders do ({', '.join(dict.fromkeys(inner))})" if inner else ""),
        "name one of these"
        if inner
        else "expected model.safetensors, its shards with model.safetensors.index.json, or pytorch_model.bin",
    )


def _expected(name: str) -> Format | None:
    """The probable format of a damaged file, by its name; its reader reports what is wrong."""
    return Format.SAFETENSORS if name.endswith(".safetensors") else None


def _open_sharded(folder: Path, index: Path, key: str | None) -> Source:
    index_file, content = read_json(index)
    weight_map = validate(content, Index, index, FETCH).weight_map
    files = sorted(set(weight_map.values()))
    if unsafe := [file for file in files if Path(file).name != file]:
        raise CheckpointError(index, f"names {unsafe[0]}, outside its folder", FETCH)
    if missing := [file for file in files if not os.path.isfile(folder / file)]:  # False, too, for names that no file can have
        shown = ", ".join(file[:80] for file in missing[:4])
        raise CheckpointError(folder, f"lacks {len(missing)} of {len(files)} shards: {shown}", "fetch them")
    shards: list[Shard] = []
    inputs = [index_file]
    notes: tuple[str, ...] = ()
    for file in files:
        read = _read_file(folder / file, key)
        _check_index(folder / file, read.shard, {name for name, place in weight_map.items() if place == file}, index)
        shards.append(read.shard)
        notes += read.notes
        inputs += read.inputs
    written = {name: _written_name(file) for name, file in weight_map.items()}
    text = (
        index_file.read(0, index_file.size).decode("utf-8")
        if written == weight_map
        else json.dumps({**content, "weight_map": written}, indent=2) + "\n"
    )
    name = f"{_written_name(index.name.removesuffix('.index.json'))}.index.json"
    others, left = companions(folder, {*files, index.name}, OURS)
    config_files, config = _config(folder)
    return Source(folder, tuple(shards), (name, text), config, others, notes + left, (*inputs, *config_files))


def _check_index(file: Path, shard: Shard, expected: set[str], index: Path) -> None:
    present = {one.name for one in shard.tensors}
    if lacking := sorted(expected - present):
        raise CheckpointError(
            file, f"lacks {lacking[0]} ({len(lacking)} in all), which {index.name} places there", "fetch shard and index again"
        )
    if unlisted := sorted(present - expected):
        entry = json.dumps({unlisted[0]: file.name})[1:-1]
        raise CheckpointError(
            file,
            f"holds {unlisted[0]} ({len(unlisted)} in all), which {index.name} does not place there",
            f"if it belongs to the model, add {entry} to the weight_map of {index.name}; otherwise fetch both again",
        )


def _config(folder: Path) -> tuple[tuple[InputFile, ...], Mapping[str, Any]]:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return (), {}
    file, content = read_json(path)
    for part in (content, *(inner for inner in content.values() if isinstance(inner, dict))):
        validate(part, Config, path, "correct it, or fetch it again")
    return (file,), content


def _config_beside(path: Path) -> tuple[tuple[InputFile, ...], Mapping[str, Any], tuple[str, ...]]:
    """The config.json next to a single file, which may belong to another model; ignored if it cannot be read."""
    try:
        return *_config(path.parent), ()
    except CheckpointError as error:
        return (), {}, (f"the config.json next to {path.name} is not used: it {error.problem}",)
