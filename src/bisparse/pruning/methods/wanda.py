"""Wanda: keep the weights with the largest ``|w| * ||x||``; kept weights are unchanged.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695.
Departure: groups and tiles of any pattern, by any solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.arguments import check_number
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.scores import wanda

__all__ = ["Wanda"]

MAX_LOST_SCORES = 0.01
"""Fraction of the scores that raising them to a power may turn to zero."""


@dataclass(frozen=True)
class Wanda(Method):
    """Keep the weights of largest ``|w_oi| * ||x_i||`` that the pattern allows.

    Args:
        power: the scores are raised to it. 1, the paper's, keeps the largest sum; 2 keeps the largest sum of squares, which
            is the mask of least output error for uncorrelated inputs. At plain N:M the mask is the same; at a transposable
            pattern they weigh the groups that share a weight differently.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_number("power", self.power, above=0)

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.NORM})

    def prune(self, problem: LayerProblem) -> Pruned:
        statistics = problem.measured
        rows = problem.rows(problem.weight)
        norm = statistics.norm
        if norm is None:
            raise CalibrationError(f"{problem.name}: calibration collected no input norms")
        if norm.shape[0] not in (1, rows.shape[0]) or norm.shape[1] != rows.shape[2]:
            raise CalibrationError(f"{problem.name}: norms of shape {tuple(norm.shape)} do not fit weights {tuple(rows.shape)}")
        silent = norm.amax(1, keepdim=True) <= 0
        # Without any input only the magnitude is left.
        norm = torch.where(silent, torch.ones_like(norm), norm)
        scores = wanda(rows, norm.to(rows.device).expand(rows.shape[0], -1))
        return Pruned(problem.solve(problem.matrices(_raised(scores, self.power, problem.name))), note=_note(silent))


def _raised(scores: Float[Tensor, "G O K"], power: float, name: str) -> Float[Tensor, "G O K"]:
    """The scores to a power, in units of the largest one.

    Raises:
        ValueError: more than `MAX_LOST_SCORES` of the scores would become zero.
    """
    if power == 1 or scores.numel() == 0:
        return scores
    # In these units nothing overflows, and a mask does not depend on the unit.
    largest = scores.amax().clamp(min=torch.finfo(scores.dtype).tiny)
    raised = (scores / largest) ** power
    lost, number = int(((raised == 0) & (scores > 0)).sum()), int((scores > 0).sum())
    if lost > MAX_LOST_SCORES * number:
        raise ValueError(
            f"{name}: at power={power:g}, {lost} of {number} scores become 0 in {str(scores.dtype).removeprefix('torch.')}, and "
            "their weights would be pruned whatever the pattern; use a smaller power, such as 2"
        )
    return raised


def _note(silent: Bool[Tensor, "G 1"]) -> str:
    number = int(silent.sum())
    if number == 0:
        return ""
    which = "all inputs" if number == len(silent) else f"the inputs of {number} of {len(silent)} groups"
    return f"{which} are 0 in the calibration data: chosen by magnitude"
