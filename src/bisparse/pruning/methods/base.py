"""What a one-shot pruning method is: a layer's weight and statistics in, its mask and new weight out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse._solve import solve
from bisparse.pattern import Structure
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic, Statistics
from bisparse.pruning.methods.least_squares_problem import LeastSquaresProblem, make_problem
from bisparse.pruning.reduction import to_matrices_of_rows, to_rows
from bisparse.solution import Solution
from bisparse.solvers import Solver
from bisparse.tiles import Layout, LayoutKind

__all__ = [
    "MATRICES",
    "METHODS",
    "LayerProblem",
    "Method",
    "Pruned",
    "Statistic",
    "Statistics",
    "in_range",
    "method_setting_",
    "parse_method",
    "prune_in_range",
]

MATRICES = Layout(LayoutKind.EXPERTS)
"""The layout of `LayerProblem.weight`: matrices along the first dimension."""


USUAL = 30
"""Weights of which the largest is within 2^30 and 2^-30 are used as they are."""


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
    output: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """The layer as a function of a batch of inputs, weight matrices and bias, for methods that iterate over samples."""
    allowed: Bool[Tensor, "B O I"] | None = None
    """Where weights may be kept; None: everywhere. Its complement stays pruned."""

    def solve(self, scores: Float[Tensor, "B O I"]) -> Solution:
        """The best mask for scores of the weight's shape, by the problem's pattern and solver."""
        if self.allowed is not None:
            scores = scores * self.allowed
        try:
            solution = solve(scores, self.pattern, self.solver, layout=MATRICES)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if self.allowed is None:
            return solution
        mask = self._filled(solution.mask, scores == 0)
        return Solution(mask, solution.scores, solution.pattern, solution.layout, certify=lambda: solution.certificate)

    def _filled(self, mask: Bool[Tensor, "B O I"], zero: Bool[Tensor, "B O I"]) -> Bool[Tensor, "B O I"]:
        """The optimal mask, with allowed entries of score zero where there is room: the solver has no reason to choose them."""
        assert self.allowed is not None
        kept = mask & self.allowed
        if not bool((self.allowed & ~kept & zero).any()):
            return kept
        # An entry of `kept` is worth more than all others of its tile together, so none is given up.
        rest = 1 / (1 + int(getattr(self.pattern, "m", 1)) ** 2)
        scores = torch.where(kept, 1.0, rest) * self.allowed
        filled = solve(scores, self.pattern, self.solver, layout=MATRICES).mask & self.allowed
        return filled if not bool((kept & ~filled).any()) else kept

    def rows(self, matrices: Tensor) -> Tensor:
        """(B, O, I) -> (G, O, K), one least-squares problem per convolution group, packed part or expert."""
        rows: Tensor = to_rows(matrices, self.positions)
        return rows

    def matrices(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        matrices: Tensor = to_matrices_of_rows(rows, self.positions)
        return matrices

    @property
    def measured(self) -> Statistics:
        """The calibration statistics.

        Raises:
            CalibrationError: there are none.
        """
        if self.statistics is None or self.statistics.columns == 0:
            raise CalibrationError(
                f"{self.name}: this method needs calibration statistics, and none were collected for this layer"
            )
        return self.statistics

    def least_squares(self, *, centred: bool, statistics: Statistics | None = None) -> LeastSquaresProblem:
        """The layer's output error as a function of its weights; see `make_problem`."""
        return make_problem(self.rows(self.weight), statistics or self.measured, centred=centred, name=self.name)


@dataclass(frozen=True)
class Pruned:
    """What a method did to one layer. Shapes are the problem's."""

    solution: Solution
    """The mask, with the scores it was chosen by."""
    weight: Float[Tensor, "B O I"] | None = None
    """New weights, 0 off the mask; None: kept weights are unchanged."""
    bias: Float[Tensor, " P"] | None = None
    """New bias; None: unchanged."""
    error: float | None = None
    """Relative error of the layer's output on the calibration data, where the method measures it."""
    error_before: float | None = None
    """The same with the mask applied to the dense weights and nothing else changed."""
    damping: float | None = None
    """Ridge of the least squares, in units of the mean square of an input."""
    note: str = ""
    """What the user should know about this layer."""


