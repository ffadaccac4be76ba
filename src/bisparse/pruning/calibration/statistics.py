"""Statistics of a layer's inputs on calibration data: moments in float32, whatever the model's precision.

With x a column of layer inputs (for a convolution, one unfolded patch of one group) the moments are averages over all
columns seen::

    gram  = E[x x^T]      mean = E[x]      norm = sqrt(E[x_j^2])      cross = E[z x^T]

where z is the same input in the dense network and x the input that the already pruned layers before it produce. Second moments
are stored about the mean, never about zero: the variance of inputs of 1000 +- 0.3 is lost in a float32 mean of their squares,
and weights fitted to the difference of two such numbers explode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from bisparse.layers import Layer
from bisparse.tiles import LayoutKind

__all__ = [
    "CalibrationError",
    "ExpertStatistics",
    "Statistic",
    "Statistics",
    "batched",
    "full_precision",
    "input_columns",
    "input_key",
    "positions_shape",
    "precise",
    "stacked_moments",
]


class Statistic(StrEnum):
    """What a method may ask calibration to measure at a layer's input."""

    NORM = "norm"
    MEAN = "mean"
    GRAM = "gram"
    CROSS = "cross"
    """Cross moment of dense and present inputs, where earlier layers are pruned already."""
    INPUTS = "inputs"
    """The raw inputs."""
    HELD_OUT = "held-out data"
    """The moments of every fifth batch, kept separate."""


COLUMN_BYTES = 64 << 20
"""Columns are unfolded and consumed in pieces of about this many bytes."""


class CalibrationError(ValueError):
    """The calibration data cannot be used: empty, not finite, or not what the model takes."""


