"""When the compiled kernel prunes a block of columns, and its call; numba is imported at the first one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["applies", "prune_columns"]


def applies(weight: Float[Tensor, "O K"]) -> bool:
    """Whether the kernel takes a weight: plain, in float32, on the CPU."""
    return type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


def prune_columns(
    weight: Float[Tensor, "O K"],
    upper: Float[Tensor, "K K"],
    mask: Bool[Tensor, "O K"],
    scores: Float[Tensor, "O K"],
    columns: slice,
    n: int,
    m: int,
) -> Float[Tensor, "O C"] | None:
    """Prune columns in groups of M, in place, and spread each one's error over the later ones among them.

    Of equal scores, those with the lower index are kept; a last group of fewer than M columns keeps N of them, or all.

    Args:
        weight, upper, mask, scores: contiguous; mask and scores of the columns are written.

    Returns:
        The columns' errors, for those after; None if a score is not finite.
    """
    from bisparse.kernels.column_sweep.cpu import prune_columns as compiled

    return compiled(weight, upper, mask, scores, columns, n, m)
