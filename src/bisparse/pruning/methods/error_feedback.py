"""Columns of a weight replaced from left to right, each one's error spread over those after: what SparseGPT and GPTQ share.

Source: Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["feed_back", "upper_inverse"]


def upper_inverse(gram: Float[Tensor, "K K"], name: str, damping: float | None = None) -> Float[Tensor, "K K"]:
    """The upper Cholesky factor of the inverse of damped input moments; its row j updates the columns after column j.

    Raises:
        ValueError: the moments are singular; names the layer.
    """
    factor, info = torch.linalg.cholesky_ex(gram.double())
    if int(info):
        at = "" if damping is None else f" at damping {damping}"
        raise ValueError(
            f"{name}: its {factor.shape[0]} x {factor.shape[0]} input moments are singular{at}; raise the damping or give more "
            "calibration data"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()


def feed_back(
    weight: Float[Tensor, "O K"], upper: Float[Tensor, "K K"], columns: slice, replacement: Callable[[Tensor, int], Tensor]
) -> None:
    """Replace some columns and spread their error over all later ones, in place.

    Args:
        upper: see `upper_inverse`.
        replacement: called with a column, as those before have left it, and its place among the columns; returns the new one.
    """
    factor = upper[columns, columns]
    band = weight[:, columns].clone()
    errors = torch.empty_like(band)
    for j in range(band.shape[1]):
        new = replacement(band[:, j], j)
        errors[:, j] = (band[:, j] - new) / factor[j, j]
        band[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
        band[:, j] = new
    weight[:, columns] = band
    weight[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
