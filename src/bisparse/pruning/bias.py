"""Where the constant added to a layer's outputs is stored: its bias or the running mean of the batch norm after it.

BN(y + b) equals BN(y) with a running mean smaller by b, so a batch norm can replace the bias of a layer without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bisparse.layers import Layer
from bisparse.pruning.calibration.hooks import call_model
from bisparse.tiles import LayoutKind

__all__ = ["Bias", "bias_of", "norms_after"]


@dataclass(frozen=True)
class Bias:
    """The tensor that stores the constant added to a layer's outputs."""

    tensor: Tensor
    """The bias, or the running mean of the batch norm after the layer."""
    sign: int = 1
    """-1 for a running mean, which is subtracted."""

    @property
    def value(self) -> Tensor:
        return self.tensor.detach() * self.sign

    def write_(self, value: Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(value * self.sign)


def bias_of(layer: Layer, norms: Mapping[str, nn.Module] | None = None) -> Bias | None:
    """Where the constant added to a layer's outputs is stored; None if it has none of its own.

    Args:
        norms: the batch norm after each layer, from `norms_after`.
    """
    if isinstance(layer.module, nn.MultiheadAttention):
        # Separate projections share one packed bias, which is not changed.
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
    """By layer, the batch norm whose input is the layer's output, found by running one batch.

    Norms of several layers, layers that are called more than once, and norms of another axis than the layer's outputs, such as
    of the positions that a Linear layer is applied to, are left out.
    """
    if not any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules()):
        return {}  # running the model would keep the outputs of all layers in memory
    by_module = {id(layer.module): layer.name for layer in layers if layer.parameter == "weight"}
    outputs: list[tuple[str, Tensor]] = []
    pairs: list[tuple[str, nn.Module]] = []
    per_output: set[str] = set()

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            name = by_module[id(module)]
            outputs.append((name, output))
            # A batch norm's axis is 1: channels, if a convolution has a batch; a Linear layer's outputs, of 2 axes only.
            axes = module.weight.ndim if isinstance(module, _ConvNd) else 2
            if output.ndim == axes:
                per_output.add(name)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            pairs.extend((name, module) for name, output in outputs if output is args[0] and name in per_output)

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
