"""AdaPrune as least squares: the kept weights that best restore the layer's output on calibration data.

    min over W' of E |W z - (S * W') x|^2       S the mask of another method, x the layer's inputs

Solved row by row, exactly, without a learning rate; deterministic. The damping pulls to the dense weights. By default it is
chosen by the error on held-out data, every fifth calibration batch; the final fit uses all batches.
Guarantee: no output's calibration error exceeds that of the mask alone. Where held-out data chooses the damping, neither does the
held-out error on the sampled outputs.
Cost: one second-moment matrix per layer, and one factorisation per row or conjugate gradient on all rows together.
Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, section 5, who solve it by Adam (`GradientAdaPrune`).
Departures: the solver; inputs of the pruned network, targets of the dense one ("sequential"), where the paper has the dense
network's for both ("parallel"); damping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.arguments import check_choice, check_flag, check_number
from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned, method_setting_
from bisparse.pruning.methods.least_squares import choose_damping, reconstruct
from bisparse.pruning.methods.least_squares_problem import LeastSquaresProblem, refitted_bias
from bisparse.pruning.methods.wanda import Wanda
from bisparse.solution import Solution

__all__ = ["DAMPING_UNIT", "LINEAR_SOLVERS", "AdaPrune", "fit"]

DAMPING_UNIT = "in units of the mean square of an input"
LINEAR_SOLVERS = ("auto", "factorisation", "conjugate gradient")

DEFAULT_DAMPING = 0.01
"""Damping where there is too little data to hold any out."""
ROUNDING = 1e-5
"""Relative error, of an output's error or energy, that float32 rounding may cause."""


@dataclass(frozen=True)
class AdaPrune(Method):
    """Least squares on the mask that another method selects.

    Args:
        selection: the method that chooses the mask, or its name.
        damping: ridge in units of the mean square of an input; None: chosen by held-out calibration data.
        refit_bias: where the layer has a bias, refit it together with the weights.
        correct_upstream: the target is the dense network's output, not the dense layer's output on present inputs, so that a
            layer compensates for those pruned before it. Needs the order "sequential"; no effect in "parallel".
        linear_solver: "factorisation", "conjugate gradient", or "auto" by size.
    """

    selection: Method = field(default_factory=Wanda)
    damping: float | None = None
    refit_bias: bool = True
    correct_upstream: bool = True
    linear_solver: Literal["auto", "factorisation", "conjugate gradient"] = "auto"

    def __post_init__(self) -> None:
        method_setting_(self, "selection")
        if self.damping is not None:
            check_number("damping", self.damping, least=0, unit=DAMPING_UNIT)
        check_flag("refit_bias", self.refit_bias)
        check_flag("correct_upstream", self.correct_upstream)
        check_choice("linear_solver", self.linear_solver, LINEAR_SOLVERS)

    @property
    def needs(self) -> frozenset[Statistic]:
        own = {Statistic.GRAM, Statistic.NORM}
        if self.refit_bias:
            own.add(Statistic.MEAN)
        if self.correct_upstream:
            own.add(Statistic.CROSS)
        if self.damping is None:
            own.add(Statistic.HELD_OUT)
        return self.selection.needs | own

    def prune(self, problem: LayerProblem) -> Pruned:
        selected = self.selection.prune(problem)
        return fit(problem, selected.solution, self.damping, self.refit_bias, self.linear_solver)


def fit(
    problem: LayerProblem,
    solution: Solution,
    damping: float | None = None,
    refit_bias: bool = True,
    linear_solver: Literal["auto", "factorisation", "conjugate gradient"] = "auto",
    start: Float[Tensor, "G O K"] | None = None,
) -> Pruned:
    """Weights (and bias) of least output error on a given mask; conjugate gradient starts from `start`, which obeys the mask."""
    statistics = problem.measured
    everything = statistics.merged()
    centred = refit_bias and problem.bias is not None
    mask: Bool[Tensor, "G O K"] = problem.rows(solution.mask)
    whole = problem.least_squares(centred=centred, statistics=everything)
    notes = [whole.note] if whole.note else []
    if bool(whole.silent.all()):
        damping = math.inf
    elif damping is None:
        held_out = statistics.held_out
        if held_out is None or held_out.columns == 0:
            damping = DEFAULT_DAMPING
            notes.append(f"damping {DEFAULT_DAMPING} by default: too little data to hold any out")
        else:
            part = problem.least_squares(centred=centred, statistics=statistics)
            judge = problem.least_squares(centred=centred, statistics=held_out)
            damping, _ = choose_damping(part, judge, mask)
            if damping == math.inf:
                notes.append("no fit did better on held-out data than the mask alone: the kept weights are unchanged")
    try:
        solved = reconstruct(whole, mask, damping=damping, method=linear_solver, start=start)
    except ValueError as error:
        raise ValueError(f"{problem.name}: {error}") from error
    weight, reverted = _no_worse(whole, solved.weight, mask)
    if reverted:
        notes.append(f"{reverted} of {mask.shape[0] * mask.shape[1]} outputs keep their weights: no fit lowers their error")
    if solved.residual > 0:
        notes.append(f"conjugate gradient stopped at a residual of {solved.residual:.1e}")
    bias = None
    if centred:
        assert everything.mean is not None
        mean = everything.mean.to(whole.weight.device)
        dense_mean = everything.dense_mean.to(mean.device) if everything.dense_mean is not None else None
        bias = refitted_bias(problem.bias, whole.weight, weight, mean, dense_mean)
    plain = problem.least_squares(centred=False, statistics=everything) if centred else whole
    return Pruned(
        solution,
        problem.matrices(weight),
        bias,
        # Both relative to the energy of the outputs without bias, so that they are comparable.
        error=whole.error(weight, plain.energy),
        error_before=plain.error(plain.weight * mask),
        damping=damping if math.isfinite(damping) else None,
        note="; ".join(notes),
    )


def _no_worse(
    whole: LeastSquaresProblem, fitted: Float[Tensor, "G O K"], mask: Bool[Tensor, "G O K"]
) -> tuple[Float[Tensor, "G O K"], int]:
    """The fitted weights, with the masked dense ones in rows where those have the smaller error; and the number of such rows.

    In exact arithmetic it is 0.
    """
    masked = whole.weight * mask
    # Not a number is no improvement; a difference by rounding is no worse.
    better = whole.row_error(fitted) <= (1 + ROUNDING) * whole.row_error(masked) + ROUNDING * whole.energy
    return torch.where(better[:, :, None], fitted, masked), int((~better).sum())
