"""Wanda: keep the weights that move the output most, ``|w| * ||x||``; kept weights stay as they are.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695.
Departure: groups and tiles of any pattern, by any solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bisparse.pruning.calibration.statistics import CalibrationError, Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.scores import wanda

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(Method):
    """Keep the largest ``|w_oi| * ||x_i||``, as far as the pattern allows.

    Args:
        power: the scores are raised to it. 1, the paper's, keeps the largest sum; 2 keeps the largest sum of squares, which
            is the mask of least output error if inputs were uncorrelated. They differ in how ties between groups of a
            transposable pattern are traded; at plain N:M the mask is the same.
    """

    power: float = 1.0

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
        # Where no input of a problem is ever used, magnitude is all there is to go by.
        norm = torch.where(norm.amax(1, keepdim=True) > 0, norm, torch.ones_like(norm))
        scores = wanda(rows, norm.to(rows.device).expand(rows.shape[0], -1))
        return Pruned(problem.solve(problem.matrices(scores**self.power)))
