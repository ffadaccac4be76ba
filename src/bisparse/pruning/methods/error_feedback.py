"""Columns of a weight replaced from left to right, each one's error spread over those after: what SparseGPT and GPTQ share.

Source: Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774, algorithm 1, with its lazy updates: the errors of a
block of columns reach the columns after the block in one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BLOCK", "ColumnSweep", "upper_inverse"]

BLOCK = 128
"""Columns of a block, as in the source."""
SMALL = 256
"""Triangular matrices up to this size are inverted by substitution, larger ones by halves, whose products are faster."""


def upper_inverse(gram: Float[Tensor, "K K"], name: str, damping: float | None = None) -> Float[Tensor, "K K"]:
    """The upper Cholesky factor of the inverse of damped input moments; its row j updates the columns after column j.

    With ``gram = R R^T`` and R upper triangular, which is the Cholesky factor of the moments in reverse order, it is the inverse
    of R: half the work of inverting the moments first. R is found in float64, since moments may be close to singular, and
    inverted in float32, since its condition is the square root of theirs.

    Raises:
        ValueError: the moments are singular; names the layer.
    """
    factor, info = torch.linalg.cholesky_ex(gram.flip(0, 1).double())
    if int(info):
        at = "" if damping is None else f" at damping {damping}"
        raise ValueError(
            f"{name}: its {factor.shape[0]} x {factor.shape[0]} input moments are singular{at}; raise the damping or give more "
            "calibration data"
        )
    return _inverse(factor.float().flip(0, 1)).contiguous()


def _inverse(upper: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """The inverse of an upper triangular matrix."""
    size = len(upper)
    if size <= SMALL:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True)
    half = size // 2
    inverse = torch.zeros_like(upper)
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ upper[:half, half:] @ last)
    return inverse


class ColumnSweep:
    """Replaces the columns of a weight from left to right, in place, and spreads the error of each over those after it.

    Args:
        upper: see `upper_inverse`.
    """

    def __init__(self, weight: Float[Tensor, "O K"], upper: Float[Tensor, "K K"]) -> None:
        self._weight, self._upper = weight, upper
        self._errors: list[Tensor] = []
        """Of columns whose errors have only reached the columns before `_end`."""
        self._start = 0
        """The first of these columns."""
        self._end = 0

    def current(self, columns: slice) -> Float[Tensor, "O C"]:
        """Some columns as those before them have left them; the first of them is the next to be replaced."""
        if columns.stop > self._end:
            if self._errors:
                errors = torch.cat(self._errors, 1)
                self._weight[:, self._end :] -= errors @ self._upper[self._start : columns.start, self._end :]
            self._errors, self._start = [], columns.start
            self._end = max(columns.stop, columns.start + BLOCK)
        return self._weight[:, columns]

    def replace(self, columns: slice, replacement: Callable[[Tensor, int], Tensor]) -> None:
        """Replace the next columns.

        Args:
            replacement: called with a column, as those before have left it, and its place among the columns; returns the new one.
        """
        band = self.current(columns).clone()
        factor, errors = self._upper[columns, columns], torch.empty_like(band)
        for j in range(band.shape[1]):
            new = replacement(band[:, j], j)
            errors[:, j] = (band[:, j] - new) / factor[j, j]
            band[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
            band[:, j] = new
        self._weight[:, columns] = band
        soon = slice(columns.stop, self._end)
        self._weight[:, soon] -= errors @ self._upper[columns, soon]
        self._errors.append(errors)
