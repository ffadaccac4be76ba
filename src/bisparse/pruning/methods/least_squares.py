"""Least squares on a support: the solver of AdaPrune's problem.

For every output row with support S, over the corrections d to the kept dense weights::

    min_d  error(mask * W + d),   d zero outside S       <=>     G_SS d_S = (B - (mask * W) G)_S

Guarantee: the damped error never exceeds that of the masked dense weight; a mask of ones returns the dense weight.
Cost: factorisation, one Cholesky of side |S| per row, in float64; conjugate gradient, one product (O, K) x (K, K) per
iteration for all rows together, in float32.
Source: the normal equations; batched conjugate gradient on the support as in ALPS (Meng et al., NeurIPS 2024,
arXiv 2406.07831, section 3.3). Departure: damping pulls to the dense weight instead of to zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bisparse.pruning.methods.least_squares_problem import LeastSquaresProblem

__all__ = ["DAMPINGS", "Reconstruction", "choose_damping", "reconstruct", "some_rows"]

DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Candidates of `choose_damping`, in units of the mean diagonal of G."""

CHUNK_BYTES = 256 << 20
MAX_FACTORISED_SUPPORT = 96
"""With more unknowns per row, conjugate gradient is faster, on CPU and GPU."""
FEWER_ROWS = 0.8
"""Conjugate gradient continues with the rows that have not converged once they are at most this fraction."""


@dataclass(frozen=True)
class Reconstruction:
    """Weights on a support and how they were found."""

    weight: Float[Tensor, "G O K"]
    damping: float
    """Ridge in units of the mean diagonal of G."""
    method: str
    """"factorisation", "conjugate gradient" or, with infinite damping, "none"."""
    iterations: int
    """Conjugate-gradient steps; 0 for a factorisation."""
    residual: float
    """Largest relative residual of the normal equations over the rows; 0 for a factorisation."""


def reconstruct(
    problem: LeastSquaresProblem,
    mask: Bool[Tensor, "G O K"],
    *,
    damping: float,
    method: Literal["auto", "factorisation", "conjugate gradient"] = "auto",
    tolerance: float = 1e-3,
    max_iterations: int = 300,
    start: Float[Tensor, "G O K"] | None = None,
) -> Reconstruction:
    """The weights on a support with the least (damped) output error.

    Args:
        damping: ridge pulling to the dense weight, in units of the mean diagonal of G. At 0 a singular problem has many
            solutions: conjugate gradient then returns the one closest to its start, factorisation refuses. At infinity the
            masked dense weight is the solution.
        tolerance: conjugate gradient stops when every row's residual is below this fraction of its initial value.
        start: weights on the support to start conjugate gradient from; the masked dense weight by default.

    Raises:
        ValueError: damping that is negative or not a number, or a singular factorisation.
    """
    if not damping >= 0:
        raise ValueError(f"damping={damping!r}: expected a number >= 0, in units of the mean diagonal of G")
    if damping == math.inf:
        return Reconstruction(problem.weight * mask, damping, "none", 0, 0.0)
    damped = problem.damped(damping)
    largest = int(mask.sum(2).max()) if mask.numel() else 0
    if method == "auto":
        method = "factorisation" if largest <= MAX_FACTORISED_SUPPORT and damping > 0 else "conjugate gradient"
    if method == "factorisation":
        return Reconstruction(_factorised(damped, mask, largest), damping, method, 0, 0.0)
    weight, iterations, residual = _conjugate_gradient(damped, mask, tolerance, max_iterations, start)
    return Reconstruction(weight, damping, method, iterations, residual)