@dataclass(frozen=True)
class Statistics:
    """What calibration measured at one layer's input, in float32: averages over the columns it has seen.

    K = positions * I inputs, kernel position by kernel position; G = groups of a convolution, 3 for packed projections
    with inputs of their own, 1 where all problems share their input.
    """

    columns: int
    """Number of columns: tokens, or output positions of a convolution."""
    norm: Float[Tensor, "G K"] | None = None
    """Root mean square of each input."""
    mean: Float[Tensor, "G K"] | None = None
    covariance: Float[Tensor, "G K K"] | None = None
    """E[(x - mean) (x - mean)^T]; measured wherever the gram is asked for."""
    cross_covariance: Float[Tensor, "G K K"] | None = None
    """E[(z - dense_mean) (x - mean)^T]: dense inputs against the pruned network's; None where both are the same."""
    dense_mean: Float[Tensor, "G K"] | None = None
    dense_covariance: Float[Tensor, "G K K"] | None = None
    inputs: tuple[Float[Tensor, "..."], ...] | None = None
    """The layer's raw inputs, one tensor per calibration batch, for methods that iterate over samples."""
    held_out: Statistics | None = None
    """The statistics of the batches held out for choosing the damping, which the fields above exclude."""
    experts: tuple[ExpertStatistics, ...] | None = None
    """Of experts in one parameter, the statistics of each; then all fields above but `columns` are empty."""

    @property
    def gram(self) -> Float[Tensor, "G K K"] | None:
        """E[x x^T]."""
        return _about_zero(self.covariance, self.mean, self.mean)

    @property
    def cross(self) -> Float[Tensor, "G K K"] | None:
        """E[z x^T]."""
        return _about_zero(self.cross_covariance, self.dense_mean, self.mean)

    @property
    def dense_gram(self) -> Float[Tensor, "G K K"] | None:
        """E[z z^T]."""
        return _about_zero(self.dense_covariance, self.dense_mean, self.dense_mean)

    def merged(self) -> Statistics:
        """The statistics with the held-out batches merged in."""
        other = self.held_out
        if other is None or other.columns == 0:
            return replace(self, held_out=None)
        total = self.columns + other.columns
        share = other.columns / total

        def mix(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.lerp(a, b, share)

        apart = None if self.mean is None or other.mean is None else other.mean - self.mean
        dense_apart = None if self.dense_mean is None or other.dense_mean is None else other.dense_mean - self.dense_mean

        def mix_about(a: Tensor | None, b: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor | None:
            mixed = mix(a, b)
            if mixed is not None and left is not None and right is not None:
                # Each part is about its own mean.
                mixed.addcmul_(left[:, :, None], right[:, None, :], value=share * (1 - share))
            return mixed

        norm = None
        if self.norm is not None and other.norm is not None:
            norm = torch.lerp(self.norm.square(), other.norm.square(), share).sqrt()
        inputs = None if self.inputs is None else self.inputs + (other.inputs or ())
        return Statistics(
            total,
            norm,
            mix(self.mean, other.mean),
            mix_about(self.covariance, other.covariance, apart, apart),
            mix_about(self.cross_covariance, other.cross_covariance, dense_apart, apart),
            mix(self.dense_mean, other.dense_mean),
            mix_about(self.dense_covariance, other.dense_covariance, dense_apart, dense_apart),
            inputs,
        )


@dataclass(frozen=True)
class ExpertStatistics:
    """What calibration measured at the input of one expert of a stack."""

    routed: int
    """Number of tokens that the model routed to the expert."""
    all_tokens: bool
    """Whether the statistics are of all tokens, since fewer than the floor were routed to the expert."""
    statistics: Statistics


def stacked_moments(experts: Sequence[ExpertStatistics]) -> Statistics:
    """Statistics with one problem per expert (G = E), each weighted by its number of tokens; zeros for experts without tokens.

    Raises:
        CalibrationError: no expert has tokens.
    """
    parts = [one.statistics.merged() for one in experts]
    total = sum(part.columns for part in parts)
    seen = next((part for part in parts if part.columns), None)
    if seen is None or seen.covariance is None or seen.mean is None:
        raise CalibrationError("calibration collected no input moments of any expert")
    covariance, mean = [], []
    for part in parts:
        share = part.columns * len(parts) / total
        covariance.append(torch.zeros_like(seen.covariance) if part.covariance is None else part.covariance * share)
        mean.append(torch.zeros_like(seen.mean) if part.mean is None else part.mean * share**0.5)
    return Statistics(total, mean=torch.cat(mean), covariance=torch.cat(covariance))


def _about_zero(covariance: Tensor | None, left: Tensor | None, right: Tensor | None) -> Float[Tensor, "G K K"] | None:
    if covariance is None or left is None or right is None:
        return covariance
    return torch.addcmul(covariance, left[:, :, None], right[:, None, :])


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Arithmetic without the caller's autocast, matmul precision and default dtype. Models run outside of it, under these."""
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64 where the device supports it (Apple's GPUs do not)."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def input_columns(layer: Layer, inputs: Float[Tensor, "..."], keep: Bool[Tensor, "..."] | None = None) -> Iterator[Tensor]:
    """A layer's inputs as pieces of shape (G, T, K), float32, in the order of `to_rows`.

    Args:
        keep: which positions count, of the shape `positions_shape`: `False` = padding. Ignored for convolutions that change the
            number of positions.
    """
    if layer.layout.kind is LayoutKind.CONV:
        yield from _patches(layer.module, inputs, keep)
        return
    flat = inputs.reshape(-1, inputs.shape[-1])
    if keep is not None:
        flat = flat[keep.reshape(-1).to(flat.device)]
    rows = max(1, COLUMN_BYTES // (4 * max(1, flat.shape[1])))
    for piece in flat.split(rows):
        yield piece.float().unsqueeze(0)


def batched(layer: Layer, inputs: Float[Tensor, "..."]) -> Float[Tensor, "N ..."]:
    """A layer's inputs with a first dimension, which a single vector or picture lacks."""
    module = layer.module
    single = len(module.kernel_size) + 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return inputs[None] if inputs.ndim == single else inputs


def positions_shape(layer: Layer, inputs: Float[Tensor, "N ..."]) -> tuple[int, ...]:
    """The shape of the positions that `inputs` has a column for, before a convolution changes their number."""
    return (inputs.shape[0], *inputs.shape[2:]) if layer.layout.kind is LayoutKind.CONV else tuple(inputs.shape[:-1])


def input_key(layer: Layer) -> Hashable:
    """A key that is equal for layers that unfold the same input into the same columns."""
    module = layer.module
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return layer.name if isinstance(module, nn.MultiheadAttention) else "rows"


def _patches(
    module: nn.Module, inputs: Float[Tensor, "N C *spatial"], keep: Bool[Tensor, "..."] | None
) -> Iterator[Float[Tensor, "G T K"]]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dimensions = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The convolution's own list of pads: the only place where padding="same" is given as numbers.
    pads = list(module._reversed_padding_repeated_twice)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padded_sizes = [size + pads[-2 * i - 2] + pads[-2 * i - 1] for i, size in enumerate(inputs.shape[2:])]
    out = [(padded_sizes[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dimensions)]
    per_image = 4 * inputs.shape[1] * math.prod(kernel) * math.prod(out)
    if keep is not None and list(keep.shape[1:]) != out:
        keep = None
    images_at_once = max(1, COLUMN_BYTES // max(1, per_image))
    for number, images in enumerate(inputs.split(images_at_once)):
        x = functional.pad(images.float(), pads, mode=mode) if any(pads) else images.float()
        x = x.unflatten(1, (module.groups, -1))
        taps = []
        for position in itertools.product(*(range(size) for size in kernel)):
            tap = x
            for i, offset in enumerate(position):
                start = offset * dilation[i]
                tap = tap.movedim(3 + i, 0)[start : start + stride[i] * (out[i] - 1) + 1 : stride[i]].movedim(0, 3 + i)
            taps.append(tap.flatten(3))
        columns = torch.stack(taps, 2)  # (N, G, P, I, positions)
        columns = columns.permute(1, 0, 4, 2, 3).flatten(3).flatten(1, 2)
        if keep is not None:
            own = keep[number * images_at_once : (number + 1) * images_at_once]
            columns = columns[:, own.reshape(-1).to(columns.device)]
        yield columns
