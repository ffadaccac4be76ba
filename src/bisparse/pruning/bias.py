"""Output bias: where it can be changed, and two repairs that need no reconstruction.

A pruned layer shifts the mean of its outputs. The shift is known from the mean input, and is taken back by the layer's bias
or, where it has none, by the running mean of the batch norm that follows: BN(y + b) is BN(y) with running mean less b.
Sources: Nagel et al. 2019 (arXiv 1906.04721), Finkelstein et al. 2019 (1906.03193): bias correction; Banner et al. 2018
(1810.05723): matching mean and deviation of each channel's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bisparse.layers import Layer
from bisparse.pruning.calibration.hooks import call_model
from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.pruning.methods.least_squares_problem import refitted_bias
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.tiles import LayoutKind

__all__ = ["Bias", "BiasCorrection", "MatchMoments", "bias_of", "norms_after"]


@dataclass(frozen=True)
class Bias:
    """What a constant added to a layer's outputs is stored in."""

    tensor: Tensor
    """The bias, or the running mean of the batch norm behind the layer."""
    sign: int = 1
    """-1 for a running mean, which is subtracted."""

    @property
    def value(self) -> Tensor:
        return self.tensor.detach() * self.sign

    def write_(self, value: Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(value * self.sign)


def bias_of(layer: Layer, norms: Mapping[str, nn.Module] | None = None) -> Bias | None:
    """Where the constant added to a layer's outputs is stored; None where it has none of its own.

    Args:
        norms: the batch norm behind each layer, from `norms_after`.
    """
    if isinstance(layer.module, nn.MultiheadAttention):
        # Separate projections share one packed bias; it is left alone.
        name = "in_proj_bias" if layer.parameter == "in_proj_weight" else None
    elif layer.layout.kind in (LayoutKind.EXPERTS, LayoutKind.EXPERTS_TRANSPOSED) or layer.parameter != "weight":
        name = None
    else:
        name = "bias"
    own = layer.module._parameters.get(name) if name is not None else None
    if isinstance(own, Tensor):
        return Bias(own)
    norm = (norms or {}).get(layer.name)
    if norm is not None:
        mean = norm.running_mean
        assert isinstance(mean, Tensor)
        return Bias(mean, -1)
    return None


def norms_after(
    model: nn.Module, layers: Iterable[Layer], batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, nn.Module]:
    """The batch norm that takes each layer's output as its input, by what happens to one batch.

    A norm that serves several layers, or a layer called more than once, is left out.
    """
    by_module = {id(layer.module): layer.name for layer in layers}
    outputs: list[tuple[str, Tensor]] = []
    pairs: list[tuple[str, nn.Module]] = []

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((by_module[id(module)], output))

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            pairs.extend((name, module) for name, output in outputs if output is args[0])

    handles = []
    for module in model.modules():
        if id(module) in by_module:
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before))
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            call_model(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    names = [name for name, _ in pairs]
    norms = [id(module) for _, module in pairs]
    called = [name for name, _ in outputs]
    return {
        name: module
        for name, module in pairs
        if names.count(name) == 1 and norms.count(id(module)) == 1 and called.count(name) == 1
    }


@dataclass(frozen=True)
class BiasCorrection(Method):
    """After another method: the bias that keeps every output's mean where the dense network has it, ``b + E[y] - E[y']``.

    A layer without a bias, and without a batch norm behind it, stays as the other method left it, with a note.
    """

    of: Method = field(default_factory=Magnitude)

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
    """After another method: scale and shift each output channel to the mean and deviation it had dense.

    Args:
        of: the other method.
        what: "weights": mean and standard deviation of the kept weights of each channel become those of its dense weights
            (no data needed); "outputs": the standard deviation of each output, and its mean where there is a bias.
    """

    of: Method = field(default_factory=Magnitude)
    what: Literal["weights", "outputs"] = "weights"

    def __post_init__(self) -> None:
        if self.what not in ("weights", "outputs"):
            raise ValueError(f"what={self.what!r}: expected 'weights' or 'outputs'")

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
        # Outputs that vary by no more than rounding have no deviation to match.
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
