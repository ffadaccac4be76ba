"""The interface of solvers of the transposable mask problem: scores of tiles in, masks out.

For each M x M tile with scores w >= 0::

    max  sum_ij w_ij x_ij    x in {0, 1},   every row and column sum at most N   (or exactly N)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Real
from torch import Tensor

from bisparse.solution import Certificate
from bisparse.tiles import from_tiles, to_tiles

__all__ = ["Guarantee", "Solver"]


class Guarantee(NamedTuple):
    """A worst-case guarantee: the result's `quantity` is within `factor` of the optimum's."""

    quantity: Literal["kept", "pruned"]
    factor: float


class Solver(ABC):
    """A solver is a frozen dataclass; its fields are its settings, and calling it twice gives the same mask.

    Final subclasses implement `solve_tiles`. Those that work on whole matrices override `solve_matrix` as well.
    """

    exact: ClassVar[bool] = False
    """Whether the mask is always optimal."""

    guarantee: ClassVar[Guarantee | None] = None
    """The approximation guarantee; None if none is proved."""

    checks_scores: ClassVar[bool] = False
    """Whether `solve_matrix` raises `BadScoreError` itself, so that `solve` need not read the scores beforehand."""

    exactly: bool = False
    """Keep exactly N in every row and column (the paper's program) instead of at most N (what hardware checks)."""

    def __post_init__(self) -> None:
        if not is_dataclass(self):
            return
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(one.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{type(self).__name__}({one.name}={value!r:.40}): expected True or False")
            if type(one.default) is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{type(self).__name__}({one.name}={value!r:.40}): expected a whole number")

    @abstractmethod
    def solve_tiles(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        """Masks of a batch of tiles. Scores are finite and non-negative (`solve` has checked); B may be 0."""

    def solve_matrix(
        self, scores: Real[Tensor, "R C"], n: int, m: int, warm_start: Certificate | None = None
    ) -> tuple[Bool[Tensor, "R C"], Callable[[], Certificate | None]]:
        """Mask of a matrix whose sides `m` divides, and a function that gives the certificate, where the solver has one.

        `warm_start` holds the prices of an earlier solve of nearly the same scores. It may be ignored, and the value of the
        mask does not depend on it.
        """
        tiles = to_tiles(scores, m)
        mask = self.solve_tiles(tiles, n)
        self._check(mask, tiles, n)
        return from_tiles(mask, scores.shape[0], scores.shape[1]), lambda: None

    def _check(self, mask: object, tiles: Tensor, n: int) -> None:
        """Raise ValueError unless `solve_tiles` has returned a feasible mask, so that a faulty solver is noticed at once."""
        name, shape = f"{type(self).__name__}.solve_tiles", tuple(tiles.shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != tiles.shape:
            given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name} returned {given}: expected a bool tensor of shape {shape}, True = kept")
        most = torch.maximum(mask.sum(-1).amax(-1), mask.sum(-2).amax(-1)) if len(mask) else mask.new_zeros(0, dtype=torch.int64)
        if bool((most > n).any()):
            tile = int((most > n).int().argmax())
            raise ValueError(f"{name}: tile {tile} keeps {int(most[tile])} in a row or column, and the pattern at most {n}")
