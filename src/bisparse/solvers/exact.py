"""The exact optimum with a proof: min-cost flow, solved primal-dual.

Guarantee: the mask is optimal for the scores as rounded to 24 bits of each tile's largest (see `bisparse.solution`), or for
the scores as given with ``strict=True`` and for float64 and integer scores; its certificate proves it.
Cost: about four sorts of each row and column, and a shortest path for each row or column the sorts leave unbalanced.
Source: the paper's section 4 reduces the problem to min-cost flow; Ahuja, Magnanti, Orlin, Network Flows (1993), chapter 9.
Departures: prices start from block coordinate descent on the dual instead of zero; at M = 4 the optimum is found by
meeting in the middle, without prices, which are computed when the certificate is first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from bisparse.kernels import ops, wide
from bisparse.solution import Certificate
from bisparse.solvers.solver import Guarantee, Solver
from bisparse.tiles import from_tiles, to_tiles

__all__ = ["Exact"]

FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Exact(Solver):
    """The best mask there is, and the proof.

    Args:
        exactly: keep exactly N in every row and column, instead of at most N.
        strict: take float32 scores as they are, instead of rounding each tile to 24 bits of its largest score. Slower.
    """

    exactly: bool = False
    strict: bool = False
    exact: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = Guarantee("kept", 1.0)

    def solve_tiles(self, scores: Float[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        m = scores.shape[-1]
        mask, _ = self.solve_matrix(scores.reshape(-1, m), n, m)
        return mask.reshape(-1, m, m)

    def solve_matrix(
        self, scores: Real[Tensor, "R C"], n: int, m: int, warm_start: Certificate | None = None
    ) -> tuple[Bool[Tensor, "R C"], Certificate | None]:
        if self.strict or scores.dtype not in FAST_DTYPES:
            return self._solve_as_given(scores, n, m)
        start = None
        if warm_start is not None:
            start = warm_start.u, warm_start.v, warm_start.exponent
        mask, u, v, exponent = ops.exact_solve(scores.float().contiguous(), n, m, self.exactly, start)
        coarse = exponent == ops.COARSE
        certificate = Certificate(u, v, exponent, self.exactly)
        if not bool(coarse.any()):
            return mask, certificate
        tiles, masks = to_tiles(scores, m), to_tiles(mask, m)
        solved, exact_certificate = wide.solve_tiles(tiles[coarse], n, self.exactly)
        raise AssertionError((masks, solved, exact_certificate))

    def mask_matrix(self, scores: Real[Tensor, "R C"], n: int, m: int) -> Bool[Tensor, "R C"]:
        """The mask alone, by the fastest way."""
        return self.solve_matrix(scores, n, m)[0]

    def _solve_as_given(self, scores: Real[Tensor, "R C"], n: int, m: int) -> tuple[Bool[Tensor, "R C"], Certificate]:
        masks, certificate = wide.solve_tiles(to_tiles(scores, m), n, self.exactly)
        return from_tiles(masks, *scores.shape), certificate
