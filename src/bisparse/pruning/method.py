"""What a one-shot pruning method is: a layer's weight and statistics in, its mask and new weight out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from bisparse.pattern import Structure
from bisparse.solution import Solution
from bisparse.solve import solve
from bisparse.solvers import Solver
from bisparse.tiles import Layout, LayoutKind

__all__ = ["LayerProblem", "Method", "Pruned", "Statistic", "Statistics"]

MATRICES = Layout(LayoutKind.EXPERTS)
"""How `LayerProblem.weight` stores its matrices: one after the other."""


class Statistic(StrEnum):
    """What a method may ask calibration to measure at a layer's input."""

    NORM = "norm"
    MEAN = "mean"
    GRAM = "gram"


@dataclass(frozen=True)
class Statistics:
    """What calibration measured at one layer's input, in float32 or wider.

    K = positions * I inputs, kernel position by kernel position; G = groups of a convolution, 1 for packed projections
    (which share their input), experts of a mixture.
    """

    tokens: int
    """How many input vectors were seen."""
    norm: Float[Tensor, "G K"] | None = None
    """Root of the sum of squares of each input."""
    mean: Float[Tensor, "G K"] | None = None
    """Mean of each input."""
    gram: Float[Tensor, "G K K"] | None = None
    """Second moments, the sum over tokens of x x^T."""


@dataclass(frozen=True)
class LayerProblem:
    """One layer to prune, as the matrices that its GEMMs multiply by."""

    name: str
    weight: Float[Tensor, "B O I"]
    """float32, or float64 where the layer is."""
    pattern: Structure
    solver: Solver | None = None
    statistics: Statistics | None = None
    bias: Float[Tensor, " P"] | None = None
    positions: int = 1
    """Matrices in a row whose products add up to one output: the kernel positions of a convolution."""

    def solve(self, scores: Float[Tensor, "B O I"]) -> Solution:
        """The best mask for scores of the weight's shape, by the problem's pattern and solver."""
        try:
            return solve(scores, self.pattern, self.solver, layout=MATRICES)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Pruned:
    """What a method did to one layer. Shapes are the problem's."""

    solution: Solution
    """The mask, with the scores it was chosen by."""
    weight: Float[Tensor, "B O I"] | None = None
    """New weights, 0 where the mask is; None: kept weights stay as they are."""
    bias: Float[Tensor, " P"] | None = None
    """New bias; None: it stays."""
    error: float | None = None
    """Relative error of the layer's output on the calibration data, where the method measures it."""


class Method(ABC):
    """A one-shot pruning method: a frozen dataclass whose fields are its settings.

    Final subclasses implement `prune`, and declare in `needs` what calibration must measure for them.
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    """Statistics that `prune` reads; a method that needs none runs without data."""

    @property
    def name(self) -> str:
        """As a user writes it: ``"magnitude"``."""
        return type(self).__name__.lower()

    @abstractmethod
    def prune(self, problem: LayerProblem) -> Pruned:
        """Choose the mask and the weights of one layer. Changes none of its inputs.

        Raises:
            ValueError: weights that are NaN or infinite, or statistics that are missing or do not fit; names the layer.
        """
