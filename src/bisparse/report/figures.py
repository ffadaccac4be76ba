"""The data of a report, read from pruned folders: the sidecar, a new check of W and W^T, and the changes of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bisparse.checkpoint import SIDECAR, CheckpointError, SampleTile, Sidecar, read_sidecar
from bisparse.checkpoint.bands import bands
from bisparse.checkpoint.coverage import nonzero
from bisparse.checkpoint.layer_selection import StoredLayer
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.reader import Source, open_source
from bisparse.checkpoint.statements import RECORDED, corrected, is_quantised, origin, wrong_statements
from bisparse.checkpoint.stored_tensor import StoredTensor
from bisparse.checkpoint.verify import verify_stored
from bisparse.pattern import Pattern, Structure, parse_pattern
from bisparse.pruning.violation import kept_counts, sparsest_for
from bisparse.results import LayerResult, PruneReport
from bisparse.verification import Verification

__all__ = ["Change", "LayerFigures", "Progress", "PrunedFigures", "Side", "read_figures"]

Progress = Callable[[str, int, int], None]
"""Called with the current step, the bytes done and the total bytes."""

PIECE = 1 << 21
"""Weights compared at a time."""
SCORE_ROUNDING = 1e-5
"""By which two shares of the score may differ."""
FITTING_M = 8
"""The M at which layers with an unstructured pattern are checked for N:M."""


@dataclass(frozen=True)
class Side:
    """The check of one side, W or W^T, against a structure."""

    groups: int
    violations: int
    first: str = ""
    """Where the first violation is; empty where there is none."""

    def __add__(self, other: Side) -> Side:
        return Side(self.groups + other.groups, self.violations + other.violations, self.first or other.first)

    @property
    def share(self) -> float:
        """Fraction of groups that break the structure."""
        return self.violations / self.groups if self.groups else 0.0


@dataclass(frozen=True)
class Change:
    """The changes of a weight by pruning, relative to the dense one."""

    squared_error: float
    """Sum of (pruned - dense)**2."""
    squared_dense: float
    kept_magnitude: float
    """Sum of the dense weight's |w| where the pruned one is not zero."""
    magnitude: float
    altered: int
    """Number of kept weights whose value changed."""

    def __add__(self, other: Change) -> Change:
        return Change(
            self.squared_error + other.squared_error,
            self.squared_dense + other.squared_dense,
            self.kept_magnitude + other.kept_magnitude,
            self.magnitude + other.magnitude,
            self.altered + other.altered,
        )

    @property
    def error(self) -> float:
        """Norm of the change over the norm of the dense weight."""
        return math.sqrt(self.squared_error / self.squared_dense) if self.squared_dense > 0 else 0.0

    @property
    def retained(self) -> float:
        """Fraction of the dense weight's total magnitude at the kept positions."""
        return self.kept_magnitude / self.magnitude if self.magnitude > 0 else 1.0


@dataclass(frozen=True)
class LayerFigures:
    """One pruned layer."""

    result: LayerResult
    rows: Side
    columns: Side | None
    """W^T at the same N:M, whether or not the pattern asks for it; None where the structure has no transpose."""
    change: Change | None
    """The change of the weight; None without a dense checkpoint, and for a quantised weight."""
    density: float = 0.0
    """Fraction of weights that are not zero, counted again."""
    fits: Pattern | None = None
    """The sparsest N:M, of its pattern's M and transposable like it, that 95 % of the weight's groups fit."""

    @property
    def holds(self) -> bool:
        """Whether the weight in the file obeys the layer's own pattern."""
        structure = parse_pattern(self.result.pattern)
        asked = isinstance(structure, Pattern) and structure.transposable
        return not self.rows.violations and not (asked and self.columns is not None and self.columns.violations)

    def as_dict(self) -> dict[str, Any]:
        """The recorded and the measured figures of the layer, as JSON values."""
        found = {"holds": self.holds, "fits": None if self.fits is None else str(self.fits)}
        change = None if self.change is None else {"weight_error": self.change.error, "altered": self.change.altered}
        return {**asdict(self.result), **found, **(change or {})}


@dataclass(frozen=True)
class PrunedFigures:
    """One pruned folder."""

    folder: str
    """Its name, without the path to it."""
    sidecar: Sidecar
    layers: tuple[LayerFigures, ...]
    contradicted: tuple[str, ...] = ()
    """What bisparse.json says of the weights that is not so; `sidecar` is corrected."""

    @property
    def report(self) -> PruneReport:
        """The record of the pruning run."""
        return self.sidecar.report

    @property
    def structure(self) -> Structure:
        """The pattern of the run; single layers may have others."""
        return parse_pattern(self.report.pattern)

    @property
    def samples(self) -> tuple[SampleTile, ...]:
        """Squares of real weights and their masks."""
        return self.sidecar.samples

    @property
    def rows(self) -> Side:
        """All layers' W."""
        return sum((layer.rows for layer in self.layers), Side(0, 0))

    @property
    def columns(self) -> Side | None:
        """All layers' W^T; None where a layer's structure has none."""
        total = Side(0, 0)
        for layer in self.layers:
            if layer.columns is None:
                return None
            total += layer.columns
        return total

    @property
    def holds(self) -> bool:
        """Whether every layer obeys its pattern."""
        return all(layer.holds for layer in self.layers)

    @property
    def change(self) -> Change | None:
        """All layers together; None without a dense checkpoint, or if a layer was not compared with it."""
        total = Change(0.0, 0.0, 0.0, 0.0, 0)
        for layer in self.layers:
            if layer.change is None:
                return None
            total += layer.change
        return total


