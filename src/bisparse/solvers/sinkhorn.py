"""Entropic transport with capacities, then rounding: the family of approximations that TSENOR belongs to.

At a temperature T the fractional mask that maximises ``<w, x> + T entropy(x)`` is ::

    x_ij = exp((w_ij - u_i - v_j - c_ij) / T)      u, v: prices of full rows and columns, c: of full entries (x_ij = 1)

and its prices are found by setting u, v and c in turn, while T falls. Entries are then kept from the largest margin
``w_ij - u_i - v_j`` down while neither their row nor their column is full, and short rows and columns are filled by swaps, as in
`Greedy`.

Guarantee: none on the value; the mask is always feasible. It approaches the optimum as T falls and the iterations increase.
Cost: two exponentials per entry and iteration, then as `Greedy`.
Source: Meng, Makni, Mazumder, TSENOR (2025, arXiv 2505.23949), whose rounding this is too; the turns are Dykstra's projections
in the log domain, Benamou et al., SIAM J. Sci. Comput. 37 (2015).
Departures: T falls geometrically and the prices are over-relaxed, which needs fewer iterations (``relaxation=1`` and equal
temperatures are the plain iteration); for "at most N" prices stay non-negative, so that a row may stop short; sums run in a
fixed order, so that a tile's mask does not depend on its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from bisparse.arguments import is_number
from bisparse.solvers.rounding import chunks, fill, fill_chunks, heavy_to_light, keep_in_order
from bisparse.solvers.solver import Solver

__all__ = ["Sinkhorn"]

COLDEST = -80.0
"""Exponents are clamped to this: below it float32 results are subnormal, which is slow and changes nothing."""


@dataclass(frozen=True)
class Sinkhorn(Solver):
    """Near-optimal masks from dense tensor operations alone, on any device, without a proof.

    Args:
        exactly: keep exactly N in every row and column, instead of at most N.
        iterations: number of (rows, columns, entries) updates. More are slower and better, and permit a lower temperature.
        temperature: the last temperature, as a fraction of each tile's range of scores.
        initial_temperature: the first one.
        relaxation: step length of the prices, above 0 and below 2; 1 is the plain iteration.

    >>> import torch
    >>> from bisparse import solve
    >>> solve(torch.tensor([[4.0, 3.0], [3.0, 1.0]]), "1:2-T", Sinkhorn()).value
    6.0
    """

    exactly: bool = False
    iterations: int = 60
    temperature: float = 0.01
    initial_temperature: float = 0.2
    relaxation: float = 1.8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "temperature", "initial_temperature", "relaxation"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"Sinkhorn({name}={getattr(self, name)!r:.60}): expected a number")
        if self.iterations < 1:
            raise ValueError(f"Sinkhorn(iterations={self.iterations}): at least 1 is needed")
        if not 0 < self.temperature <= self.initial_temperature < math.inf:
            raise ValueError(
                f"Sinkhorn(temperature={self.temperature}, initial_temperature={self.initial_temperature}): "
                "needs 0 < temperature <= initial_temperature"
            )
        if not 0 < self.relaxation < 2:
            raise ValueError(f"Sinkhorn(relaxation={self.relaxation}): must be above 0 and below 2")

    def solve_tiles(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        return torch.cat([self._solve_chunk(chunk, n) for chunk in chunks(scores)])

    def _solve_chunk(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        margins = torch.cat([self._margins(piece, n) for piece in fill_chunks(scores)])
        return fill(scores, keep_in_order(heavy_to_light(margins), n, scores.shape[-1]), n, self.exactly)

    def _margins(self, scores: Real[Tensor, "B M M"], n: int) -> Float[Tensor, "B M M"]:
        w = _unit_range(scores).permute(1, 2, 0).contiguous()
        m, _, tiles = w.shape
        u, v, c = w.new_zeros(m, 1, tiles), w.new_zeros(1, m, tiles), torch.zeros_like(w)
        for turn in range(self.iterations):
            progress = turn / max(1, self.iterations - 1)
            temperature = self.initial_temperature * (self.temperature / self.initial_temperature) ** progress
            u = self._step(u, _price(w - c - v, 1, n, temperature))
            c = (w - u - v).clamp_(min=0)
            v = self._step(v, _price(w - c - u, 0, n, temperature))
            c = (w - u - v).clamp_(min=0)
        return (w - u - v).permute(2, 0, 1)

    def _step(self, price: Float[Tensor, "..."], target: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        price = price + (target - price) * self.relaxation
        return price if self.exactly else price.clamp_(min=0)


def _unit_range(scores: Real[Tensor, "B M M"]) -> Float[Tensor, "B M M"]:
    """Each tile's scores moved to [0, 1] in float32; a constant tile becomes zeros."""
    if not scores.is_floating_point():
        scores = scores.long()  # so that subtracting is exact
    elif scores.dtype != torch.float64:
        scores = scores.float()
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    span = high - low
    return ((scores - low) / torch.where(span > 0, span, 1)).float()


def _price(reduced: Float[Tensor, "M M B"], side: int, n: int, temperature: float) -> Float[Tensor, "..."]:
    """The price at which the fractional entries of each line sum to n."""
    top = reduced.amax(side, keepdim=True)
    terms = reduced.sub_(top).mul_(1 / temperature).clamp_(min=COLDEST).exp_()
    return _fixed_order_sum(terms, side).log_().sub_(math.log(n)).mul_(temperature).add_(top)


def _fixed_order_sum(terms: Float[Tensor, "M M B"], side: int) -> Float[Tensor, "..."]:
    """Sum over a dimension by halves: elementwise, so that rounding does not depend on a tile's position in the batch."""
    while (length := terms.shape[side]) > 1:
        half = length // 2
        total = terms.narrow(side, 0, half) + terms.narrow(side, half, half)
        if length % 2:
            total.narrow(side, 0, 1).add_(terms.narrow(side, length - 1, 1))
        terms = total
    return terms
