"""`prune_checkpoint`: prunes a checkpoint by magnitude without building the model, band by band."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from bisparse.apart import check_apart
from bisparse.arguments import check_function, check_json
from bisparse.checkpoint.atomic_folder import check_room, output_folder
from bisparse.checkpoint.background import InBackground
from bisparse.checkpoint.bands import prune_stored
from bisparse.checkpoint.input_file import open_input
from bisparse.checkpoint.layer_selection import NameFilter, StoredLayer, choose_layers
from bisparse.checkpoint.model_card import CARD, write_card
from bisparse.checkpoint.model_config import plain_config
from bisparse.checkpoint.permissions import copy_permissions
from bisparse.checkpoint.reader import Shard, Source, open_source
from bisparse.checkpoint.sidecar import MASKS, SIDECAR, SampleTile, Sidecar, masks_header, packed_size
from bisparse.checkpoint.stored_tensor import DTYPES, MemoryTensor, SafetensorsWriter, StoredTensor, as_bytes
from bisparse.checkpoint.verify import verify_stored
from bisparse.errors import CheckpointError
from bisparse.layers import Skipped, parse_patterns
from bisparse.pattern import Structure, parse_pattern
from bisparse.results import LayerResult, PruneReport
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import Layout

__all__ = ["CheckpointPlan", "Progress", "copy_others", "plan_checkpoint", "prune_checkpoint", "read_back"]

Progress = Callable[[str, int, int], None]
"""A function called with the current action, the bytes done and their total."""

Bytes = bytes | bytearray | memoryview
SAMPLES = 8
"""Maximum number of layers with a sample tile."""
SLACK = 8 << 20
"""Bytes reserved for the sidecar when free disk space is checked."""


@dataclass(frozen=True)
class CheckpointPlan:
    """The plan of `prune_checkpoint`."""

    source: Source = field(repr=False)
    layers: tuple[StoredLayer, ...] = field(repr=False)
    left_dense: tuple[Skipped, ...] = field(repr=False)
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Approximate number of bytes that will be written."""
        copied = sum((self.source.path / name).stat().st_size for name in self.source.others)
        return self.source.nbytes + copied + sum(packed_size(layer.tensor.shape) for layer in self.layers)


def plan_checkpoint(
    source: str | Path,
    pattern: str | Structure,
    *,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    key: str | None = None,
) -> CheckpointPlan:
    """Plan which tensors of a checkpoint are pruned, in which layout, and why the others stay dense. Reads only headers.

    Arguments and errors are those of `prune_checkpoint`.
    """
    opened = open_source(source, key)
    structures = parse_patterns(patterns)
    layers, left = choose_layers(
        opened.tensors,
        opened.config,
        parse_pattern(pattern),
        metadata=opened.metadata,
        include=include,
        exclude=exclude,
        remainder=remainder,
        patterns=structures,
        layouts=layouts,
    )
    if not layers:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in left[:4])
        raise CheckpointError(opened.path, f"has no layer to prune ({reasons or 'no matrices'})", "name tensors with --include")
    notes = opened.notes
    if vectors := sum(len(tensor.shape) < 2 for tensor in opened.tensors.values()):
        notes += (f"{vectors} vectors and scalars (biases, norms) stay dense",)
    return CheckpointPlan(opened, tuple(layers), tuple(left), notes)


