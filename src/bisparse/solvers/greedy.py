"""Heavy to light: keep the largest score whose row and column still have room, then the next.

Guarantee: keeps at least half of what the best "at most N" mask keeps; filling never lowers it.
Cost: one sort of the M * M scores of a tile and M * M steps, each over all tiles at once.
Source: the rule that the code of Hubara et al. (2021, arXiv 2102.08124) runs in training, in place of the paper's Algorithm 1.
Departures: ``fill=True`` completes rows and columns that the rule leaves short; ``fill=False`` is their rule unchanged. Of equal
scores, the lower row comes first, then the lower column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Real
from torch import Tensor

from bisparse.solvers.rounding import chunks, fill, heavy_to_light, keep_in_order
from bisparse.solvers.solver import Guarantee, Solver

__all__ = ["Greedy"]


@dataclass(frozen=True)
class Greedy(Solver):
    """The largest scores first, while there is room; fast on any device, close to the best mask, without a proof.

    Args:
        exactly: keep exactly N in every row and column, instead of at most N. Needs `fill`.
        fill: complete rows and columns that the rule leaves short, where that raises the total.

    >>> import torch
    >>> from bisparse import solve
    >>> scores = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    >>> solve(scores, "1:2-T", Greedy()).value  # the best mask keeps 3 + 3
    5.0
    """

    exactly: bool = False
    fill: bool = True
    guarantee: ClassVar[Guarantee] = Guarantee("kept", 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exactly and not self.fill:
            raise ValueError("Greedy(exactly=True, fill=False): the rule alone leaves rows short of N; use fill=True")

    def solve_tiles(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        return torch.cat([self._solve_chunk(chunk, n) for chunk in chunks(scores)])

    def _solve_chunk(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        mask = keep_in_order(heavy_to_light(scores), n, scores.shape[-1])
        return fill(scores, mask, n, self.exactly) if self.fill else mask
