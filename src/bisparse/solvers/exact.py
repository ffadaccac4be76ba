"""The exact optimum with a proof: min-cost flow, solved primal-dual.

Guarantee: the mask is optimal for the scores as rounded to 24 bits of each tile's largest, or to 52 bits with ``strict=True``,
for float64, for integers from 2**52 on, and for tiles whose scores span too wide a range for 24 bits; its certificate proves it,
and `Solution.gap` bounds what rounding may have lost (see `bisparse.solution`).
Cost: about four sorts per row and column, and a shortest path per row or column that is then still unbalanced.
Source: the paper's section 4 reduces the problem to min-cost flow; Ahuja, Magnanti, Orlin, Network Flows (1993), chapter 9.
Departures: prices start from block coordinate descent on the dual instead of zero; at M = 4 the optimum is found by
meeting in the middle, without prices, which are computed from the mask when the certificate is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from bisparse.kernels.exact import ops, reference
from bisparse.solution import Certificate
from bisparse.solvers.solver import Guarantee, Solver
from bisparse.tiles import from_tiles, to_tiles

__all__ = ["Exact"]

FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_PRICE = 1 << 26
"""Every optimal price of 24-bit scores is below this."""


@dataclass(frozen=True)
class Exact(Solver):
    """The optimal mask, with a proof.

    Args:
        exactly: keep exactly N in every row and column, instead of at most N.
        strict: round float32, float16 and bfloat16 scores to 52 bits of each tile's largest instead of 24. Slower.
    """

    exactly: bool = False
    strict: bool = False
    exact: ClassVar[bool] = True
    checks_scores: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = Guarantee("kept", 1.0)

    def solve_tiles(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        m = scores.shape[-1]
        mask, _ = self.solve_matrix(scores.reshape(-1, m), n, m)
        return mask.reshape(-1, m, m)

    def solve_matrix(
        self, scores: Real[Tensor, "R C"], n: int, m: int, warm_start: Certificate | None = None
    ) -> tuple[Bool[Tensor, "R C"], Callable[[], Certificate | None]]:
        if n == m:  # everything is kept, which zero prices prove
            ops.check_scores(scores)
            return torch.ones_like(scores, dtype=torch.bool), lambda: self._certificate_of_all(scores, m)
        dtype = scores.dtype
        if self.strict or dtype not in FAST_DTYPES:
            ops.check_scores(scores)
            masks, certificate = self._solve_finely(to_tiles(scores, m), n)
            return from_tiles(masks, *scores.shape), lambda: certificate
        numbers = scores if dtype is torch.float32 or scores.is_cuda else scores.float()
        if (n, m) == (2, 4):
            mask, coarse = ops.exact_mask(numbers, n, m, self.exactly)
            if some_coarse := ops.any_coarse(coarse):
                mask = self._solve_coarse(scores, mask, coarse, n, m)[0]
            version = None if scores.is_inference() else scores._version

            def priced() -> Certificate | None:
                if version is not None and version != scores._version:
                    return None  # it would be one of other scores
                prices = None if some_coarse else ops.prices_of_masks(numbers, mask, self.exactly)
                if prices is not None:
                    return Certificate(*prices, self.exactly)
                return self._solve_with_prices(scores, numbers, n, m, None)[1]()

            return mask, priced
        return self._solve_with_prices(scores, numbers, n, m, warm_start)

    def _solve_with_prices(
        self, scores: Real[Tensor, "R C"], numbers: Float[Tensor, "R C"], n: int, m: int, warm_start: Certificate | None
    ) -> tuple[Bool[Tensor, "R C"], Callable[[], Certificate]]:
        start = None if warm_start is None or warm_start.exactly != self.exactly else _fast_prices(warm_start)
        mask, u, v, exponent = ops.exact_solve(numbers, n, m, self.exactly, start)
        coarse = ops.is_coarse(exponent)
        if not ops.any_coarse(coarse):
            return mask, lambda: Certificate(u, v, exponent, self.exactly)
        mask, certificate = self._solve_coarse(scores, mask, coarse, n, m)
        where = coarse.nonzero()[:, 0]
        u, v, exponent = u.long(), v.long(), exponent.long()
        u[where], v[where], exponent[where] = certificate.u, certificate.v, certificate.exponent
        return mask, lambda: Certificate(u, v, exponent, self.exactly)

    def _solve_coarse(
        self, scores: Real[Tensor, "R C"], mask: Bool[Tensor, "R C"], coarse: Bool[Tensor, " B"], n: int, m: int
    ) -> tuple[Bool[Tensor, "R C"], Certificate]:
        """Solve with 52 bits the tiles that 24 bits quantise too coarsely."""
        ops.check_scores(scores)  # a kernel on a GPU cannot raise and calls a tile coarse that holds no scores
        masks = to_tiles(mask, m).clone()
        masks[coarse], certificate = self._solve_finely(to_tiles(scores, m)[coarse], n)
        return from_tiles(masks, *scores.shape), certificate

    def _solve_finely(self, tiles: Real[Tensor, "B M M"], n: int) -> tuple[Bool[Tensor, "B M M"], Certificate]:
        q, exponent = reference.quantise_finely(tiles)
        masks, u, v = ops.exact_solve_integers(q, n, self.exactly)
        return masks, Certificate(u, v, exponent, self.exactly)

    def _certificate_of_all(self, scores: Real[Tensor, "R C"], m: int) -> Certificate:
        tiles = to_tiles(scores, m)
        if scores.dtype in FAST_DTYPES:
            power = torch.frexp(tiles.double().flatten(1).amax(1)).exponent.long() if len(tiles) else tiles.new_zeros(0).long()
            exponent = ops.FAST_BITS - power
        else:
            exponent = reference.quantise_finely(tiles)[1]
        zeros = torch.zeros(len(tiles), m, dtype=torch.int64, device=scores.device)
        return Certificate(zeros, zeros, exponent, self.exactly)


def _fast_prices(certificate: Certificate) -> ops.Prices:
    """Prices as start values of the fast mode. Those of tiles solved with 52 bits may not fit: these tiles start cold."""
    u, v, exponent = certificate.u, certificate.v, certificate.exponent
    if u.dtype == torch.int32:
        return u, v, exponent
    fit = ((u.abs() < LARGEST_PRICE) & (v.abs() < LARGEST_PRICE)).all(1) & (exponent.abs() < -ops.NEEDS_EXACT)
    u, v = (torch.where(fit[:, None], side, 0).int() for side in (u, v))
    return u, v, torch.where(fit, exponent, ops.NEEDS_EXACT).int()
