"""The report of a quantisation: one record per layer, with the scales from which the stored numbers follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bisparse.arguments import entry_of
from bisparse.layers import Skipped
from bisparse.pruning.reduction import positions, to_matrices_of_rows, to_rows
from bisparse.quantization.scheme import parse_scheme
from bisparse.tiles import Layout, from_matrices, to_matrices

__all__ = ["QuantizationReport", "QuantizedLayer", "stored_values"]


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantised parameter."""

    name: str
    """Name of the layer: the parameter's without ``.weight``."""
    parameter: str
    """The parameter's key in the state_dict."""
    shape: tuple[int, ...]
    dtype: str
    """Dtype of the model's weight, which has the dequantised values."""
    layout: Layout
    scheme: str
    scale: Float[Tensor, "G O S"]
    """Scales per output and group of inputs, for each of the layer's G problems (1 for a Linear), in the weight's dtype."""
    density: float
    """Fraction of weights that are not zero."""
    density_before: float
    """The same before quantisation: small weights may round to zero, and zeros stay zero."""
    weight_error: float
    """Relative error of the weights: root of their squared changes divided by the squared weights."""
    weight_energy: float
    """Sum of the squared weights before quantisation."""
    error: float | None = None
    """Relative error of the layer's output on calibration data; None without data."""
    error_rounded: float | None = None
    """The same with each weight rounded to nearest; None without data."""
    note: str = ""
    unit: float | None = None
    """The power of two of which the scales are float8 multiples, for "fp4"; None for other schemes."""

    def as_dict(self) -> dict[str, Any]:
        """Everything but the scales, as JSON values."""
        kept = {key: value for key, value in vars(self).items() if key not in ("scale", "layout", "weight_energy")}
        return {**kept, "layout": str(self.layout)}


@dataclass(frozen=True)
class QuantizationReport:
    """The quantised layers with their errors, and a reason for each layer that was not quantised."""

    scheme: str
    method: str
    layers: tuple[QuantizedLayer, ...] = field(repr=False)
    left: tuple[Skipped, ...] = field(default=(), repr=False)
    """Layers that were not quantised, each with its reason."""
    time_s: float = 0.0

    def __iter__(self) -> Iterator[QuantizedLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, key: str | int) -> QuantizedLayer:
        """The record of a layer, by its name or its number."""
        return entry_of(key, self.layers, {name: one for one in self.layers for name in (one.parameter, one.name)})

    @property
    def weight_error(self) -> float:
        """Relative error of all quantised weights: root of their squared changes divided by the squared weights."""
        total = sum(layer.weight_energy for layer in self.layers)
        changed = sum(layer.weight_error**2 * layer.weight_energy for layer in self.layers)
        return float((changed / total) ** 0.5) if total else 0.0

    @property
    def error(self) -> float | None:
        """Mean of the layers' output errors; None without data."""
        known = [layer.error for layer in self.layers if layer.error is not None]
        return sum(known) / len(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the scales, as JSON values."""
        return {
            "scheme": self.scheme,
            "method": self.method,
            "weight_error": self.weight_error,
            "error": self.error,
            "time_s": self.time_s,
            "layers": [layer.as_dict() for layer in self.layers],
            "left": [{"name": one.name, "reason": one.reason} for one in self.left],
        }

    def __str__(self) -> str:
        error = "" if self.error is None else f", mean output error {self.error:.4f}"
        return (
            f"{len(self)} layers quantised to {self.scheme} by {self.method}: weight error {self.weight_error:.4f}{error}; "
            f"{len(self.left)} left"
        )


@torch.no_grad()
def stored_values(weight: Shaped[Tensor, "..."], layer: QuantizedLayer) -> Shaped[Tensor, "..."]:
    """The stored numbers (int8 or float8) of a quantised weight, of its shape; times the scales they are the weight.

    Raises:
        ValueError: the weight was changed after quantisation.
    """
    scheme = parse_scheme(layer.scheme)
    if tuple(weight.shape) != layer.shape:
        raise ValueError(
            f"{layer.name}: its weight has shape {tuple(weight.shape)}, but the quantised one had shape {layer.shape}"
        )
    count = positions(layer.layout, weight.shape)
    rows = to_rows(to_matrices(weight.detach(), layer.layout), count)
    scale = scheme.spread(layer.scale.to(weight.device), rows.shape[-1])
    stored = scheme.round(rows.float(), scale.float())
    if not bool((stored.to(weight.dtype) * scale.to(weight.dtype) == rows).all()):
        raise ValueError(f"{layer.name}: its weight was changed after it was quantised; quantise the model again")
    return from_matrices(to_matrices_of_rows(stored.to(scheme.dtype), count), layer.layout, weight.shape).contiguous()
