"""Geometry of the report's own pictures: tiles of real weights, and a score for each layer. The markup is the templates'."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bisparse.checkpoint import SampleTile
from bisparse.pattern import Structure
from bisparse.report.figures import PrunedFigures

__all__ = ["Chart", "Dot", "Reference", "Span", "TilePicture", "chart_of_layers", "picture_of_tile"]

LEVELS = 6
"""Shades of magnitude, for kept and for pruned weights each."""


@dataclass(frozen=True)
class TilePicture:
    """A square of weights: one path for each shade, so that thousands of cells stay small."""

    sample: SampleTile
    width: float
    height: float
    paths: tuple[tuple[str, str], ...]
    """CSS class (``kept-5``, ``pruned-0``, ...) and path data."""
    kept: int
    total: int

    @property
    def place(self) -> str:
        """The square's position in the layer."""
        sample = self.sample
        rows, columns = len(sample.kept), len(sample.kept[0]) if sample.kept else 0
        where = f"rows {sample.row}–{sample.row + rows - 1}, columns {sample.column}–{sample.column + columns - 1}"
        return f"matrix {sample.matrix}, {where}" if sample.matrix else where


def picture_of_tile(sample: SampleTile, structure: Structure, rows: int | None = None) -> TilePicture:
    """One cell per weight, darker for a larger magnitude, with a gap between tiles; cropped to `rows` x `rows` if given."""
    m = getattr(structure, "m", 0)
    weights, kept = sample.weights, sample.kept
    if rows is not None:
        weights, kept = tuple(line[:rows] for line in weights[:rows]), tuple(line[:rows] for line in kept[:rows])
        sample = SampleTile(sample.layer, sample.matrix, sample.row, sample.column, weights, kept)
    largest = max((abs(weight) for line in weights for weight in line), default=0.0) or 1.0
    both_ways = getattr(structure, "transposable", False)

    def place(index: int, gaps: bool) -> float:
        return 10 * index + (5 * (index // m) if gaps and m else 0)

    paths: dict[str, list[str]] = {}
    for row, (line, flags) in enumerate(zip(weights, kept, strict=True)):
        for column, (weight, flag) in enumerate(zip(line, flags, strict=True)):
            level = min(LEVELS - 1, int(LEVELS * (abs(weight) / largest) ** 0.75))
            x, y = place(column, True), place(row, both_ways)
            paths.setdefault(f"{'kept' if flag else 'pruned'}-{level}", []).append(f"M{x:g} {y:g}h9v9h-9z")
    height, width = len(weights), len(weights[0]) if weights else 0
    return TilePicture(
        sample,
        place(max(width - 1, 0), True) + 9,
        place(max(height - 1, 0), both_ways) + 9,
        tuple((name, "".join(cells)) for name, cells in sorted(paths.items())),
        sum(map(sum, kept)),
        height * width,
    )


@dataclass(frozen=True)
class Dot:
    """One layer of one series."""

    x: float
    y: float
    layer: str
    text: str
    row: int
    """The layer's row in the table, for a link."""


@dataclass(frozen=True)
class Reference:
    """A line to compare with."""

    y: float
    label: str
    series: int


@dataclass(frozen=True)
class Span:
    """Layers of one block of the network."""

    x: float
    width: float
    label: str
    shaded: bool


@dataclass(frozen=True)
class Chart:
    """Retained score of each layer, in the order of the network; one series for each pruned folder."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    ticks: tuple[tuple[float, str], ...]
    spans: tuple[Span, ...]
    series: tuple[tuple[str, tuple[Dot, ...]], ...]
    references: tuple[Reference, ...]
    radius: float


def chart_of_layers(pruned: Sequence[PrunedFigures], gaussian: Sequence[float]) -> Chart | None:
    """One dot per layer and folder; None if no layer's retained score is known.

    Args:
        pruned: folders with the same layers, or nearly.
        gaussian: what each folder's pattern keeps of Gaussian weights, drawn as a line.
    """
    width, height, left, right, top, bottom = 960.0, 320.0, 54.0, 884.0 if len(pruned) == 1 else 944.0, 18.0, 284.0
    names = list(dict.fromkeys(layer.result.name for one in pruned for layer in one.layers))
    shares = {
        (index, layer.result.name): share
        for index, one in enumerate(pruned)
        for layer in one.layers
        if (share := layer.result.retained) is not None
    }
    if not shares:
        return None
    low, high, step = _scale([*shares.values(), *gaussian])
    pitch = (right - left) / len(names)

    def across(index: float) -> float:
        return left + pitch * (index + 0.5)

    def up(share: float) -> float:
        return bottom - (share - low) / (high - low) * (bottom - top)

    ticks = tuple(
        (up(share), f"{100 * share:.{0 if step >= 0.01 else 1}f} %")
        for share in (low + step * index for index in range(round((high - low) / step) + 1))
    )
    series = tuple(
        (
            str(one.structure),
            tuple(
                Dot(across(place), up(shares[index, name]), name, f"{name}: {100 * shares[index, name]:.2f} %", place)
                for place, name in enumerate(names)
                if (index, name) in shares
            ),
        )
        for index, one in enumerate(pruned)
    )
    references = tuple(
        Reference(up(share), f"{one.structure} on Gaussian weights: {100 * share:.1f} %", index)
        for index, (one, share) in enumerate(zip(pruned, gaussian, strict=True))
    )
    radius = max(2.0, min(5.0, pitch * 0.36))
    return Chart(width, height, left, right, top, bottom, ticks, _spans(names, left, pitch), series, references, radius)


def _scale(values: Sequence[float]) -> tuple[float, float, float]:
    """Round limits around the values, and a step that divides their distance."""
    low, high = min(values), max(values)
    step = next((step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 6), 0.25)
    low, high = math.floor(low / step - 0.25) * step, math.ceil(high / step + 0.25) * step
    return max(0.0, low), high, step


def _spans(names: Sequence[str], left: float, pitch: float) -> tuple[Span, ...]:
    """Neighbours with the same first number in their name, as `encoder.layer.3.` has 3, are one block."""
    blocks: list[tuple[str, int, int]] = []
    for index, name in enumerate(names):
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        label = found[1] if found else ""
        if blocks and blocks[-1][0] == label:
            blocks[-1] = (label, blocks[-1][1], index + 1)
        else:
            blocks.append((label, index, index + 1))
    every = max(1, math.ceil(len(blocks) / 32))
    return tuple(
        Span(left + pitch * start, pitch * (stop - start), label if number % every == 0 else "", number % 2 == 0)
        for number, (label, start, stop) in enumerate(blocks)
    )
