"""Stored times of Linear layers over sizes and tokens, to predict layers for a GPU on a machine without it.

A file is JSON: device, dtype, versions, commit and date of the measurement, and one row per point. Between points, the logarithm
of a time is interpolated linearly in the logarithms of out_features, in_features and tokens, which is exact if time is a product
of powers of the sizes. Nothing is predicted outside of what was measured.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from bisparse.accelerate.timing import Pass, Timing
from bisparse.apart import read_text
from bisparse.atomic_file import atomic_file, check_output_file

__all__ = ["Grid", "GridPoint", "stored_grids"]

FORMAT = 1


@dataclass(frozen=True)
class GridPoint:
    """One measured layer."""

    out_features: int
    in_features: int
    tokens: int
    backend: str
    training: bool
    """Whether both passes were timed, with float32 weights under autocast; otherwise only the forward pass."""
    both_ways: bool
    """Whether the gradient of the input is sparse too."""
    timing: Timing


@dataclass(frozen=True)
class Grid:
    """The measured points of one device."""

    device: str
    dtype: str
    points: tuple[GridPoint, ...]
    about: dict[str, Any] = field(default_factory=dict)
    """Versions, commit and date of the measurement."""

    @staticmethod
    def read(path: str | Path) -> Grid:
        """Read a grid from its file.

        Raises:
            ValueError: the file is not a grid, or has a different format version.
        """
        try:
            content = json.loads(read_text(path))
            if content.get("format") != FORMAT:
                raise ValueError(f"format {content.get('format')!r}; this release reads {FORMAT}")
            points = tuple(
                GridPoint(**{**row, "timing": Timing(Pass(**row["timing"]["dense"]), Pass(**row["timing"]["sparse"]))})
                for row in content["points"]
            )
            grid = Grid(content["device"], content["dtype"], points, content["about"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a grid of measured times ({error}); `make bench-gpu` writes one") from error
        if any(min(one.timing.dense.forward_ms, one.timing.sparse.forward_ms) <= 0 for one in grid.points):
            raise ValueError(f"{path} is not a grid of measured times: it has a forward time that is not positive")
        return grid

    def write(self, path: str | Path) -> None:
        """Write the grid to a file that `read` accepts."""
        check_output_file(path, replaces={"a grid of measured times": (b"{",)})
        content = {"format": FORMAT, **asdict(self)}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def predict(self, shape: tuple[int, int], tokens: int, backend: str, *, training: bool, both_ways: bool) -> Timing | None:
        """The times of a layer of shape (out_features, in_features); None if it is outside of the measured points."""
        kind = (backend, training, both_ways)
        points = {
            (one.out_features, one.in_features, one.tokens): one.timing
            for one in self.points
            if (one.backend, one.training, one.both_ways) == kind
        }
        corners = [_around(sorted({point[axis] for point in points}), size) for axis, size in enumerate((*shape, tokens))]
        weighted = []
        for corner in itertools.product(*corners):
            timing = points.get((corner[0][0], corner[1][0], corner[2][0]))
            if timing is None:
                return None
            weighted.append((math.prod(weight for _, weight in corner), timing))
        if not weighted:
            return None
        passes = []
        for side in ("dense", "sparse"):
            own = [(weight, getattr(timing, side)) for weight, timing in weighted]
            peaks = [(weight, float(one.peak_bytes or 0)) for weight, one in own]
            known = all(one.peak_bytes is not None for _, one in own)
            passes.append(
                Pass(
                    _mean((weight, one.forward_ms) for weight, one in own),
                    _mean((weight, one.backward_ms) for weight, one in own),
                    round(_mean(peaks)) if known else None,
                )
            )
        return Timing(*passes)


def stored_grids() -> dict[str, Grid]:
    """The grids that come with the package, by device name."""
    folder = resources.files("bisparse.accelerate") / "grids"
    if not folder.is_dir():
        return {}
    found = {}
    for file in sorted(folder.iterdir(), key=lambda one: one.name):
        if file.name.endswith(".json"):
            with resources.as_file(file) as path:
                grid = Grid.read(path)
            found[grid.device] = grid
    return found


def _around(sizes: list[int], size: int) -> list[tuple[int, float]]:
    """The measured sizes on both sides of a size, with interpolation weights; empty if it is outside."""
    place = bisect.bisect_left(sizes, size)
    if place < len(sizes) and sizes[place] == size:
        return [(size, 1.0)]
    if place in (0, len(sizes)):
        return []
    low, high = sizes[place - 1], sizes[place]
    weight = math.log(size / low) / math.log(high / low)
    return [(low, 1 - weight), (high, weight)]


def _mean(weighted: Any) -> float:
    """The weighted geometric mean; 0 if a number is 0."""
    pairs = list(weighted)
    if any(value <= 0 for _, value in pairs):
        return 0.0
    return math.exp(sum(weight * math.log(value) for weight, value in pairs))