def read_figures(folder: str | Path, against: str | Path | None = None, progress: Progress | None = None) -> PrunedFigures:
    """Read a pruned folder, check every layer again, and compare it with the dense checkpoint if one is given.

    Args:
        folder: written by `prune_checkpoint`, `save` or `save_quantized`.
        against: the dense checkpoint that it came from: a folder or a file. Quantised layers are not compared with it.

    Raises:
        CheckpointError: no sidecar, weights that cannot be read, or a dense checkpoint of other shapes.
    """
    folder = Path(folder)
    sidecar = read_sidecar(folder)
    if sidecar is None:
        raise CheckpointError(
            folder, "holds no bisparse.json, which the report is made from", "prune it with bisparse, or use `bisparse verify`"
        )
    pruned = unpacked(open_source(folder))
    dense = None if against is None else open_source(against)
    total = sum(_stored(pruned, layer).nbytes for layer in sidecar.report)
    done, quantised, layers = 0, 0, []
    for layer in sidecar.report:
        if progress:
            progress(layer.name, done, total)
        tensor = _stored(pruned, layer)
        compared = None if dense is None else _stored(dense, layer)
        quantised += is_quantised(pruned, tensor)
        change = None if compared is None or is_quantised(pruned, tensor) else _change(tensor, compared)
        rows, columns, density = _verify(tensor, layer)
        layers.append(LayerFigures(layer, rows, columns, change, density, _fits(tensor, layer)))
        done += tensor.nbytes
    checked = [_verification(one) for one in layers]
    wrong = (*wrong_statements(sidecar, pruned, checked), *_wrong_scores(sidecar, layers))
    sidecar = corrected(sidecar, pruned, checked)
    layers = [replace(one, result=result) for one, result in zip(layers, sidecar.report, strict=True)]
    said = (*origin(sidecar), *(f"{SIDECAR} is wrong: {one}" for one in wrong), RECORDED)
    if quantised and dense is not None:
        said = (*said, f"quantised layers, whose weights were not compared with the dense ones: {quantised}")
    sidecar = replace(sidecar, report=replace(sidecar.report, notes=(*sidecar.report.notes, *said)))
    for source in (pruned, dense):
        if source is not None:
            source.check_unchanged()
    if progress:
        progress("", total, total)
    return PrunedFigures(pruned.name, sidecar, tuple(layers), wrong)


def _verification(layer: LayerFigures) -> Verification:
    return Verification(parse_pattern(layer.result.pattern), 0, 0, None, layer.density, layer.result.name)


def _wrong_scores(sidecar: Sidecar, layers: Iterable[LayerFigures]) -> Iterator[str]:
    """Fractions of the score kept that the dense weights contradict, where the score is the magnitude."""
    for layer in layers if sidecar.report.method == "magnitude" else ():
        said = layer.result.retained
        if layer.change is not None and said is not None and abs(said - layer.change.retained) > SCORE_ROUNDING:
            yield f"{layer.result.name} keeps {layer.change.retained:.4%} of |w|, not {said:.4%}"


def _stored(source: Source, layer: LayerResult) -> StoredTensor:
    tensor = source.tensors.get(layer.parameter)
    if tensor is None:
        raise CheckpointError(
            source.path,
            "is in bisparse.json, but not among the weights",
            "give the checkpoint it belongs to",
            tensor=layer.parameter,
        )
    if tensor.shape != layer.shape:
        raise CheckpointError(
            source.path,
            f"has shape {tensor.shape}, bisparse.json says {layer.shape}",
            "give the checkpoint it belongs to",
            tensor=layer.parameter,
        )
    return tensor


def _verify(tensor: StoredTensor, layer: LayerResult) -> tuple[Side, Side | None, float]:
    structure = parse_pattern(layer.pattern)
    if not isinstance(structure, Pattern):
        whole = verify_stored(StoredLayer(layer.name, tensor, layer.layout, structure))
        return _side(whole), None, whole.density
    forward = Pattern(structure.n, structure.m)
    both = Pattern(structure.n, structure.m, transposable=True)
    rows = verify_stored(StoredLayer(layer.name, tensor, layer.layout, forward))
    all_groups = verify_stored(StoredLayer(layer.name, tensor, layer.layout, both))
    violations = all_groups.violations - rows.violations
    first = str(all_groups.first) if violations and not rows.violations else f"{layer.name}: W^T" if violations else ""
    return _side(rows), Side(all_groups.groups - rows.groups, violations, first), rows.density


def _fits(tensor: StoredTensor, layer: LayerResult) -> Pattern | None:
    structure = parse_pattern(layer.pattern)
    m = getattr(structure, "m", FITTING_M)
    transposable = isinstance(structure, Pattern) and structure.transposable
    counts = torch.zeros(m + 1, dtype=torch.int64, device="cpu")
    for band in bands(tensor, layer.layout, m):
        counts += kept_counts(nonzero(band.weight), m, transposable=transposable, layout=band.layout)
    return sparsest_for(counts, transposable=transposable)


def _side(verification: Verification) -> Side:
    return Side(verification.groups, verification.violations, str(verification.first or ""))


def _change(pruned: StoredTensor, dense: StoredTensor) -> Change:
    total = Change(0.0, 0.0, 0.0, 0.0, 0)
    for start in range(0, pruned.size, PIECE):
        stop = min(start + PIECE, pruned.size)
        after, before = pruned.read(start, stop).double(), dense.read(start, stop).double()
        kept = after != 0
        magnitude = before.abs()
        total += Change(
            float((after - before).square().sum()),
            float(before.square().sum()),
            float(magnitude[kept].sum()),
            float(magnitude.sum()),
            int((kept & (after != before)).sum()),
        )
    return total
