"""Magnitude pruning: keep the mask of largest total |w|; kept weights stay as they are. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.scores import magnitude

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the weights of largest absolute value that the pattern allows."""

    def prune(self, problem: LayerProblem) -> Pruned:
        return Pruned(problem.solve(magnitude(problem.weight)))
