"""What pruning did: one record a layer, and a reason for each layer left dense. The same for models and checkpoints."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.arguments import check_dense, entry_of, is_number
from bisparse.layers import Skipped
from bisparse.pattern import Pattern
from bisparse.solution import Solution
from bisparse.tiles import Layout
from bisparse.wrappers import check_module

__all__ = [
    "MAX_HISTORY",
    "LayerResult",
    "MaskPoint",
    "PruneReport",
    "check_history",
    "checksum_of",
    "checksum_of_pieces",
    "count_parameters",
    "gap_of",
    "has_bound",
]

MOSTLY_PRUNED = 0.5
"""Fraction of a model's parameters below which a summary warns that most of it stays dense."""
MAX_HISTORY = 1000
"""Maximum number of points in the history of a run."""
PIECE = 1 << 17
"""Weights at a time in a checksum, so that they stay in a processor's cache."""
MAX_STEP = 1 << 53
"""Optimizer steps of a point are fewer, so that a float holds them."""


@dataclass(frozen=True)
class LayerResult:
    """One pruned parameter."""

    name: str
    """The layer: the parameter's name without ``.weight``."""
    parameter: str
    """The parameter's key in the state_dict."""
    shape: tuple[int, ...]
    """As stored."""
    dtype: str
    """As stored: ``"float32"``, ``"bfloat16"``, ..."""
    layout: Layout
    pattern: str
    density: float
    """Fraction of weights that are not zero. A mask may keep more: weights that were zero already."""
    retained: float | None
    """Fraction of the total score kept; None where the scores are not known, as for a model pruned elsewhere."""
    gap: float | None
    """How much better another mask could be, at most, as a fraction of the bound; None without a certificate."""
    value: float | None
    """Total score kept."""
    time_s: float
    """Seconds of scoring, mask search and proof."""
    error: float | None = None
    """Relative error of the layer's output on calibration data, where the method measures it."""
    error_before: float | None = None
    """The same with the mask applied to the weights as they were and nothing else changed."""
    damping: float | None = None
    """Ridge of the least squares, in units of the mean square of an input."""
    note: str = ""
    """What the user should know about this layer."""
    violated_weights: float | None = None
    """Fraction of what was kept before that the pattern had to drop, for a conversion; an unstructured one, what was beyond its
    density."""
    violated_groups: float | None = None
    """Fraction of the pattern's groups that kept too many before, for a conversion."""
    unstructured_weights: float | None = None
    """What `violated_weights` would have been of a random unstructured mask of the same density; None without such a chance."""
    unstructured_groups: float | None = None
    """The same of `violated_groups`."""
    origin: str = ""
    """The N:M that was obeyed, and filled, before a conversion; empty where there was none."""
    origin_weights: float | None = None
    """What `violated_weights` would have been of a random mask of `origin`."""
    origin_groups: float | None = None
    """The same of `violated_groups`."""
    fitted: str = ""
    """The sparsest N:M, of the pattern's M, that 95 % of the groups fitted before a conversion; empty where there was none."""
    checksum: int | None = None
    """`checksum_of` the weight that the figures are about; None if not recorded. Plain magnitude pruning needs none: there
    `value` is the sum of the weight's magnitudes."""

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    def without_figures(self) -> LayerResult:
        """The record without the figures that do not hold for other numbers in the weight."""
        return replace(self, retained=None, gap=None, value=None, error=None, error_before=None, checksum=None)

    def at(self, pattern: str) -> LayerResult:
        """The record of the same weight at another pattern, without the figures that compare it with the pattern."""
        compared = replace(self, violated_weights=None, violated_groups=None, origin_weights=None, origin_groups=None)
        return replace(compared, pattern=pattern, gap=None, unstructured_weights=None, unstructured_groups=None)


@dataclass(frozen=True)
class MaskPoint:
    """One mask refresh of a training run: means over the refreshed layers, weighted by their sizes, as fractions in [0, 1]."""

    step: int
    """Optimizer steps done."""
    flip_rate: float
    """Fraction of mask entries that changed since the previous refresh."""
    retained: float
    """Fraction of the total score that the new masks keep."""
    changed_tiles: float
    """Fraction of tiles (or groups, for a pattern that is not transposable) in which an entry changed."""


def check_history(points: Sequence[MaskPoint]) -> None:
    """Raise ValueError unless these can be the points of a run: not too many, in order, with fractions in [0, 1]."""
    if len(points) > MAX_HISTORY:
        raise ValueError(f"history of {len(points)} points, at most {MAX_HISTORY}")
    previous = -1
    for point in points:
        for name, value in asdict(point).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            valid = whole and 0 <= value < MAX_STEP if name == "step" else is_number(value) and 0 <= value <= 1
            if not valid:
                raise ValueError(f"history: {name} {value!r:.60}")
        if point.step <= previous:
            raise ValueError(f"history: step {point.step} after step {previous}")
        previous = point.step


