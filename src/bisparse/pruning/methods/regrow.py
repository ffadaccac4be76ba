"""Regrowth: fills places that a conversion leaves free with weights that were pruned before.

A pruned weight has no magnitude to rank it by; its gain follows from the least-squares problem: with r the gradient of the output
error at the present weights, freeing weight j lowers the error by ``r_j^2 / G_jj``. The pattern's solver finds the mask of
largest gain that contains the present one, and the weights are fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.adaprune import AdaPrune, fit
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned, method_setting_
from bisparse.solution import Solution

__all__ = ["Regrow"]


@dataclass(frozen=True)
class Regrow(Method):
    """After another method, fill the pattern with the weights of largest gain and fit again.

    Args:
        of: chooses the mask, and says how to fit; or "adaprune".
    """

    of: AdaPrune = field(default_factory=AdaPrune)

    def __post_init__(self) -> None:
        method_setting_(self, "of", AdaPrune)

    @property
    def name(self) -> str:
        return f"{self.of.name} + regrowth"

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.of.needs

    def prune(self, problem: LayerProblem) -> Pruned:
        first = self.of.prune(problem)
        assert first.weight is not None
        everywhere = replace(problem, allowed=None)
        whole = problem.least_squares(
            centred=self.of.refit_bias and problem.bias is not None, statistics=problem.measured.merged()
        ).damped(first.damping or 0.0)
        rows = problem.rows(first.weight)
        diagonal = whole.gram.diagonal(dim1=1, dim2=2)[:, None, :]
        gain = torch.where(diagonal > 0, (whole.target - rows @ whole.gram).square() / diagonal.clamp(min=1e-30), 0.0)
        solution = grow(everywhere, first.solution.mask, problem.matrices(gain))
        grown = fit(problem, solution, first.damping, self.of.refit_bias, self.of.linear_solver)
        added = int(solution.mask.sum()) - int(first.solution.mask.sum())
        return replace(grown, error_before=first.error_before, note=f"{added} weights re-grown")


def grow(problem: LayerProblem, mask: Bool[Tensor, "B O I"], gain: Float[Tensor, "B O I"]) -> Solution:
    """The mask of most gain among those that contain the given one."""
    m = getattr(problem.pattern, "m", 1)
    # A kept weight scores more than all that a tile could gain by dropping it; roots keep the range within the solver's bits.
    gain = gain.sqrt()
    kept = 2 * m * gain.amax().clamp(min=1e-30)
    solution = problem.solve(torch.where(mask, kept, gain))
    if bool((mask & ~solution.mask).any()):
        return replace(solution, mask=mask)
    useful = solution.mask & ((gain > 0) | mask)
    return replace(solution, mask=useful)
