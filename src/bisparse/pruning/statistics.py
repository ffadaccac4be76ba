"""What a layer's inputs look like on calibration data: streamed moments, in float32, whatever the model's precision.

With x a column of layer inputs (for a convolution, one unfolded patch of one group) the moments are averages over all
columns seen::

    gram  = E[x x^T]      mean = E[x]      norm = sqrt(E[x_j^2])      cross = E[z x^T]

where z is the same input in the dense network, while x is what the already pruned layers before it deliver.
Second moments of bfloat16 inputs accumulated under autocast come out indefinite; autocast and reduced matmul precision
are therefore switched off while accumulating.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from bisparse.layers import Layer
from bisparse.pruning.ranks import Ranks
from bisparse.tiles import LayoutKind

__all__ = ["CalibrationError", "Moments", "Statistic", "Statistics", "full_precision", "input_columns", "reading_of"]


class Statistic(StrEnum):
    """What a method may ask calibration to measure at a layer's input."""

    NORM = "norm"
    MEAN = "mean"
    GRAM = "gram"
    CROSS = "cross"
    """Dense inputs against the present ones, where earlier layers are pruned already."""
    INPUTS = "inputs"
    """The raw inputs themselves."""
    HELD_OUT = "held-out data"
    """The moments of every fifth batch kept apart."""


