"""The operators of the exact solver: schemas, result shapes and what their arguments must be. Knows no backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bisparse.kernels.registration import define

__all__ = [
    "FAST_BITS",
    "FINE_BITS",
    "LARGEST_PRICE",
    "LARGEST_START",
    "MIN_FINE_INTEGER",
    "NEEDS_EXACT",
    "TINY",
    "BadScoreError",
    "check_integers",
    "check_matrix",
    "check_scores",
    "check_start",
]

FAST_BITS = 24
NEEDS_EXACT = -(1 << 30)
"""Returned as exponent of a tile that 24 bits quantise too coarsely: solve it with `FINE_BITS` instead."""
FINE_BITS = 52
LARGEST_INTEGER = 1 << 55
"""Scores of `exact_solve_integers` are below this, so that no shortest path overflows 64 bits."""
LARGEST_START = 1 << 25
"""Start prices of 24-bit scores are clamped to this: no optimal price needs to be larger, and no sum of them overflows."""
LARGEST_PRICE = 1 << 30
"""A tile whose prices reach this is coarse: they would not fit 32 bits."""
TINY = 2.0**-103
"""A tile whose largest score is below this counts as coarse too: its scale would overflow float32."""
MIN_FINE_INTEGER = 1 << 12
"""A quantised score below this has lost precision; a tile with more than half of its non-zero scores below it is coarse."""


class BadScoreError(ValueError):
    """A score is NaN, infinite or negative."""


def check_scores(scores: Tensor) -> None:
    """Raise `BadScoreError` at the first score that is NaN, infinite or negative, with its index and a remedy."""
    if scores.numel() == 0:
        return
    least, largest = torch.aminmax(scores)  # one pass; NaN comes out of it
    if bool(least >= 0) and bool(largest < math.inf):
        return
    bad = scores < 0
    if scores.is_floating_point():
        bad = bad | ~torch.isfinite(scores)
    index = tuple(bad.nonzero()[0].tolist())
    number = scores[index].item()
    remedy = "scores are magnitudes: pass weight.abs()" if number < 0 else "repair or exclude that weight first"
    raise BadScoreError(
        f"scores of shape {tuple(scores.shape)} hold {number} at index {index}; they must be finite and >= 0: {remedy}"
    )


def check_matrix(scores: Tensor, n: int, m: int) -> None:
    """Raise ValueError unless a kernel may read and write by these shapes: a matrix whose sides M divides, 1 <= N < M."""
    if scores.ndim != 2 or m < 1 or scores.shape[0] % m or scores.shape[1] % m:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} are not a matrix whose sides are multiples of {m}; pad them first"
        )
    if not 1 <= n < m:
        raise ValueError(f"N = {n} is not between 1 and M - 1 = {m - 1}; N = M keeps everything and needs no solver")


def check_start(tiles: int, m: int, prices: Tensor, exponent: Tensor) -> None:
    """Raise ValueError unless the prices of an earlier solve have this one's shapes and hold integers."""
    if prices.shape != (2, tiles, m) or exponent.shape != (tiles,):
        given = tuple(prices.shape), tuple(exponent.shape)
        raise ValueError(f"a start of shapes {given[0]} and {given[1]}: expected {(2, tiles, m)} and {(tiles,)}")
    for part in (prices, exponent):
        if part.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"a start of dtype {part.dtype}: expected int32")


def check_integers(q: Tensor, n: int, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Check the arguments of `exact_solve_integers`; returns the start prices clamped to the range of the scores.

    Optimal prices exist within the range of a tile's scores, and larger ones could overflow sums.
    """
    if q.ndim != 3 or q.shape[1] != q.shape[2] or q.dtype != torch.int64:
        raise ValueError(f"integer scores of shape {tuple(q.shape)}, {q.dtype}: expected tiles (B, M, M) of int64")
    tiles, m, _ = q.shape
    if not 1 <= n < m:
        raise ValueError(f"N = {n} is not between 1 and M - 1 = {m - 1}; N = M keeps everything and needs no solver")
    if tiles:
        low, high = (int(bound) for bound in torch.aminmax(q))
        if low < 0 or high >= LARGEST_INTEGER:
            raise ValueError(f"integer scores from {low} to {high}: expected 0 to 2**55 - 1")
    if u is None and v is None:
        return None
    for side in (u, v):
        if side is None or side.shape != (tiles, m) or side.dtype != torch.int64 or side.device != q.device:
            given = "None" if side is None else f"shape {tuple(side.shape)}, {side.dtype}, on {side.device}"
            raise ValueError(f"start prices: {given}; expected u and v of shape ({tiles}, {m}), int64, on {q.device}")
    assert u is not None and v is not None
    limit = q.flatten(1).amax(1, keepdim=True) if tiles else q.new_zeros(0, 1)
    return torch.minimum(torch.maximum(u, -limit), limit), torch.minimum(torch.maximum(v, -limit), limit)


define("keep_largest(Tensor groups, int n) -> Tensor")
define("exact_mask(Tensor scores, int n, int m, bool exactly) -> (Tensor mask, Tensor coarse)")
define("exact_mask_of_magnitudes(Tensor weight, bool exactly) -> (Tensor mask, Tensor coarse)")
define(
    "exact_solve(Tensor scores, int n, int m, bool exactly, Tensor? prices, Tensor? exponent)"
    " -> (Tensor mask, Tensor prices, Tensor exponent)"
)
define("exact_solve_integers(Tensor q, int n, bool exactly, Tensor? u, Tensor? v) -> (Tensor mask, Tensor u, Tensor v)")


@torch.library.register_fake("bisparse::keep_largest")
def _(groups: Tensor, n: int) -> Tensor:
    return groups.new_empty(groups.shape, dtype=torch.bool)


@torch.library.register_fake("bisparse::exact_mask")
def _(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
    tiles = scores.shape[0] // m * (scores.shape[1] // m)
    return scores.new_empty(scores.shape, dtype=torch.bool), scores.new_empty(tiles, dtype=torch.bool)


@torch.library.register_fake("bisparse::exact_mask_of_magnitudes")
def _(weight: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.bool), weight.new_empty(weight.numel() // 16, dtype=torch.bool)


@torch.library.register_fake("bisparse::exact_solve")
def _(
    scores: Tensor, n: int, m: int, exactly: bool, prices: Tensor | None, exponent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = scores.shape[0] // m * (scores.shape[1] // m)
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    return mask, scores.new_empty((2, tiles, m), dtype=torch.int32), scores.new_empty(tiles, dtype=torch.int32)


@torch.library.register_fake("bisparse::exact_solve_integers")
def _(q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.bool), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
