"""Metrics of a layer's mask refresh: flip rate, retained score, distance to the optimum, fraction of changed tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from jaxtyping import Bool, Float
from torch import Tensor

from bisparse._solve import solve
from bisparse.pattern import Pattern
from bisparse.solution import Solution
from bisparse.tiles import pad_to_multiple, to_matrices, to_tiles
from bisparse.training.layer import SparseLayer

__all__ = ["MaskChange", "mean_change", "measure_change"]


@dataclass(frozen=True)
class MaskChange:
    """Metrics of one layer at one refresh."""

    step: int
    """Optimizer steps done."""
    size: int
    """Number of weights."""
    flip_rate: float
    """Fraction of mask entries that changed since the last refresh, ``||m_t - m_(t-1)||_1 / D``."""
    retained: float
    """Fraction of the total score that the new mask keeps."""
    distance: float
    """How far the new mask is below the optimum, as a fraction of it; 0 for an exact solver."""
    stale_distance: float
    """How far the old mask is below the optimum of the current scores, as a fraction of it."""
    changed_tiles: float
    """Fraction of tiles (or groups, for a pattern that is not transposable) in which an entry changed."""


def measure_change(
    layer: SparseLayer,
    step: int,
    old: Bool[Tensor, "..."],
    new: Bool[Tensor, "..."],
    scores: Float[Tensor, "..."],
    *,
    optimal: bool,
) -> MaskChange:
    """Compare two masks of a layer under its current scores; searches the optimum unless `new` is known to be optimal."""
    changed = old ^ new
    numbers = scores.double()
    kept_new, kept_old, total = float(numbers[new].sum()), float(numbers[old].sum()), float(numbers.sum())
    best = kept_new
    if not optimal:
        solution: Solution = solve(scores, layer.pattern, layout=layer.layout)
        best = solution.value
    m = getattr(layer.pattern, "m", None)
    matrices = to_matrices(changed, layer.layout)
    if isinstance(layer.pattern, Pattern) and layer.pattern.transposable:
        padded = pad_to_multiple(matrices, layer.pattern.m)
        pieces = to_tiles(padded.reshape(-1, padded.shape[-1]), layer.pattern.m).flatten(1)
    elif m is not None and matrices.shape[-1] % m == 0:
        pieces = matrices.reshape(-1, m)
    else:
        pieces = matrices.reshape(-1, matrices.shape[-1])
    return MaskChange(
        step=step,
        size=changed.numel(),
        flip_rate=float(changed.double().mean()),
        retained=kept_new / total if total > 0 else 1.0,
        distance=max(0.0, 1 - kept_new / best) if best > 0 else 0.0,
        stale_distance=max(0.0, 1 - kept_old / best) if best > 0 else 0.0,
        changed_tiles=float(pieces.any(1).double().mean()),
    )


def mean_change(changes: Iterable[MaskChange]) -> MaskChange:
    """The mean over layers, weighted by their sizes."""
    changes = list(changes)
    size = sum(change.size for change in changes)
    means = {
        entry.name: sum(getattr(change, entry.name) * change.size for change in changes) / size
        for entry in fields(MaskChange)
        if entry.name not in ("step", "size")
    }
    return MaskChange(step=max(change.step for change in changes), size=size, **means)


def as_metrics(changes: Mapping[str, MaskChange], prefix: str = "sparsity") -> dict[str, float]:
    """Metrics by flat names for a logger: ``sparsity/flip_rate`` for the model, ``sparsity/LAYER/flip_rate`` per layer."""
    if not changes:
        return {}
    named = {prefix: mean_change(changes.values())} | {f"{prefix}/{name}": change for name, change in changes.items()}
    return {
        f"{place}/{entry.name}": getattr(change, entry.name)
        for place, change in named.items()
        for entry in fields(MaskChange)
        if entry.name != "size"
    }
