"""ALPS: mask and weights together, by ADMM whose projection is the exact mask solve.

    min over W', D of error(W')    with W' = D, D obeying the pattern

W' solves a ridge regression towards D; D is W' + V / rho on its best mask (scores: squares, so that the projection is the nearest
point); V are the multipliers. rho grows until the mask has settled. Then the weights are refitted on the mask.
Inputs are scaled to unit mean square first, so that the first projection is Wanda's.
Sensitive to rounding: its masks depend on the last bits of its inputs. In one check, inputs times (1 + 1e-7), batches in reversed
order or two ranks instead of one changed 13 % of a mask's entries, not the error; the masks of SparseGPT and AdaPrune did not
change. Compare the errors of two runs, not their masks.
Guarantee: none overall; the first projection's mask is returned instead if its error after the refit, on 64 rows, is smaller.
Cost: one eigendecomposition of K x K, then two products (O, K) x (K, K) and one mask solve per iteration.
Source: Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, arXiv 2406.07831, algorithm 1 and its schedule of rho; TSENOR
(arXiv 2505.23949) for transposable masks.
Departures: any pattern; targets of the dense network; the refit's damping is chosen by held-out data; the safeguard above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.arguments import check_choice, check_count, check_flag, check_number
from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.adaprune import DAMPING_UNIT, LINEAR_SOLVERS, fit
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.pruning.methods.least_squares import reconstruct, some_rows
from bisparse.pruning.methods.least_squares_problem import LeastSquaresProblem
from bisparse.solution import Solution

__all__ = ["ALPS"]


MAX_SETTLED_CHANGE = 1e-3
"""The mask has settled when at most this fraction of it changes between two updates of rho; the refit does the rest."""
MIN_ITERATIONS = 6
"""Iterations before the mask may count as settled: the first ones may change little."""
MIN_RELATIVE_SCORE = 1e-7
"""Scores below this fraction of the largest are raised to it."""


@dataclass(frozen=True)
class ALPS(Method):
    """Mask and weights by ADMM.

    The mask is sensitive to rounding: in one check, multiplying the inputs by 1 + 1e-7 changed which weights are kept for 13 % of
    them, while the error stayed the same.

    Args:
        damping: ridge of the mask search, in units of the mean square of an input.
        refit_damping: ridge of the final least squares; None: chosen by held-out calibration data.
        rho: first penalty, on inputs scaled to unit mean square.
        rho_every: iterations between two updates of rho. 3 is the source's; 1 takes a third of the time, at an error about one
            per cent larger.
        iterations: maximum.
        refit_bias, correct_upstream, linear_solver: as for `AdaPrune`.
    """

    damping: float = 0.01
    refit_damping: float | None = None
    rho: float = 0.1
    rho_every: int = 3
    iterations: int = 120
    refit_bias: bool = True
    correct_upstream: bool = True
    linear_solver: Literal["auto", "factorisation", "conjugate gradient"] = "auto"

    def __post_init__(self) -> None:
        check_number("damping", self.damping, least=0, unit=DAMPING_UNIT)
        if self.refit_damping is not None:
            check_number("refit_damping", self.refit_damping, least=0, unit=DAMPING_UNIT)
        check_number("rho", self.rho, above=0)
        check_count("rho_every", self.rho_every)
        check_count("iterations", self.iterations)
        check_flag("refit_bias", self.refit_bias)
        check_flag("correct_upstream", self.correct_upstream)
        check_choice("linear_solver", self.linear_solver, LINEAR_SOLVERS)

    @property
    def needs(self) -> frozenset[Statistic]:
        own = {Statistic.GRAM}
        if self.refit_bias:
            own.add(Statistic.MEAN)
        if self.correct_upstream:
            own.add(Statistic.CROSS)
        if self.refit_damping is None:
            own.add(Statistic.HELD_OUT)
        return frozenset(own)

    def prune(self, problem: LayerProblem) -> Pruned:
        statistics = problem.measured.merged()
        whole = problem.least_squares(centred=self.refit_bias and problem.bias is not None, statistics=statistics)
        damped = whole.damped(self.damping)
        first, last, point, steps = self._search(damped, problem)
        chosen, start = last, point
        if bool((first.mask != last.mask).any()):
            errors = [self._refitted_error(whole, problem.rows(solution.mask)) for solution in (first, last)]
            chosen, start = (first, None) if errors[0] < errors[1] else (last, point)
        pruned = fit(problem, chosen, self.refit_damping, self.refit_bias, self.linear_solver, start)
        note = f"ADMM: {steps} iterations" + (
            "; it did no better than its start" if chosen is first and first is not last else ""
        )
        return Pruned(
            pruned.solution,
            pruned.weight,
            pruned.bias,
            pruned.error,
            pruned.error_before,
            pruned.damping,
            f"{pruned.note}; {note}" if pruned.note else note,
        )

    def _refitted_error(self, whole: LeastSquaresProblem, mask: Bool[Tensor, "G O K"]) -> float:
        """The error of a mask after the refit, estimated on a subset of rows, which are independent."""
        index = some_rows(mask)
        part = whole.rows(index)
        fitted = reconstruct(part, mask[:, index], damping=self.damping, method="conjugate gradient", tolerance=1e-2)
        return part.damped(self.damping).error(fitted.weight)

    def _search(
        self, damped: LeastSquaresProblem, problem: LayerProblem
    ) -> tuple[Solution, Solution, Float[Tensor, "G O K"], int]:
        """The first projection, the last one, its weights, and the number of iterations."""
        scale = damped.gram.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        gram = damped.gram / (scale[:, :, None] * scale[:, None, :])
        target = damped.target / scale[:, None, :]
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        dense = damped.weight * scale[:, None, :]

        def project(weight: Float[Tensor, "G O K"]) -> tuple[Solution, Float[Tensor, "G O K"]]:
            scores = weight.square()
            # Late in the search what is pruned is all but zero; a range that no weight needs costs the solver its time.
            scores = scores.clamp(min=MIN_RELATIVE_SCORE * float(scores.amax()) if scores.numel() else 0.0)
            solution = problem.solve(problem.matrices(scores))
            return solution, weight * problem.rows(solution.mask)

        first, point = project(dense)
        last, before = first, problem.rows(first.mask)
        multiplier = torch.zeros_like(dense)
        rho = self.rho
        kept = max(1, int(before.sum()))
        rotated_target = target @ vectors
        step = 0
        for step in range(1, self.iterations + 1):
            pull = (rho * point - multiplier) @ vectors
            weight = ((rotated_target + pull) / (values + rho)[:, None, :]) @ vectors.transpose(1, 2)
            last, point = project(weight + multiplier / rho)
            multiplier = multiplier + rho * (weight - point)
            if step % self.rho_every == 0:
                mask = problem.rows(last.mask)
                changed = int((mask != before).sum()) / 2
                before = mask
                if step >= MIN_ITERATIONS and changed <= MAX_SETTLED_CHANGE * kept:
                    break
                rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
        return first, last, point / scale[:, None, :], step
