"""Corrections after another method without least squares: of the bias, or of each channel's mean and standard deviation.

Pruning shifts the mean of a layer's outputs by (W - W') E[x], which is known from the mean input. `BiasCorrection` subtracts the
shift from the layer's bias or, where it has none, adds it to the running mean of the batch norm after it. `MatchMoments` scales
and shifts each output channel to the mean and standard deviation that it had before pruning.

Cost: one pass over the weights, and one (O, K) x (K, K) product where an error is measured.
Sources: bias correction: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2; Finkelstein et al. 2019, arXiv 1906.03193.
Matching of weights: Banner et al., NeurIPS 2019, arXiv 1810.05723, "bias-correction".
Departures: the correction uses measured means, also of the dense network's inputs; `MatchMoments(what="outputs")` matches the
measured moments of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from bisparse.arguments import check_choice
from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned, method_setting_
from bisparse.pruning.methods.least_squares_problem import refitted_bias
from bisparse.pruning.methods.magnitude import Magnitude

__all__ = ["BiasCorrection", "MatchMoments"]


@dataclass(frozen=True)
class BiasCorrection(Method):
    """After another method, set the bias to ``b + E[y] - E[y']``, so that every output has the dense network's mean.

    E[y] is the mean output of the layer in the dense network, and E[y'] in the pruned one, on the calibration data.

    A layer with neither a bias nor a batch norm after it stays as the other method left it, with a note.

    Args:
        of: the other method, or its name.
    """

    of: Method = field(default_factory=Magnitude)

    def __post_init__(self) -> None:
        method_setting_(self, "of")

    @property
    def name(self) -> str:
        return f"{self.of.name} + bias correction"

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.of.needs | {Statistic.GRAM, Statistic.MEAN, Statistic.CROSS}

    def prune(self, problem: LayerProblem) -> Pruned:
        pruned = self.of.prune(problem)
        statistics = problem.measured.merged()
        weight = problem.weight * pruned.solution.mask if pruned.weight is None else pruned.weight
        plain = problem.least_squares(centred=False, statistics=statistics)
        rows = problem.rows(weight).float()
        before = plain.error(plain.weight * problem.rows(pruned.solution.mask))
        if problem.bias is None:
            return replace(pruned, error=plain.error(rows), error_before=before, note=_joined(pruned.note, "no bias to correct"))
        assert statistics.mean is not None
        bias = refitted_bias(problem.bias, plain.weight, rows, statistics.mean, statistics.dense_mean)
        centred = problem.least_squares(centred=True, statistics=statistics)
        return replace(pruned, bias=bias, error=centred.error(rows, plain.energy), error_before=before)


@dataclass(frozen=True)
class MatchMoments(Method):
    """After another method, scale and shift each output channel to the mean and standard deviation of the dense layer.

    Args:
        of: the other method, or its name.
        what: "weights": mean and standard deviation of the kept weights of each channel become those of its dense weights
            (no data needed); "outputs": the standard deviation of each output, and its mean where there is a bias.
    """

    of: Method = field(default_factory=Magnitude)
    what: Literal["weights", "outputs"] = "weights"

    def __post_init__(self) -> None:
        method_setting_(self, "of")
        check_choice("what", self.what, ("weights", "outputs"))

    @property
    def name(self) -> str:
        return f"{self.of.name} + matched {self.what}"

    @property
    def needs(self) -> frozenset[Statistic]:
        own = {Statistic.GRAM, Statistic.MEAN, Statistic.CROSS} if self.what == "outputs" else set()
        return self.of.needs | own

    def prune(self, problem: LayerProblem) -> Pruned:
        pruned = self.of.prune(problem)
        mask = problem.rows(pruned.solution.mask)
        rows = problem.rows(problem.weight * pruned.solution.mask if pruned.weight is None else pruned.weight).float()
        dense = problem.rows(problem.weight).float()
        if self.what == "weights":
            matched = _match_weights(rows, dense, mask)
            return replace(pruned, weight=problem.matrices(matched))
        statistics = problem.measured.merged()
        centred = problem.least_squares(centred=True, statistics=statistics)
        variance = ((rows @ centred.gram) * rows).sum(2)
        # Outputs that vary by no more than rounding have no standard deviation to match.
        noise = (rows.square() @ centred.floor[:, :, None])[:, :, 0].clamp(min=1e-30)
        scale = torch.where(variance > noise, (centred.energy / variance.clamp(min=1e-30)).sqrt(), 1.0)
        matched = rows * scale[:, :, None]
        assert statistics.mean is not None
        plain = problem.least_squares(centred=False, statistics=statistics)
        before = plain.error(plain.weight * mask)
        if problem.bias is None:
            return replace(pruned, weight=problem.matrices(matched), error=plain.error(matched), error_before=before)
        bias = refitted_bias(problem.bias, dense, matched, statistics.mean, statistics.dense_mean)
        error = centred.error(matched, plain.energy)
        return replace(pruned, weight=problem.matrices(matched), bias=bias, error=error, error_before=before)


def _match_weights(rows: Tensor, dense: Tensor, mask: Tensor) -> Tensor:
    number = mask.sum(2, keepdim=True).clamp(min=1)
    mean = rows.sum(2, keepdim=True) / number
    deviation = (((rows - mean) * mask).square().sum(2, keepdim=True) / number).sqrt()
    goal_mean = dense.mean(2, keepdim=True)
    goal_deviation = (dense - goal_mean).square().mean(2, keepdim=True).sqrt()
    scale = torch.where(deviation > 0, goal_deviation / deviation.clamp(min=1e-30), 1.0)
    return ((rows - mean) * scale + goal_mean) * mask


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