def _factorised(problem: LeastSquaresProblem, mask: Bool[Tensor, "G O K"], largest: int) -> Float[Tensor, "G O K"]:
    base = problem.weight * mask
    if largest == 0:
        return base
    result = base.clone()
    chunk = max(1, CHUNK_BYTES // (8 * largest * largest))
    for g in range(mask.shape[0]):
        gram = problem.gram[g].double()
        right = (problem.target[g] - base[g] @ problem.gram[g]).double()
        # Kept columns first, in order; a row with fewer is padded with decoupled unit rows.
        order = mask[g].int().argsort(dim=1, descending=True, stable=True)[:, :largest]
        for rows in torch.arange(mask.shape[1], device=mask.device).split(chunk):
            index = order[rows]
            kept = mask[g][rows].gather(1, index)
            system = gram[index[:, :, None], index[:, None, :]]
            both = kept[:, :, None] & kept[:, None, :]
            system = torch.where(both, system, 0.0)
            system.diagonal(dim1=1, dim2=2).add_((~kept).double())
            factor, info = torch.linalg.cholesky_ex(system)
            if bool((info > 0).any()):
                row = int(rows[(info > 0).nonzero()[0, 0]])
                raise ValueError(
                    f"the normal equations of output row {row} are singular at this damping: give more calibration data, "
                    "a larger damping, or method='conjugate gradient'"
                )
            values = right[rows].gather(1, index) * kept
            step = torch.cholesky_solve(values[:, :, None], factor)[:, :, 0] * kept
            result[g, rows] += torch.zeros_like(result[g, rows]).scatter_(1, index, step.to(result.dtype))
    return result


def _conjugate_gradient(
    problem: LeastSquaresProblem, mask: Bool[Tensor, "G O K"], tolerance: float, max_iterations: int, start: Tensor | None
) -> tuple[Float[Tensor, "G O K"], int, float]:
    tiny = torch.finfo(problem.weight.dtype).tiny
    support = mask.to(problem.weight.dtype)
    masked = problem.weight * support
    diagonal = problem.gram.diagonal(dim1=1, dim2=2)[:, None, :]
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=tiny), 0.0) * support
    residual = (problem.target - masked @ problem.gram) * support
    # Convergence is judged in the preconditioned norm, relative to that of the masked dense weight.
    goal = (residual * inverse * residual).sum(2) * tolerance**2
    weight = masked
    if start is not None:
        weight = start * support
        residual = (problem.target - weight @ problem.gram) * support
    direction = residual * inverse
    rho = (residual * direction).sum(2)
    found, left = torch.empty_like(weight), torch.empty_like(rho)
    unfinished, rows = torch.arange(mask.shape[1], device=mask.device), goal
    iterations = 0
    while iterations < max_iterations:
        active = (rho > rows).any(0)
        remaining = int(active.sum())
        if remaining == 0:
            break
        if remaining <= FEWER_ROWS * len(active):
            found[:, unfinished], left[:, unfinished] = weight, rho
            unfinished = unfinished[active]
            weight, residual, direction, inverse, support, rho, rows = (
                one[:, active] for one in (weight, residual, direction, inverse, support, rho, rows)
            )
        product = (direction @ problem.gram).mul_(support)
        curvature = torch.linalg.vecdot(direction, product)
        step = torch.where((curvature > 0) & (rho > rows), rho / curvature.clamp(min=tiny), 0.0)
        iterations += 1
        if not bool((step > 0).any()):
            break
        weight.addcmul_(step[:, :, None], direction)
        residual.addcmul_(step[:, :, None], product, value=-1)
        z = torch.mul(residual, inverse, out=product)
        after = torch.linalg.vecdot(residual, z)
        ratio = torch.where(step > 0, after / rho.clamp(min=tiny), 0.0)
        direction.mul_(ratio[:, :, None]).add_(z)
        rho = torch.where(step > 0, after, rho)
    found[:, unfinished], left[:, unfinished] = weight, rho
    relative = (left / (goal / tolerance**2).clamp(min=tiny)).clamp(min=0).sqrt()
    worst = float(torch.where(left > goal, relative, torch.zeros_like(relative)).max()) if left.numel() else 0.0
    return found, iterations, worst


def some_rows(mask: Bool[Tensor, "G O K"], count: int = 64) -> Int[Tensor, " R"]:
    """At most `count` evenly spaced output rows, for estimates from a sample."""
    outputs = mask.shape[1]
    return torch.linspace(0, outputs - 1, min(count, outputs), device=mask.device).round().long()


def choose_damping(
    problem: LeastSquaresProblem,
    held_out: LeastSquaresProblem,
    mask: Bool[Tensor, "G O K"],
    *,
    candidates: Sequence[float] = DAMPINGS,
    max_rows: int = 64,
) -> tuple[float, dict[float, float]]:
    """The damping whose fit on `problem` has the least error on the `held_out` data.

    Least squares on few tokens overfits, so the choice uses data that the fit has not seen, on at most `max_rows` evenly spaced
    output rows per problem. Infinite damping (the masked dense weight unchanged) wins where no fit is better.

    Returns:
        The damping, and the relative held-out error of every candidate tried: from the strongest to one past the best.
    """
    index = some_rows(mask, max_rows)
    part, judge, support = problem.rows(index), held_out.rows(index), mask[:, index]
    errors = {math.inf: judge.error(judge.weight * support)}
    start: Tensor | None = None
    # From the strongest damping down: each solution is a good start for the next.
    for damping in sorted(candidates, reverse=True):
        solved = reconstruct(part, support, damping=damping, method="conjugate gradient", start=start, tolerance=3e-3)
        start = solved.weight
        errors[damping] = judge.error(solved.weight)
        # Conjugate gradient is slow at weak damping, and candidates past the minimum are worse.
        tried = list(errors.values())[1:]
        if len(tried) > 2 and tried[-1] > tried[-2] > tried[-3]:
            break
    # Not a number is no improvement.
    best = min(errors, key=lambda damping: (errors[damping] if math.isfinite(errors[damping]) else math.inf, -damping))
    return best, errors
