"""Light to heavy: prune the smallest score whose row or column still lacks zeros, then the next (the paper's Algorithm 1).

Guarantee: the score pruned is at most twice what the best mask prunes. Let P_v be the first M - N entries pruned in the row
or column v: while v lacks zeros every entry of v that is visited is pruned, so P_v are the M - N lightest of v and sum to no more
than the best mask prunes in v. Each pruned entry is in some P_v, and each entry that the best mask prunes is in two lines.
Cost: one sort of the M * M scores of a tile and M * M steps, each over all tiles at once.
Source: Hubara et al. (2021, arXiv 2102.08124), Algorithm 1.
Departures: none. It prunes more than necessary, because an entry may be pruned for its row when its column has enough zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Real
from torch import Tensor

from bisparse.solvers.rounding import chunks, heavy_to_light, prune_in_order
from bisparse.solvers.solver import Guarantee, Solver

__all__ = ["TwoApproximation"]


@dataclass(frozen=True)
class TwoApproximation(Solver):
    """The paper's 2-approximation: prunes at most twice the score that the best mask prunes, and keeps fewer than N.

    Args:
        exactly: only False; the algorithm prunes more than M - N in most rows, so it cannot keep exactly N.

    >>> import torch
    >>> from bisparse import solve
    >>> solve(torch.tensor([[4.0, 3.0], [3.0, 1.0]]), "1:2-T", TwoApproximation()).mask.int().tolist()
    [[1, 0], [0, 0]]
    """

    exactly: bool = False
    guarantee: ClassVar[Guarantee] = Guarantee("pruned", 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exactly:
            raise ValueError(
                "TwoApproximation(exactly=True): it prunes more than M - N in some rows, so it cannot keep exactly N; "
                "use Exact, MinCostFlow, Greedy or Sinkhorn with exactly=True"
            )

    def solve_tiles(self, scores: Real[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
        m = scores.shape[-1]
        return torch.cat([prune_in_order(heavy_to_light(chunk).flip(0), m - n, m) for chunk in chunks(scores)])