@dataclass(frozen=True)
class PruneReport:
    """What was pruned, how well, and what was left dense and why."""

    pattern: str
    method: str
    solver: str
    layers: tuple[LayerResult, ...] = field(repr=False)
    left_dense: tuple[Skipped, ...] = field(default=(), repr=False)
    patterns: dict[str, str] = field(default_factory=dict)
    """Patterns of single layers, by glob, where they differ from `pattern`."""
    notes: tuple[str, ...] = ()
    """Things the user should know, in sentences."""
    parameters: int = 0
    """How many parameters the model has, pruned or not; 0 where that is not known."""
    history: tuple[MaskPoint, ...] = field(default=(), repr=False)
    """How the masks of a training run evolved, at most `MAX_HISTORY` points; empty for one-shot pruning."""

    def __iter__(self) -> Iterator[LayerResult]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, key: str | int) -> LayerResult:
        """The result of a layer, by its name or its number."""
        return entry_of(key, self.layers, {name: one for one in self.layers for name in (one.parameter, one.name)})

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def fraction(self) -> float | None:
        """Fraction of all parameters of the model that are in the pruned layers; None where their number is not known."""
        return min(1.0, self.weights / self.parameters) if self.parameters else None

    @property
    def coverage(self) -> str:
        """A sentence on how much of the model was pruned, with a warning below half; empty where that is not known."""
        if self.fraction is None:
            return ""
        said = f"{self.weights:,} of {self.parameters:,} parameters ({self.fraction:.1%}) are in pruned layers"
        if self.fraction >= MOSTLY_PRUNED:
            return f"{said}."
        return f"Warning: only {said}: more than half of the model stays dense; `left_dense` names each layer and why."

    @property
    def used(self) -> str:
        """The patterns of the layers, with how many have each where they differ, the most frequent first."""
        counts = Counter(layer.pattern for layer in self.layers)
        if len(counts) < 2:
            return next(iter(counts), self.pattern)
        return ", ".join(f"{name} ({count})" for name, count in counts.most_common())

    @property
    def density(self) -> float:
        """Fraction of weights that are not zero in the pruned layers."""
        return sum(layer.density * layer.size for layer in self.layers) / max(self.weights, 1)

    @property
    def retained(self) -> float | None:
        """Fraction of score kept, layers weighted by their size; None where a layer's is not known."""
        shares = [layer.retained for layer in self.layers]
        if not shares or None in shares:
            return None
        return sum(layer.size * layer.retained for layer in self.layers if layer.retained is not None) / self.weights

    @property
    def gap(self) -> float | None:
        """The largest gap of a layer; None where a layer has no certificate."""
        gaps = [layer.gap for layer in self.layers]
        return max((gap for gap in gaps if gap is not None), default=None) if None not in gaps else None

    @property
    def time_s(self) -> float:
        """Seconds of all layers."""
        return sum(layer.time_s for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON knows values."""
        return {
            "pattern": self.pattern,
            "patterns": self.patterns,
            "method": self.method,
            "solver": self.solver,
            "layers": [asdict(layer) for layer in self.layers],
            "left_dense": [{"name": one.name, "reason": one.reason} for one in self.left_dense],
            "notes": list(self.notes),
            "parameters": self.parameters,
            "fraction": self.fraction,
            "history": [asdict(point) for point in self.history],
        }

    def __str__(self) -> str:
        if not self.layers:
            return f"nothing pruned to {self.pattern}; {len(self.left_dense)} layers left dense"
        retained = "" if self.retained is None else f", {100 * self.retained:.2f} % of the score kept"
        gap = "" if self.gap is None else f", gap {self.gap:.1e}"
        covered = "" if self.fraction is None else f" ({self.fraction:.1%} of all parameters)"
        time = f", {self.time_s:.2f} s" if self.time_s else ""
        return (
            f"{len(self)} layers{covered} pruned to {self.used} by {self.method}: density {self.density:.4f}{retained}{gap}"
            f"{time}; {len(self.left_dense)} left dense"
        )


def checksum_of(weight: Tensor) -> int:
    """CRC-32 of a weight's bytes; -0.0 counts as 0.0, as it comes and goes with a product by a mask."""
    check_dense("weight", weight)
    flat = weight.detach().cpu().contiguous().flatten()  # 1-D: strides of sides of 1 may be anything
    return checksum_of_pieces(flat.split(PIECE))


def checksum_of_pieces(pieces: Iterable[Tensor]) -> int:
    """`checksum_of` the weight whose entries are in these 1-D tensors, one after the other."""
    found = 0
    for piece in pieces:
        if piece.element_size() == 1 and piece.is_floating_point():  # which cannot be added to
            piece = piece.float()
        found = zlib.crc32((piece + 0.0).view(torch.uint8).numpy().data, found)
    return found


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model; shared ones count once, those without a shape yet not at all."""
    check_module(model)
    return sum(one.numel() for one in model.parameters() if not nn.parameter.is_lazy(one))


def has_bound(solution: Solution) -> bool:
    """Whether a solution can bound the optimum: always, but for a solver without certificates at a transposable pattern."""
    transposable = isinstance(solution.pattern, Pattern) and solution.pattern.transposable
    return not transposable or solution.scores.numel() == 0 or solution.certificate is not None


def gap_of(solution: Solution) -> float | None:
    """The relative gap that a solution's certificate proves; None where its solver gives no certificate."""
    if not has_bound(solution):
        return None
    return solution.relative_gap if solution.scores.numel() else 0.0
