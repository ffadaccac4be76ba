"""The operators of the exact solver: schemas, result shapes and what their arguments must be. Knows no backend."""

from __future__ import annotations

import torch
from torch import Tensor

from bisparse.kernels.registration import define

__all__ = ["COARSE", "COARSE_BELOW", "FAST_BITS", "TINY", "BadScoreError", "check_scores"]

FAST_BITS = 24
COARSE = -(1 << 30)
"""In place of an exponent: this tile's scores span too wide a range for the fast mode; solve it exactly instead."""
TINY = 2.0**-103
"""A tile whose largest score is below this counts as coarse too: its scale would overflow float32."""
COARSE_BELOW = 1 << 12
"""A quantised score below this has lost precision; a tile where that holds for over half of its non-zero scores is coarse."""


class BadScoreError(ValueError):
    """A score is NaN, infinite or negative."""


def check_scores(scores: Tensor) -> None:
    """Raise `BadScoreError` at the first score that is NaN, infinite or negative, with its index and a remedy."""
    bad = scores < 0
    if scores.is_floating_point():
        bad = bad | ~torch.isfinite(scores)
    if not bool(bad.any()):
        return
    index = tuple(bad.nonzero()[0].tolist())
    number = scores[index].item()
    remedy = "scores are magnitudes: pass weight.abs()" if number < 0 else "repair or exclude that weight first"
    raise BadScoreError(
        f"scores of shape {tuple(scores.shape)} hold {number} at index {index}; they must be finite and >= 0: {remedy}"
    )


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
