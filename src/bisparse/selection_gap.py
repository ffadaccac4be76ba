"""How far a mask is from the best one: N:M, sequential, paired and unstructured, by comparing scores. Calls no solver."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Real, Shaped
from torch import Tensor

from bisparse.gap import bands_of_tiles, first_true, flat_bands
from bisparse.kernels.figures.cpu import all_optimal
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured

__all__ = ["selection_failure", "selection_gap"]


class _Poor(NamedTuple):
    """Groups of a band that keep less than the best selection."""

    place: str
    best: float
    kept: float
    """Of the first one."""
    more: float
    """The total that all of them could keep in addition."""


def selection_failure(matrices: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], pattern: Structure) -> str | None:
    """A sentence about the first group whose mask keeps less than it could; None if all are optimal.

    N:M and unstructured masks are judged by comparing scores, exactly. Sums of pairs and windows are exact for integers below
    2**57; those of other scores have a relative error of up to M * 2**-52 of their group's sum, and no less is called a failure.
    """
    for poor in _poor_groups(matrices, mask, pattern, proof=True):
        return f"{poor.place}: the mask keeps {poor.kept!r}, but {poor.best!r} can be kept at {pattern}"
    return None


def selection_gap(matrices: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], pattern: Structure) -> float:
    """How much more can be kept than the mask keeps, in score units; as exact as `selection_failure` says."""
    if isinstance(pattern, Pattern) and all_optimal(matrices, mask, pattern.n, pattern.m):
        return 0.0
    return sum(poor.more for poor in _poor_groups(matrices, mask, pattern, proof=False))


def _poor_groups(matrices: Tensor, mask: Tensor, pattern: Structure, proof: bool) -> Iterator[_Poor]:
    if isinstance(pattern, Unstructured):
        for index, (scores, kept) in enumerate(zip(matrices, mask, strict=True)):
            n = pattern.kept(scores.numel())
            if scores.numel() and _matrix_is_poor(scores, kept, n):
                yield _poor(f"matrix {index}", *_best_and_own(scores.reshape(-1, 1), kept.reshape(-1, 1), n))
        return
    assert isinstance(pattern, Pattern | Sequential | Paired)
    m, n = pattern.m, pattern.n
    for batch, rows, _ in bands_of_tiles(matrices.shape, 1, m):
        scores, kept = (_groupsfirst_true(part[batch, rows], m) for part in (matrices, mask))
        if isinstance(pattern, Pattern):
            scores = _comparable(scores)
            poor = _is_poor(scores, kept, n)
            if (first := first_true(poor)) is None:
                continue
            best, own = _best_and_own(scores[:, poor], kept[:, poor], n)
        else:
            best, own, bar = _sums(scores, kept, pattern)
            poor = best - own > (bar if proof else 0)
            if (first := first_true(poor)) is None:
                continue
            best, own = best[None, poor], own[None, poor]
        groups = -(-matrices.shape[-1] // m)
        height = matrices[batch, rows].shape[1]
        matrix, row, group = batch.start + first // (groups * height), rows.start + first // groups % height, first % groups
        yield _poor(f"matrix {matrix}, row {row}, group {group}" if len(matrices) > 1 else f"row {row}, group {group}", best, own)


def _poor(place: str, best: Real[Tensor, "N G"], own: Real[Tensor, "N G"]) -> _Poor:
    more = (best - own).double().sum()
    return _Poor(place, float(best[:, 0].double().sum()), float(own[:, 0].double().sum()), float(more))


def _comparable(scores: Real[Tensor, "*S"]) -> Real[Tensor, "*S"]:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _groupsfirst_true(matrices: Shaped[Tensor, "B O I"], m: int) -> Shaped[Tensor, "M G"]:
    groups = torch.nn.functional.pad(matrices, (0, -matrices.shape[-1] % m)) if matrices.shape[-1] % m else matrices
    return groups.unflatten(-1, (-1, m)).permute(3, 0, 1, 2).reshape(m, -1)


def _is_poor(scores: Real[Tensor, "M G"], mask: Bool[Tensor, "M G"], n: int) -> Bool[Tensor, " G"]:
    """Whether something pruned is larger than something kept or, where fewer than n are kept, than zero."""
    largest = math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max
    least_kept = torch.where(mask, scores, largest).amin(0)
    most_pruned = torch.where(mask, 0, scores).amax(0)
    return torch.where(mask.sum(0) < n, most_pruned > 0, least_kept < most_pruned)


def _matrix_is_poor(scores: Real[Tensor, "O I"], mask: Bool[Tensor, "O I"], n: int) -> bool:
    """`_is_poor` of a whole matrix, in bands."""
    least, most = [], []
    for band, kept in flat_bands(scores, mask):
        assert kept is not None
        numbers = _comparable(band)
        largest = math.inf if numbers.is_floating_point() else torch.iinfo(numbers.dtype).max
        least.append(torch.where(kept, numbers, largest).amin())
        most.append(torch.where(kept, 0, numbers).amax())
    most_pruned = torch.stack(most).amax()
    return bool(most_pruned > 0 if int(mask.sum()) < n else torch.stack(least).amin() < most_pruned)


def _best_and_own(scores: Real[Tensor, "M G"], mask: Bool[Tensor, "M G"], n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each group and what its mask keeps, both from the largest down: line by line, the first is no less."""
    scores = scores.double() if scores.is_floating_point() else scores.long()
    best, own = (part.sort(0, descending=True).values[:n] for part in (scores, torch.where(mask, scores, 0)))
    return best, own


def _sums(
    scores: Real[Tensor, "M G"], mask: Bool[Tensor, "M G"], pattern: Sequential | Paired
) -> tuple[Real[Tensor, " G"], Real[Tensor, " G"], Real[Tensor, " G"]]:
    """Per group: the largest sum that can be kept, the sum that is kept, and the bound on their rounding errors."""
    m, n = pattern.m, pattern.n
    if scores.is_floating_point() or int(scores.amax()) >= 1 << 57:
        scores = scores.double()
        bar = scores.sum(0) * (m * 2.0**-52)
    else:
        scores = scores.long()
        bar = torch.zeros_like(scores[0])
    own = torch.where(mask, scores, 0).sum(0)
    if isinstance(pattern, Paired):
        pairs = scores.unflatten(0, (-1, 2)).sum(1)
        return pairs.sort(0, descending=True).values[: n // 2].sum(0), own, bar
    zeros = m - n
    if zeros == 0:
        return scores.sum(0), own, bar
    kept = [torch.cat([scores[:start], scores[start + zeros :]]).sum(0) for start in range(n + 1)]
    return torch.stack(kept).amax(0), own, bar
