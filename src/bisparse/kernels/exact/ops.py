"""The exact solver's operators as typed functions, by device."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from bisparse.kernels.exact.schema import FAST_BITS, NEEDS_EXACT, BadScoreError, check_scores
from bisparse.kernels.registration import call, is_plain_on_cpu

__all__ = [
    "FAST_BITS",
    "NEEDS_EXACT",
    "BadScoreError",
    "Prices",
    "any_coarse",
    "check_scores",
    "exact_mask",
    "exact_mask_of_magnitudes",
    "exact_solve",
    "exact_solve_integers",
    "is_coarse",
    "keep_largest",
    "prices_of_masks",
]


def stack(x: Tensor, y: Tensor) -> Tensor:
    """`torch.stack`; on CPU without torch's threads, which spin after their work and occupy cores that our threads need."""
    return torch.from_numpy(np.stack([x.numpy(), y.numpy()])) if x.device.type == "cpu" else torch.stack([x, y])


def is_coarse(exponent: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Which tiles need the exact mode; on CPU without torch's threads."""
    return (
        torch.from_numpy(exponent.numpy() == NEEDS_EXACT)
        if type(exponent) is Tensor and exponent.is_cpu
        else exponent == NEEDS_EXACT
    )


def any_coarse(coarse: Bool[Tensor, " B"]) -> bool:
    """Whether any tile needs the exact mode; on CPU without torch's threads."""
    return bool(np.count_nonzero(coarse.numpy()) if type(coarse) is Tensor and coarse.is_cpu else coarse.any())


def keep_largest(groups: Real[Tensor, "G M"], n: int) -> Bool[Tensor, "G M"]:
    """The n largest of every group; of equal scores the one with the lower index."""
    mask: Tensor = call("keep_largest", groups, n)
    return mask


def exact_mask(scores: Float[Tensor, "R C"], n: int, m: int, exactly: bool) -> tuple[Bool[Tensor, "R C"], Bool[Tensor, " B"]]:
    """Optimal mask of the tiles of a float32 matrix whose sides m divides, and which tiles are coarse (`NEEDS_EXACT`).

    On a GPU float16 and bfloat16 are read directly, and a tile with a bad score is marked coarse, so that nothing synchronises.

    Raises:
        BadScoreError: a score is NaN, infinite or negative; not on a GPU.
    """
    mask, coarse = call("exact_mask", scores, n, m, exactly)
    return mask, coarse


def exact_mask_of_magnitudes(weight: Float[Tensor, "R C"], exactly: bool) -> tuple[Bool[Tensor, "R C"], Bool[Tensor, " B"]]:
    """`exact_mask` at 2:4 of a weight's magnitudes; on a GPU the weight is read directly, without synchronisation."""
    mask, coarse = torch.ops.bisparse.exact_mask_of_magnitudes(weight, exactly)
    return mask, coarse


Prices = tuple[Int[Tensor, "B M"], Int[Tensor, "B M"], Int[Tensor, " B"]]
"""Row and column prices (u, v) and the exponent of each tile; all int32."""


def exact_solve(
    scores: Float[Tensor, "R C"], n: int, m: int, exactly: bool, start: Prices | None = None
) -> tuple[Bool[Tensor, "R C"], Int[Tensor, "B M"], Int[Tensor, "B M"], Int[Tensor, " B"]]:
    """Mask, u, v and exponent; where the exponent is `NEEDS_EXACT`, the tile's other results are invalid.

    Args:
        start: the prices of an earlier solve of nearly the same scores.
    """
    before = (None, None) if start is None else (stack(start[0], start[1]), start[2])
    mask, prices, exponent = call("exact_solve", scores, n, m, exactly, *before)
    return mask, *prices.unbind(), exponent


def prices_of_masks(scores: Float[Tensor, "R C"], mask: Bool[Tensor, "R C"], exactly: bool) -> Prices | None:
    """Prices that prove 2:4-T masks optimal, of float32 scores without coarse tiles: a quarter of `exact_solve`'s time.

    None where there is no kernel for this, as on a GPU and for narrow matrices, and if a mask is infeasible or not optimal.
    """
    if not is_plain_on_cpu(scores) or not scores.numel():
        return None
    from bisparse.kernels.exact.cpu import prices_2to4

    return prices_2to4.prices_of_masks(scores, mask, exactly)


def exact_solve_integers(
    q: Int[Tensor, "B M M"], n: int, exactly: bool, start: tuple[Int[Tensor, "B M"], Int[Tensor, "B M"]] | None = None
) -> tuple[Bool[Tensor, "B M M"], Int[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Optimal masks and prices (int64) of tiles of integer scores, int64, non-negative, below 2**55; n < M.

    Raises:
        ValueError: scores or start prices of another shape or dtype, scores out of range, N not between 1 and M - 1.
    """
    u, v = start if start is not None else (None, None)
    result = call("exact_solve_integers", q, n, exactly, u, v)
    return result[0], result[1], result[2]