class Method(ABC):
    """A one-shot pruning method: a frozen dataclass whose fields are its settings.

    Final subclasses implement `prune`, and declare in `needs` what calibration must measure for them.
    """

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics that `prune` reads; a method that needs none runs without data."""
        return frozenset()

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


def in_range(problem: LayerProblem, usual: int = USUAL) -> tuple[LayerProblem, float]:
    """The problem with weights whose squares neither underflow nor overflow, and the power of two that they were multiplied by.

    A layer's output is linear in its weight and bias together, so that errors relative to the output do not change. Entries of
    the bias that would overflow become 0; see `prune_in_range`.

    Args:
        usual: weights are used as they are if the largest is between 2^-usual and 2^usual.
    """
    largest = float(problem.weight.abs().amax()) if problem.weight.numel() else 0.0
    exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    if abs(exponent) <= usual:
        return problem, 1.0
    most = 126 if problem.weight.dtype == torch.float32 else 1022  # powers of two of the dtype, also for subnormal weights
    factor = 2.0 ** max(-most, min(most, -exponent))
    bias = None if problem.bias is None else _finite(problem.bias.double() * factor, problem.bias.dtype)
    return replace(problem, weight=problem.weight * factor, bias=bias), factor


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype)
    return torch.where(stored.isfinite(), stored, 0.0)


def prune_in_range(prune: Callable[[LayerProblem], Pruned], problem: LayerProblem, usual: int = USUAL) -> Pruned:
    """What a method's `prune` returns, computed with weights whose squares neither underflow nor overflow; see `in_range`.

    What a method adds to the bias is added to the bias as it was, so that it loses nothing by overflow or underflow.
    """
    scaled, factor = in_range(problem, usual)
    if factor == 1.0:
        return prune(problem)
    if problem.statistics is None and (plain := prune(problem)).weight is None:
        return plain  # magnitudes need no squares
    pruned = prune(scaled)
    weight = None if pruned.weight is None else pruned.weight.to(problem.weight.dtype) / factor
    bias = pruned.bias
    if bias is not None and problem.bias is not None and scaled.bias is not None:
        bias = (problem.bias.double() + (bias.double() - scaled.bias.double()) / factor).to(problem.bias.dtype)
    return replace(pruned, weight=weight, bias=bias)


METHODS: dict[str, type[Method]] = {}
"""Every method by the name that Python functions and the command line take; `bisparse.pruning.methods` fills it."""


def parse_method(method: str | Method, **settings: Any) -> Method:
    """A method from its name in `METHODS`, with the given settings; a `Method` is returned unchanged.

    Raises:
        ValueError: no method has that name, or it is neither a name nor a method.
    """
    return _parsed("method", method, settings)


def _parsed(argument: str, method: Any, settings: Mapping[str, Any]) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method](**settings)
    close = get_close_matches(method.lower().replace("_", "-"), METHODS, n=1) if isinstance(method, str) else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    if isinstance(method, type):
        hint = f"it is a class; did you mean {method.__name__}()? "
    raise ValueError(f"{argument}={method!r:.60}: {hint}expected a Method or one of {', '.join(map(repr, METHODS))}")


def method_setting_(owner: Method, name: str, kind: type[Method] = Method) -> None:
    """Turn a method's setting that is a method, or the name of one, into the method.

    Raises:
        ValueError: it is neither, or no `kind`.
    """
    method = _parsed(name, getattr(owner, name), {})
    if not isinstance(method, kind):
        raise ValueError(f"{name}={method!r:.60}: expected a method of the kind {kind.__name__}, such as {kind.__name__}()")
    object.__setattr__(owner, name, method)  # frozen once it is made
