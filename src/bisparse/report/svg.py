"""Geometry of the report's own pictures: tiles of real weights, and figures by layer. The markup is the templates'."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bisparse.checkpoint import SampleTile
from bisparse.pattern import Structure
from bisparse.report.figures import PrunedFigures

__all__ = ["Chart", "Dot", "Reference", "Span", "TilePicture", "chart_of_errors", "chart_of_layers", "picture_of_tile"]

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
class Frame:
    """Size of a chart and place of its plot, in pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    labels: int
    """Blocks whose number is printed, at most."""


WIDE = Frame(960.0, 320.0, 54.0, 944.0, 18.0, 284.0, 32)
NARROW = Frame(360.0, 260.0, 46.0, 354.0, 14.0, 222.0, 9)
"""For telephones: drawn again rather than shrunk, so that labels stay readable."""
ROOM_FOR_LABEL = 60.0
"""Right of the plot, for the name of a single reference line."""


@dataclass(frozen=True)
class Chart:
    """A figure of each layer, in the order of the network; one or more series."""

    frame: Frame
    ticks: tuple[tuple[float, str], ...]
    spans: tuple[Span, ...]
    series: tuple[tuple[str, tuple[Dot, ...]], ...]
    references: tuple[Reference, ...]
    radius: float


def chart_of_layers(pruned: Sequence[PrunedFigures], gaussian: Sequence[float], *, narrow: bool = False) -> Chart | None:
    """Retained score: one dot per layer and folder; None if no layer's retained score is known.

    Args:
        pruned: folders with the same layers, or nearly.
        gaussian: what each folder's pattern keeps of Gaussian weights, drawn as a line.
        narrow: for a screen of 400 pixels.
    """
    names = list(dict.fromkeys(layer.result.name for one in pruned for layer in one.layers))
    series = [
        (str(one.structure), {layer.result.name: share for layer in one.layers if (share := layer.result.retained) is not None})
        for one in pruned
    ]
    references = [
        (share, f"{one.structure} on Gaussian weights: {100 * share:.1f} %") for one, share in zip(pruned, gaussian, strict=True)
    ]
    return _chart(names, series, references, narrow)


def chart_of_errors(pruned: PrunedFigures, *, narrow: bool = False) -> Chart | None:
    """Relative output error of each layer with the mask alone and after the fit; None if no error was measured."""
    names = [layer.result.name for layer in pruned.layers]
    before = {layer.result.name: error for layer in pruned.layers if (error := layer.result.error_before) is not None}
    after = {layer.result.name: error for layer in pruned.layers if (error := layer.result.error) is not None}
    return _chart(names, [("mask alone", before), ("as saved", after)], [], narrow)


def _chart(
    names: Sequence[str], series: Sequence[tuple[str, dict[str, float]]], references: Sequence[tuple[float, str]], narrow: bool
) -> Chart | None:
    values = [value for _, own in series for value in own.values()]
    if not values:
        return None
    frame = NARROW if narrow else WIDE
    if len(references) == 1 and not narrow:
        frame = replace(frame, right=frame.width - ROOM_FOR_LABEL - 16)
    low, high, step = _scale([*values, *(value for value, _ in references)])
    pitch = (frame.right - frame.left) / len(names)

    def up(value: float) -> float:
        return frame.bottom - (value - low) / (high - low) * (frame.bottom - frame.top)

    return Chart(
        frame,
        tuple(
            (up(value), f"{100 * value:.{0 if step >= 0.01 else 1}f} %")
            for value in (low + step * index for index in range(round((high - low) / step) + 1))
        ),
        _spans(names, frame.left, pitch, frame.labels),
        tuple(
            (
                label,
                tuple(
                    Dot(frame.left + pitch * (place + 0.5), up(own[name]), name, f"{name}: {100 * own[name]:.2f} %", place)
                    for place, name in enumerate(names)
                    if name in own
                ),
            )
            for label, own in series
        ),
        tuple(Reference(up(value), label, index) for index, (value, label) in enumerate(references)),
        max(2.0, min(5.0, pitch * 0.36)),
    )


def _scale(values: Sequence[float]) -> tuple[float, float, float]:
    """Round limits around the values, and a step that divides their distance."""
    low, high = min(values), max(values)
    step = next((step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 6), 0.25)
    low, high = math.floor(low / step - 0.25) * step, math.ceil(high / step + 0.25) * step
    return max(0.0, low), high, step


def _spans(names: Sequence[str], left: float, pitch: float, labels: int) -> tuple[Span, ...]:
    """Neighbours with the same first number in their name, as `encoder.layer.3.` has 3, are one block."""
    blocks: list[tuple[str, int, int]] = []
    for index, name in enumerate(names):
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        label = found[1] if found else ""
        if blocks and blocks[-1][0] == label:
            blocks[-1] = (label, blocks[-1][1], index + 1)
        else:
            blocks.append((label, index, index + 1))
    every = max(1, math.ceil(len(blocks) / labels))
    return tuple(
        Span(left + pitch * start, pitch * (stop - start), label if number % every == 0 else "", number % 2 == 0)
        for number, (label, start, stop) in enumerate(blocks)
    )
