"""Where the constant added to a layer's outputs is stored: its bias or the running mean of the batch norm after it.

BN(y + b) equals BN(y) with a running mean smaller by b, so a batch norm can replace the bias of a layer without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bisparse.layers import Layer
from bisparse.tiles import LayoutKind

__all__ = ["Bias", "bias_of"]


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
        norms: the batch norm after each layer, from `bisparse.pruning.norms_after.norms_after`.
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