def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    pattern: str | Structure,
    *,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    solver: Solver | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Prune a checkpoint by magnitude, without building the model, into a new folder.

    The target has plain dense safetensors with zeros, with the source's names, dtypes and shards, the source's other files,
    `bisparse.json` and `bisparse-masks.safetensors`. It only appears once it is complete, after its files are read back and
    verified. Memory does not grow with the checkpoint.

    Args:
        source: a folder of safetensors (single or with their index), or of a torch state dict; or such a file.
        target: a folder that must not exist.
        pattern: the structure or its text, such as ``"4:8-T"``. N is the number kept.
        include, exclude: layers, by name, glob or ``re:`` pattern. Heads, embeddings, first convolutions and routers stay
            dense unless included by name.
        remainder: what to do if M does not divide a layer's sides. "pad": prune as if padded with zeros; "dense": leave the layer
            dense; "error": raise.
        patterns: patterns of single layers, by filter; the first that matches counts.
        layouts: layouts of single layers, by filter, if they cannot be detected: "linear", "transposed", "conv",
            "conv-last", "conv-transposed", "experts", "experts-transposed", "groups:32", "parts:3", or a `Layout`.
        key: where a torch file keeps the state dict, such as ``"model.state_dict"``; by default it is found.
        overwrite: replace a target that bisparse wrote.
        provenance: how the job was called; stored in the sidecar.

    Raises:
        CheckpointError: the source cannot be read or holds NaN, the target exists, cannot be written or overlaps the source.
        ValueError: an invalid pattern or filter, or a provenance that JSON cannot hold.
    """
    pattern = parse_pattern(pattern)
    check_json("provenance", dict(provenance or {}))
    plan = plan_checkpoint(
        source, pattern, include=include, exclude=exclude, remainder=remainder, patterns=patterns, layouts=layouts, key=key
    )
    plan.source.check_writable()
    target = Path(target)
    check_apart(target, {"source": plan.source.path})
    with output_folder(target, overwrite=overwrite) as folder:
        check_room(folder, plan.output_bytes + SLACK)
        job = _Job(plan, folder, solver, progress)
        results, samples = job.run()
        notes = plan.notes + copy_others(plan.source, folder)
        plan.source.check_unchanged()
        report = PruneReport(
            str(pattern),
            "magnitude",
            repr(parse_solver(solver)),
            results,
            plan.left_dense,
            {name: str(one) for name, one in parse_patterns(patterns).items()},
            notes,
            sum(tensor.size for tensor in plan.source.tensors.values()),
        )
        step = max(1, -(-len(samples) // SAMPLES))
        sidecar = Sidecar(report, remainder, plan.source.name, samples[::step], provenance=dict(provenance or {}))
        sidecar = write_card(folder, sidecar, target)
        report = sidecar.report
        (folder / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
        card = [CARD] if CARD not in plan.source.others else []
        limit_permissions(folder, plan.source, (SIDECAR, MASKS, *card))
    return report


class _Job:
    """A pass over the shards that copies or prunes each tensor, followed by a check of all written tensors."""

    def __init__(self, plan: CheckpointPlan, folder: Path, solver: Solver | None, progress: Progress | None) -> None:
        self.plan, self.folder, self.solver = plan, folder, solver
        check_function("progress", progress)
        self.progress: Progress = (lambda what, done, total: None) if progress is None else progress
        self.layers = {layer.tensor.name: layer for layer in plan.layers}
        self.checksums: dict[str, int] = {}
        self.done = 0
        self.total = 2 * plan.source.nbytes  # written once, read back once

    def run(self) -> tuple[tuple[LayerResult, ...], tuple[SampleTile, ...]]:
        source = self.plan.source
        parameters = {layer.tensor.name: layer.tensor.shape for layer in self.plan.layers}
        results: list[LayerResult] = []
        samples: list[SampleTile] = []
        # The layers of the plan are in the order of the shards, and so are their masks.
        with SafetensorsWriter(self.folder / MASKS, masks_header(parameters)) as masks:
            for shard in source.shards:
                self._write_shard(shard, masks, results, samples)
        if source.index is not None:
            name, text = source.index
            (self.folder / name).write_text(text, encoding="utf-8")
        for shard in source.shards:
            read_back(self.folder / shard.file, shard.tensors, self.checksums, self.layers, self._checked)
        self.progress("", self.total, self.total)
        return tuple(results), tuple(samples)

    def _checked(self, tensor: StoredTensor) -> None:
        self.done += tensor.nbytes
        self.progress(f"check {tensor.name}", self.done, self.total)

    def _write_shard(self, shard: Shard, masks: SafetensorsWriter, results: list[LayerResult], samples: list[SampleTile]) -> None:
        with SafetensorsWriter(self.folder / shard.file, shard.header) as writer, InBackground() as background:

            def append(name: str, data: Bytes) -> None:
                self.checksums[name] = zlib.crc32(data, self.checksums[name])
                writer.write(data)

            for tensor in shard.tensors:
                layer = self.layers.get(tensor.name)
                self.progress(layer.name if layer else tensor.name, self.done, self.total)
                self.checksums[tensor.name] = 0

                def write(data: Bytes, name: str = tensor.name) -> None:
                    background.call(partial(append, name, data))
                    self.done += len(data)
                    self.progress(name, self.done, self.total)

                if layer is None:
                    for piece in tensor.pieces():
                        write(piece)
                else:
                    result, sample = prune_stored(layer, self.solver, write, masks.write)
                    results.append(result)
                    if sample is not None:
                        samples.append(sample)


def read_back(
    path: Path,
    tensors: Iterable[StoredTensor],
    checksums: Mapping[str, int],
    layers: Mapping[str, StoredLayer],
    advance: Callable[[StoredTensor], None],
) -> None:
    """Read a written file with the safetensors library, and check every byte, and every layer against its pattern.

    Raises:
        CheckpointError: bytes that differ from those written.
        PatternError: a layer that breaks its pattern.
    """
    for tensor in tensors:
        if tensor.dtype in DTYPES:
            # Opened again for each tensor, since pages that a mapping has touched count as memory until it is closed.
            with safe_open(path, framework="pt") as file:
                read = file.get_tensor(tensor.name)
            verification = None
            with InBackground() as background:
                background.call(partial(_check_bytes, path, tensor.name, read, checksums[tensor.name]))
                if (layer := layers.get(tensor.name)) is not None:
                    stored = MemoryTensor(tensor.name, tensor.dtype, tensor.shape, path, tensor.nbytes, read)
                    verification = verify_stored(StoredLayer(layer.name, stored, layer.layout, layer.pattern))
            if verification is not None:
                verification.check()
        advance(tensor)


def _check_bytes(path: Path, name: str, read: Tensor, checksum: int) -> None:
    if zlib.crc32(as_bytes(read)) != checksum:
        raise CheckpointError(path, "was not read back as it was written", "check the disk", tensor=name)


def copy_others(source: Source, folder: Path) -> tuple[str, ...]:
    """Copy the source's other files into a folder, with config.json changed to plain weights. Returns notes.

    Files and folders keep their permissions; see `copy_permissions`.
    """
    notes: tuple[str, ...] = ()
    opened = {file.path: file for file in source.inputs}
    for name in source.others:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json" and (cleaned := plain_config(source.config)) is not None:
            place.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")
            notes = (
                "config.json: its sparsity_config, and a quantization_config that quantises nothing, were removed, since serving "
                "engines reject them and the weights are plain",
            )
        else:
            path = source.path / name
            file = opened.get(path) or open_input(path)
            with file.open() as read, place.open("xb") as written:
                shutil.copyfileobj(read, written)
            file.check_unchanged()
        copy_permissions(place, [source.path / name])
    if source.path.is_dir():
        for path in {parent for name in source.others for parent in Path(name).parents} | {Path()}:
            copy_permissions(folder / path, [source.path / path])
    return notes


def limit_permissions(folder: Path, source: Source, others: Iterable[str]) -> None:
    """Restrict the permissions of written shards to those of their sources, and of other files to those of all weights.

    Args:
        others: names of files about all weights; the index of the shards is always included.
    """
    for shard in source.shards:
        if (folder / shard.file).exists():
            copy_permissions(folder / shard.file, {tensor.path for tensor in shard.tensors})
    weights = {tensor.path for shard in source.shards for tensor in shard.tensors}
    for name in (*others, *([source.index[0]] if source.index else [])):
        if (folder / name).exists():
            copy_permissions(folder / name, weights)