AVERAGED = frozenset({Statistic.NORM, Statistic.MEAN, Statistic.GRAM, Statistic.CROSS})
HEAVY = 32.0
"""Columns of more than this many times the usual energy count as if they had that much."""
SPLIT_COLUMNS = 512
"""From this many columns on, second moments are computed by halves."""
COLUMN_BYTES = 64 << 20
"""Unfolded columns are made and consumed in pieces of about this size."""


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
    gram: Float[Tensor, "G K K"] | None = None
    cross: Float[Tensor, "G K K"] | None = None
    """E[z x^T]: dense inputs against the pruned network's; None where both are the same."""
    dense_mean: Float[Tensor, "G K"] | None = None
    dense_gram: Float[Tensor, "G K K"] | None = None
    inputs: tuple[Float[Tensor, "..."], ...] | None = None
    """The layer's raw inputs, one tensor a calibration batch, for methods that iterate over samples."""
    held_out: Statistics | None = None
    """The same of the batches held out for choosing the damping; not contained in the figures above."""

    def merged(self) -> Statistics:
        """With the held-out batches taken in."""
        other = self.held_out
        if other is None or other.columns == 0:
            return replace(self, held_out=None)
        total = self.columns + other.columns
        share = other.columns / total

        def mix(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.lerp(a, b, share)

        norm = None
        if self.norm is not None and other.norm is not None:
            norm = torch.lerp(self.norm.square(), other.norm.square(), share).sqrt()
        inputs = None if self.inputs is None else self.inputs + (other.inputs or ())
        return Statistics(
            total,
            norm,
            mix(self.mean, other.mean),
            mix(self.gram, other.gram),
            mix(self.cross, other.cross),
            mix(self.dense_mean, other.dense_mean),
            mix(self.dense_gram, other.dense_gram),
            inputs,
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, and float32 products really in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def input_columns(layer: Layer, inputs: Float[Tensor, "..."], keep: Bool[Tensor, "..."] | None = None) -> Iterator[Tensor]:
    """A layer's inputs as pieces of shape (G, T, K), float32, in the order of `to_rows`.

    Args:
        keep: for inputs (*, I) of the same leading shape, which positions count: `False` = padding.
    """
    if layer.layout.kind is LayoutKind.CONV:
        yield from _patches(layer.module, inputs)
        return
    flat = inputs.reshape(-1, inputs.shape[-1])
    if keep is not None and keep.shape == inputs.shape[:-1]:
        flat = flat[keep.reshape(-1).to(flat.device)]
    rows = max(1, COLUMN_BYTES // (4 * max(1, flat.shape[1])))
    for piece in flat.split(rows):
        yield piece.float().unsqueeze(0)


def reading_of(layer: Layer) -> Hashable:
    """Layers for which this is equal make the same columns of the same input."""
    module = layer.module
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return layer.name if isinstance(module, nn.MultiheadAttention) else "rows"


def _patches(module: nn.Module, inputs: Float[Tensor, "N C *spatial"]) -> Iterator[Float[Tensor, "G T K"]]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dimensions = len(module.kernel_size)
    if inputs.ndim == dimensions + 1:
        inputs = inputs.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The convolution's own list of pads: the only place where padding="same" has become numbers.
    pads = list(module._reversed_padding_repeated_twice)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padded_sizes = [size + pads[-2 * i - 2] + pads[-2 * i - 1] for i, size in enumerate(inputs.shape[2:])]
    out = [(padded_sizes[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dimensions)]
    per_image = 4 * inputs.shape[1] * int(torch.tensor(kernel).prod()) * int(torch.tensor(out).prod())
    for images in inputs.split(max(1, COLUMN_BYTES // max(1, per_image))):
        x = functional.pad(images.float(), pads, mode=mode) if any(pads) else images.float()
        x = x.unflatten(1, (module.groups, -1))
        taps = []
        for position in torch.cartesian_prod(*(torch.arange(size) for size in kernel)).reshape(-1, dimensions).tolist():
            tap = x
            for i, offset in enumerate(position):
                start = offset * dilation[i]
                tap = tap.movedim(3 + i, 0)[start : start + stride[i] * (out[i] - 1) + 1 : stride[i]].movedim(0, 3 + i)
            taps.append(tap.flatten(3))
        columns = torch.stack(taps, 2)  # (N, G, P, I, positions)
        yield columns.permute(1, 0, 4, 2, 3).flatten(3).flatten(1, 2)


def _second_moment(x: Float[Tensor, "G T K"]) -> Float[Tensor, "G K K"]:
    """``x^T x`` by halves of the columns, of which one of the two mixed quarters is the other transposed."""
    width = x.shape[2]
    if width < SPLIT_COLUMNS:
        return x.transpose(1, 2) @ x
    left, right = x.split([width // 2, width - width // 2], dim=2)
    mixed = left.transpose(1, 2) @ right
    top = torch.cat([_second_moment(left), mixed], dim=2)
    return torch.cat([top, torch.cat([mixed.transpose(1, 2), _second_moment(right)], dim=2)], dim=1)


def token_weights(x: Float[Tensor, "G T K"]) -> Float[Tensor, "G T 1"] | None:
    """What each token, or column, counts: 1, less for one of very much energy; None where all count 1.

    In language models the first token can hold 99.8 % of the energy of an MLP's inputs: a mask and weights fitted to plain
    averages are made for that token alone. The usual energy is the mean without the largest hundredth.
    """
    columns = x.shape[1]
    largest = columns // 100
    if largest == 0:
        # Too few to tell what is usual.
        return None
    energy = x.square().sum(2, keepdim=True)
    usual = (energy.sum(1, keepdim=True) - energy.topk(largest, dim=1).values.sum(1, keepdim=True)) / (columns - largest)
    limit = HEAVY * usual.clamp(min=0)
    heavy = (energy > limit) & (limit > 0)
    return torch.where(heavy, limit / energy, torch.ones_like(energy)) if bool(heavy.any()) else None


class Moments:
    """Accumulates a layer's statistics, batch by batch; sums in float32, count exact.

    Second moments and norms are what masks and weights are fitted to: with them, columns of very much energy count less (see
    `HEAVY`). Means alone are plain.
    """

    def __init__(self, layer: Layer, needs: frozenset[Statistic]) -> None:
        self.layer = layer
        self.needs = needs
        self.columns = 0
        self._sums: dict[str, Tensor] = {}
        self._inputs: list[Tensor] = []

    def add(
        self,
        inputs: Float[Tensor, "..."],
        dense_inputs: Float[Tensor, "..."] | None = None,
        keep: Bool[Tensor, "..."] | None = None,
        part: int | None = None,
    ) -> None:
        """Take in one batch of inputs, and the dense network's inputs of the same batch where "cross" is needed.

        Raises:
            CalibrationError: the inputs are not finite.
        """
        inputs = inputs.detach()
        if not bool(torch.isfinite(inputs).all()):
            raise CalibrationError(
                f"{self.layer.name}: an input of shape {tuple(inputs.shape)} and dtype {inputs.dtype} holds NaN or infinite "
                "numbers; check the calibration data and the weights before this layer, or run the model in bfloat16 or float32"
            )
        if Statistic.INPUTS in self.needs:
            self._inputs.append(inputs.cpu())
        with full_precision(inputs.device):
            dense = None if dense_inputs is None else input_columns(self.layer, dense_inputs.detach(), keep)
            for x in input_columns(self.layer, inputs, keep):
                z = None if dense is None else next(dense)
                if part is None or part == 0:
                    self.columns += x.shape[1]
                self._add_columns(x, z, part or 0)

    def _add_columns(self, x: Float[Tensor, "G T K"], z: Float[Tensor, "G T K"] | None, part: int) -> None:
        if not self.needs & AVERAGED:
            return
        weights = token_weights(x) if self.needs & {Statistic.GRAM, Statistic.NORM} else None
        roots = None if weights is None else weights.sqrt()
        total = torch.full((x.shape[0], 1), float(x.shape[1]), device=x.device) if weights is None else weights.sum(1)
        self._sum("weight", part, total)
        if roots is not None:
            # Both factors of each product carry the root.
            x, z = x * roots, None if z is None else z * roots
        if Statistic.NORM in self.needs:
            self._sum("square", part, x.square().sum(1))
        if Statistic.MEAN in self.needs:
            self._sum("mean", part, x.sum(1) if roots is None else (x * roots).sum(1))
        if Statistic.GRAM in self.needs:
            self._sum("gram", part, _second_moment(x))
        if Statistic.CROSS in self.needs and z is not None:
            self._sum("cross", part, z.transpose(1, 2) @ x)
            self._sum("dense_gram", part, _second_moment(z))
            self._sum("dense_mean", part, z.sum(1) if roots is None else (z * roots).sum(1))

    def _sum(self, name: str, part: int, value: Tensor) -> None:
        key = f"{name}/{part}"
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value

    def share(self, ranks: Ranks) -> None:
        """Take in what the other ranks have accumulated; raw inputs are not exchanged."""
        self.columns = sum(ranks.all(self.columns))
        ranks.sum_(self._sums)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(4 * one.numel() for one in self._sums.values()) + sum(one.nbytes for one in self._inputs)

    def statistics(self) -> Statistics:
        """The averages so far."""

        def average(name: str) -> Tensor | None:
            parts = sorted(int(key.split("/")[1]) for key in self._sums if key.startswith(f"{name}/"))
            if not parts or self.columns == 0:
                return None
            sums = [self._sums[f"{name}/{part}"] for part in parts]
            weights = [self._sums[f"weight/{part}"].clamp(min=torch.finfo(torch.float32).tiny) for part in parts]
            return torch.cat([one / total.view(-1, *[1] * (one.ndim - 1)) for one, total in zip(sums, weights, strict=True)])

        square = average("square")
        return Statistics(
            self.columns,
            None if square is None else square.sqrt(),
            average("mean"),
            average("gram"),
            average("cross"),
            average("dense_mean"),
            average("dense_gram"),
            tuple(self._inputs) if Statistic.INPUTS in self.needs else None,
        )
