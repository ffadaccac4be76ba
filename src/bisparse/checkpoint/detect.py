"""Which N:M patterns the weights of a checkpoint obey, on W and on W^T, band by band.

Counts of groups are differences of running sums: one sum along each axis serves every M. Groups along the stored rows may span
two bands, so the counts of unfinished groups are carried over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bisparse.checkpoint.bands import bands
from bisparse.checkpoint.coverage import Coverage, cover, matrix_sides, nonzero
from bisparse.checkpoint.layer_selection import NameFilter, StoredLayer
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.reader import Source, open_source
from bisparse.errors import CheckpointError
from bisparse.pattern import Pattern
from bisparse.tiles import Layout, to_matrices

__all__ = ["SIZES", "Detected", "cover_source", "detect_patterns"]

SIZES = (*range(2, 17), 32, 64)
"""Group sizes M that `detect_patterns` tests: every M from 2 to 16, and 32 and 64."""
BY_CHANCE = 0.8
"""A pattern is explained by a sparser one that allows at most 1 / 0.8 times as many weights in each of its groups."""
ANY_PATTERN = Pattern(1, 2)


@dataclass(frozen=True)
class Detected:
    """The patterns that a stored weight obeys."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    density: float
    patterns: tuple[Pattern, ...]
    """For each M the smallest N that holds on W, and on both W and W^T, if N < M and no side is shorter than M."""
    too_large: tuple[int, ...] = ()
    """Sizes M that were not tested on W, on W^T or on both, since that side is shorter and any group would fit."""

    @property
    def notable(self) -> tuple[Pattern, ...]:
        """The patterns that are not explained by another one and are not close to dense."""
        loosest = self.density + (1 - self.density) / 4
        return tuple(
            one for one in self.patterns if one.density <= loosest and not any(_explains(other, one) for other in self.patterns)
        )


def _explains(strict: Pattern, loose: Pattern) -> bool:
    """Whether the masks of one pattern obey another: 2:4-T implies 2:4, 2:4 implies 4:8 and 6:10, and 1:8 implies 1:4.

    So do patterns that random masks of the strict one may obey, with a few weights less per group than those always do.
    """
    if strict == loose or strict.transposable < loose.transposable:
        return False
    implied = max(_most(strict, start % strict.m, loose.m) for start in range(0, strict.m * loose.m, loose.m))
    return loose.n >= (implied if loose.density < strict.density else math.ceil(BY_CHANCE * implied))


def _most(strict: Pattern, start: int, length: int) -> int:
    """The most weights that a pattern keeps among `length` consecutive ones, from position `start` of a group on."""
    total, position = 0, start
    while position < start + length:
        end = min((position // strict.m + 1) * strict.m, start + length)
        total += min(strict.n, end - position)
        position = end
    return total


def cover_source(
    source: Source,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> Coverage:
    """The layers that `detect_patterns` examines, and a reason for each other layer.

    Raises:
        CheckpointError: there are none.
    """
    found = cover(source.tensors, source.config, ANY_PATTERN, include, exclude, metadata=source.metadata, layouts=layouts)
    if not found.checked and not found.unchecked:
        raise CheckpointError(source.path, "has no layer that a pattern applies to", "name tensors with --include")
    return found


def detect_patterns(
    path: str | Path,
    *,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    key: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Detected]:
    """Yield the N:M patterns that each layer of a checkpoint already obeys, one layer at a time, for each M of `SIZES`.

    Arguments as for `verify_checkpoint`.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no layers.
    """
    source = unpacked(open_source(path, key))
    layers = cover_source(source, include, exclude, layouts).checked
    total, done = sum(layer.tensor.nbytes for layer in layers), 0
    for layer in layers:
        if progress:
            progress(layer.name, done, total)
        yield _detect(layer)
        done += layer.tensor.nbytes
    source.check_unchanged()


def _detect(layer: StoredLayer) -> Detected:
    along, across = _FullestGroups(), _FullestGroups()
    kept = 0
    for band in bands(layer.tensor, layer.layout, 1):
        matrices = to_matrices(nonzero(band.weight), band.layout)
        if band.layout.inputs_first:  # so that rows of the matrices are stored rows
            matrices = matrices.transpose(1, 2)
        kept += int(matrices.sum())
        if band.row == 0:
            across.end()
        across.add(matrices, band.row)
        along.add(matrices.transpose(1, 2), 0)
        along.end()
    across.end()
    forward, backward = (across, along) if layer.layout.inputs_first else (along, across)
    found = []
    rows, columns = matrix_sides(layer)
    for m in SIZES:
        n, both = forward.most[m], max(forward.most[m], backward.most[m])
        judged = both < m <= min(rows, columns)
        if judged:
            found.append(Pattern(max(both, 1), m, transposable=True))
        if n < m <= columns and (n < both or not judged):
            found.append(Pattern(max(n, 1), m))
    density = kept / max(layer.tensor.size, 1)
    too_large = tuple(m for m in SIZES if m > min(rows, columns))
    return Detected(layer.name, layer.tensor.shape, layer.tensor.dtype, density, tuple(found), too_large)


class _FullestGroups:
    """The most weights kept in a group of M along the second axis, for each M of `SIZES`, over matrices given in pieces."""

    def __init__(self) -> None:
        self.most = dict.fromkeys(SIZES, 0)
        self._open: dict[int, Int[Tensor, "B C"]] = {}
        """By M, the counts of groups that the next piece continues."""

    def add(self, kept: Bool[Tensor, "B R C"], start: int) -> None:
        """Add the rows from `start` on."""
        rows = kept.shape[1]
        sums = torch.zeros(kept.shape[0], rows + 1, kept.shape[2], dtype=torch.int32, device="cpu")
        torch.cumsum(kept, 1, dtype=torch.int32, out=sums[:, 1:])
        for m in SIZES:
            first = -start % m
            before = self._open.pop(m, None)
            if first > rows:
                self._open[m] = sums[:, -1] if before is None else before + sums[:, -1]
                continue
            if before is not None:
                self._note(m, before + sums[:, first])
            ends = sums[:, first::m]
            if ends.shape[1] > 1:
                self._note(m, ends[:, 1:] - ends[:, :-1])
            self._open[m] = sums[:, -1] - ends[:, -1]

    def end(self) -> None:
        """No group continues: the next rows are those of other matrices."""
        for m, counts in self._open.items():
            self._note(m, counts)
        self._open.clear()

    def _note(self, m: int, counts: Tensor) -> None:
        if counts.numel():
            self.most[m] = max(self.most[m], int(counts.max()))
