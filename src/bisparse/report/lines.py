"""Geometry of the line charts that show how the masks of a training run evolved. The markup is the templates'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bisparse.report.svg import Frame
from bisparse.results import MaskPoint

__all__ = ["LineChart", "lines_of_history"]

WIDE = Frame(560.0, 280.0, 60.0, 526.0, 40.0, 236.0, 6)
NARROW = Frame(360.0, 240.0, 52.0, 334.0, 36.0, 196.0, 4)
"""For telephones. `labels` is the number of steps between the marks of an axis, at most."""
DOTTED = 40
"""Up to this many points have a dot each; longer lines only have one at each end."""
MIN_RANGE = 4e-4
"""Smallest difference of fractions that fills the height of a chart, so that rounding does not look like a change."""
COMPACT = 10_000_000
"""Steps from this on are written with an exponent."""


@dataclass(frozen=True)
class LineChart:
    """A figure over the optimizer steps of a run."""

    frame: Frame
    label: str
    """The chart in a sentence, with its first and last figure."""
    axis: str
    """What the vertical axis shows."""
    series: int
    """Number of its colour."""
    ticks: tuple[tuple[float, str], ...]
    """Heights and their labels."""
    marks: tuple[tuple[float, str], ...]
    """Steps, as positions and labels."""
    path: str
    dots: tuple[tuple[float, float, str], ...]
    """Position and text."""


def lines_of_history(points: Sequence[MaskPoint], *, narrow: bool = False) -> tuple[LineChart, ...]:
    """Flip rate, and fraction of the score kept, over the optimizer steps; none without points."""
    if not points:
        return ()
    flips, kept = [point.flip_rate for point in points], [point.retained for point in points]
    return (
        _line(points, flips, ("Flip rate of the masks", "flip rate: mask entries changed by a refresh"), 0, narrow, low=0.0),
        _line(points, kept, ("Fraction of the score kept", "fraction of the score kept"), 1, narrow, low=min(kept)),
    )


def _line(
    points: Sequence[MaskPoint], shares: Sequence[float], names: tuple[str, str], series: int, narrow: bool, *, low: float
) -> LineChart:
    frame = NARROW if narrow else WIDE
    last = max(points[-1].step, 1)
    bottom, top, height = _limits(low, max(shares), frame.labels)
    digits = max(0, -math.floor(math.log10(100 * height) + 1e-9))

    def across(step: float) -> float:
        return frame.left + step / last * (frame.right - frame.left)

    def up(share: float) -> float:
        return frame.bottom - (share - bottom) / (top - bottom) * (frame.bottom - frame.top)

    places = [(across(point.step), up(share)) for point, share in zip(points, shares, strict=True)]
    ends = {0, len(points) - 1}
    texts = [f"{_percent(share)} at optimizer step {point.step:,}" for point, share in zip(points, shares, strict=True)]
    width = max(1, round(_step(last / frame.labels)))
    return LineChart(
        frame,
        f"{names[0]}: {f'from {texts[0]} to {texts[-1]}' if len(points) > 1 else texts[0]}",
        names[1],
        series,
        tuple(
            (up(share), f"{100 * share:.{digits}f} %")
            for share in (bottom + height * index for index in range(round((top - bottom) / height) + 1))
        ),
        tuple((across(step), f"{step:,}" if last < COMPACT else f"{step:.3g}") for step in range(0, last + 1, width)),
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places),
        tuple((*place, text) for index, (place, text) in enumerate(zip(places, texts, strict=True))
              if len(points) <= DOTTED or index in ends),
    )  # fmt: skip


def _percent(share: float) -> str:
    """A fraction in percent, to three digits, however small it is."""
    return f"{100 * share:.3g} %"


def _step(least: float) -> float:
    """The smallest of ..., 1, 2, 5, 10, 20, ... that is at least this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least * (1 - 1e-9))


def _limits(low: float, high: float, steps: int) -> tuple[float, float, float]:
    """Round limits around fractions, within [0, 1], and a step that divides their distance."""
    if high - low < MIN_RANGE:
        low = min(max(0.0, (low + high - MIN_RANGE) / 2), 1 - MIN_RANGE)
        high = low + MIN_RANGE
    step = _step((high - low) / steps)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step
