"""SparseGPT: prune a few columns at a time and compensate for them in the columns after.

Columns are processed from left to right. A group of M columns gets its mask by the scores ``w^2 / [H^-1]_jj`` (the cost of
removing a weight when all later weights may adjust); for a transposable pattern the M columns of all rows are a band of tiles
and are solved together. Each column's error is then spread over the later columns by the inverse Hessian.
Guarantee: none overall; each group's or tile's mask is optimal for its scores.
Cost: one Cholesky of K x K, and one product (O, K) x (K, K).
Source: Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774, algorithm 1.
Departures: any pattern and solver; columns of a convolution kernel position by position; a refit of the kept weights on
their final support afterwards (`refit`), which the left-to-right sweep cannot do for columns already passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse._solve import solve
from bisparse.arguments import check_flag, check_number
from bisparse.kernels.column_sweep.dispatch import applies, prune_columns
from bisparse.pattern import Pattern
from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.adaprune import DAMPING_UNIT, fit
from bisparse.pruning.methods.base import MATRICES, LayerProblem, Method, Pruned
from bisparse.pruning.methods.error_feedback import BLOCK, ColumnSweep, upper_inverse
from bisparse.pruning.methods.least_squares_problem import LeastSquaresProblem
from bisparse.scores import hessian
from bisparse.solution import Solution

__all__ = ["SparseGPT"]

UNSTRUCTURED_COLUMNS = 128
"""Columns whose mask is chosen together where the pattern has no M, as in the source."""


@dataclass(frozen=True)
class SparseGPT(Method):
    """Optimal brain surgeon, column by column.

    Args:
        damping: ridge in units of the mean square of an input, the source's 0.01.
        refit: afterwards solve least squares on the mask, as `AdaPrune` does, instead of keeping the sweep's weights.
        correct_upstream: the target is the dense network's output, as in `AdaPrune`; the source does not do this.
    """

    damping: float = 0.01
    refit: bool = False
    correct_upstream: bool = False

    def __post_init__(self) -> None:
        check_number("damping", self.damping, least=0, unit=DAMPING_UNIT)
        check_flag("refit", self.refit)
        check_flag("correct_upstream", self.correct_upstream)

    @property
    def needs(self) -> frozenset[Statistic]:
        own = {Statistic.GRAM}
        if self.refit:
            own |= {Statistic.MEAN, Statistic.HELD_OUT}
        if self.correct_upstream:
            own.add(Statistic.CROSS)
        return frozenset(own)

    def prune(self, problem: LayerProblem) -> Pruned:
        whole = problem.least_squares(centred=False, statistics=problem.measured.merged())
        weight, mask, scores = self._sweep(whole, problem)
        matrices = problem.matrices(scores)
        # The mask was solved band by band; the certificate of the whole mask is made on request.
        solution = Solution(
            problem.matrices(mask), matrices, problem.pattern, MATRICES, certify=lambda: problem.solve(matrices).certificate
        )
        if self.refit:
            return fit(problem, solution)
        return Pruned(
            solution,
            problem.matrices(weight),
            error=whole.error(weight),
            error_before=whole.error(whole.weight * mask),
            damping=self.damping,
            note=whole.note,
        )

    def _sweep(self, whole: LeastSquaresProblem, problem: LayerProblem) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, mask and scores, each (G, O, K)."""
        damped = whole.damped(self.damping)
        shape, inputs = whole.weight.shape, whole.weight.shape[2] // problem.positions
        scores = whole.weight.new_zeros(shape)
        mask = torch.zeros(shape, dtype=torch.bool, device=whole.weight.device)
        # Without a mask the best weights are the dense ones, unless earlier layers were pruned.
        weight = whole.weight.clone(memory_format=torch.contiguous_format)
        if self.correct_upstream:
            weight = torch.linalg.solve(damped.gram.double(), damped.target.double().transpose(1, 2)).transpose(1, 2).float()
            weight = weight.contiguous()
        allowed = None if problem.allowed is None else problem.rows(problem.allowed)
        plain = _plain(problem) if applies(weight) else None
        for g in range(len(weight)):
            upper = upper_inverse(damped.gram[g], problem.name, self.damping)
            sweep = ColumnSweep(weight[g], upper)
            for position in range(problem.positions):
                columns = slice(position * inputs, (position + 1) * inputs)
                if plain is not None:
                    _prune_groups(weight[g], upper, mask[g], scores[g], columns, plain)
                else:
                    _prune_bands(sweep, upper, mask[g], scores[g], columns, problem, None if allowed is None else allowed[g])
        return weight, mask, scores


def _plain(problem: LayerProblem) -> Pattern | None:
    """The pattern, if the groups of each row are independent and any of their masks may be chosen."""
    found = problem.pattern
    return found if problem.allowed is None and isinstance(found, Pattern) and not found.transposable else None


def _prune_groups(
    weight: Float[Tensor, "O K"],
    upper: Float[Tensor, "K K"],
    mask: Bool[Tensor, "O K"],
    scores: Float[Tensor, "O K"],
    columns: slice,
    pattern: Pattern,
) -> None:
    """Prune columns at a plain N:M pattern, in place, and spread their errors over all later columns."""
    width = max(BLOCK // pattern.m, 1) * pattern.m
    for start in range(columns.start, columns.stop, width):
        block = slice(start, min(start + width, columns.stop))
        errors = prune_columns(weight, upper, mask, scores, block, pattern.n, pattern.m)
        if errors is None:
            solve(scores[:, block], pattern)  # says which are not finite
            raise AssertionError("unreachable: solve refuses scores that are not finite")
        weight[:, block.stop :] -= errors @ upper[block, block.stop :]


def _prune_bands(
    sweep: ColumnSweep,
    upper: Float[Tensor, "K K"],
    mask: Bool[Tensor, "O K"],
    scores: Float[Tensor, "O K"],
    columns: slice,
    problem: LayerProblem,
    allowed: Bool[Tensor, "O K"] | None,
) -> None:
    """Prune columns at any pattern, a band of M at a time, in place, and spread their errors over all later columns."""
    width = getattr(problem.pattern, "m", UNSTRUCTURED_COLUMNS)
    for start in range(columns.start, columns.stop, width):
        band = slice(start, min(start + width, columns.stop))
        own = hessian(sweep.current(band), upper[band, band].diagonal().square())
        if allowed is not None:
            own = own * allowed[:, band]
        chosen = solve(own.unsqueeze(0), problem.pattern, problem.solver, layout=MATRICES).mask[0]
        if allowed is not None:
            chosen = chosen & allowed[:, band]
        sweep.replace(band, partial(_masked, chosen))
        mask[:, band], scores[:, band] = chosen, own


def _masked(mask: Bool[Tensor, "O M"], column: Float[Tensor, " O"], place: int) -> Float[Tensor, " O"]:
    return column * mask[:, place]
