"""Streamed moments of a layer's inputs.

Each piece of columns is centred on its own mean and merged by the pairwise update of Chan, Golub and LeVeque (The American
Statistician 37, 1983)::

    M <- M + M' + (n n' / (n + n')) d d^T        d = mean' - mean

which only adds positive semidefinite terms: nothing cancels, whatever the order of the data. The last term is computed as one
more column of the piece. Second moments of bfloat16 inputs accumulated under autocast are indefinite; autocast and reduced
matmul precision are therefore switched off while accumulating.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.layers import Layer
from bisparse.process_group import Ranks
from bisparse.pruning.calibration.statistics import (
    CalibrationError,
    Statistic,
    Statistics,
    full_precision,
    input_columns,
    precise,
)
from bisparse.tiles import LayoutKind

__all__ = ["Moments", "token_weights"]

AVERAGED = frozenset({Statistic.NORM, Statistic.MEAN, Statistic.GRAM, Statistic.CROSS})
ABOUT = {
    "covariance": ("mean", "mean"),
    "cross_covariance": ("dense_mean", "mean"),
    "dense_covariance": ("dense_mean", "dense_mean"),
}
"""The means that the two factors of each second moment are centred on."""
DENSE = frozenset({"cross_covariance", "dense_covariance", "dense_mean"})
MAX_INPUT = 2.0**53
"""Largest magnitude of an input: sums of squares of 2**21 such numbers are still finite in float32."""
MAX_TOKEN_ENERGY_RATIO = 32.0
"""Columns with more than this many times the usual energy are weighted down to that energy."""
SPLIT_COLUMNS = 512
"""From this many columns on, second moments are computed by halves."""


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
    """Weight of each token (column): 1, or less for one of very high energy; None if all weights are 1.

    In language models the first token can hold 99.8 % of the energy of an MLP's inputs: a mask and weights fitted to plain
    averages would fit that token alone. The usual energy is the mean without the largest hundredth.
    """
    columns = x.shape[1]
    largest = columns // 100
    if largest == 0:
        # Too few to tell what is usual.
        return None
    energy = x.square().sum(2, keepdim=True)
    usual = (energy.sum(1, keepdim=True) - energy.topk(largest, dim=1).values.sum(1, keepdim=True)) / (columns - largest)
    limit = MAX_TOKEN_ENERGY_RATIO * usual.clamp(min=0)
    heavy = (energy > limit) & (limit > 0)
    return torch.where(heavy, limit / energy, torch.ones_like(energy)) if bool(heavy.any()) else None


class Moments:
    """Accumulates a layer's statistics, batch by batch; sums in float32, means and weights in float64, count exact.

    Second moments and norms weight columns of very high energy down (see `MAX_TOKEN_ENERGY_RATIO`), because masks and weights are
    fitted to them. Means alone are unweighted.
    """

    def __init__(self, layer: Layer, needs: frozenset[Statistic]) -> None:
        self.layer = layer
        self.needs = needs
        self.columns = 0
        # By name and part. Sums of products, about the means below.
        self._sums: dict[str, Tensor] = {}
        # Total weights (G, 1) and means (G, K).
        self._means: dict[str, Tensor] = {}
        self._inputs: list[Tensor] = []
        self._paired: bool | None = None
        """Whether all inputs so far came with the dense network's; None: there were no inputs yet."""

    def add(
        self,
        inputs: Float[Tensor, "..."],
        dense_inputs: Float[Tensor, "..."] | None = None,
        keep: Bool[Tensor, "..."] | None = None,
        part: int | None = None,
        batch: int | None = None,
    ) -> None:
        """Add one batch of inputs, and the dense network's inputs of the same batch if "cross" is needed.

        Where tokens are routed, the two networks may send different tokens to a layer, which cannot be compared: once the numbers
        of tokens have differed, the layer is measured without "cross".

        Raises:
            CalibrationError: the inputs are not finite, or so large that their squares overflow; names layer and batch.
        """
        inputs = inputs.detach()
        self._check_inputs(inputs, batch)
        paired = dense_inputs is not None and dense_inputs.shape == inputs.shape and self._paired is not False
        if self._paired and not paired:
            self._forget_dense()
        self._paired = paired
        if Statistic.INPUTS in self.needs:
            rows = keep is not None and self.layer.layout.kind is not LayoutKind.CONV
            self._inputs.append((inputs[keep.to(inputs.device)] if rows and keep is not None else inputs).cpu())
        with full_precision(inputs.device):
            dense = None if dense_inputs is None or not paired else input_columns(self.layer, dense_inputs.detach(), keep)
            for x in input_columns(self.layer, inputs, keep):
                z = None if dense is None else next(dense)
                if part is None or part == 0:
                    self.columns += x.shape[1]
                if x.shape[1] and self.needs & AVERAGED:
                    self._add_columns(x, z, part or 0)

    def _check_inputs(self, inputs: Float[Tensor, "..."], batch: int | None) -> None:
        if inputs.numel() == 0:
            return
        largest = float(torch.stack(torch.aminmax(inputs)).abs().max())  # NaN is the largest of all
        where = (
            f"{self.layer.name}: {'' if batch is None else f'calibration batch {batch}: '}an input of shape {tuple(inputs.shape)}"
        )
        if not math.isfinite(largest):
            raise CalibrationError(
                f"{where} and dtype {inputs.dtype} holds NaN or infinite numbers; check the calibration data and the weights "
                "before this layer, or run the model in bfloat16 or float32"
            )
        if largest > MAX_INPUT and self.needs & (AVERAGED - {Statistic.MEAN}):
            raise CalibrationError(
                f"{where} holds numbers as large as {largest:.3g}, of which moments overflow float32 (up to {MAX_INPUT:.3g} they "
                "do not); check that batch and the weights before this layer, or leave the batch out"
            )

    def _add_columns(self, x: Float[Tensor, "G T K"], z: Float[Tensor, "G T K"] | None, part: int) -> None:
        weights = token_weights(x) if self.needs & {Statistic.GRAM, Statistic.NORM} else None
        total = torch.full((x.shape[0], 1), float(x.shape[1]), device=x.device) if weights is None else weights.sum(1)
        if Statistic.NORM in self.needs:
            self._sum("square", part, x.square().sum(1) if weights is None else (x.square() * weights).sum(1))
        before = self._means.get(f"weight/{part}")
        self._means[f"weight/{part}"] = precise(total) if before is None else before + precise(total)
        if not self.needs & {Statistic.MEAN, Statistic.GRAM, Statistic.CROSS}:
            return
        roots = None if weights is None else weights.sqrt()
        x = self._centred("mean", part, x, weights, total, before, roots)
        if Statistic.GRAM in self.needs:
            self._sum("covariance", part, _second_moment(x))
        if Statistic.CROSS in self.needs and z is not None:
            z = self._centred("dense_mean", part, z, weights, total, before, roots)
            self._sum("cross_covariance", part, z.transpose(1, 2) @ x)
            self._sum("dense_covariance", part, _second_moment(z))

    def _centred(
        self,
        name: str,
        part: int,
        x: Float[Tensor, "G T K"],
        weights: Float[Tensor, "G T 1"] | None,
        total: Float[Tensor, "G 1"],
        before: Float[Tensor, "G 1"] | None,
        roots: Float[Tensor, "G T 1"] | None,
    ) -> Float[Tensor, "G C K"]:
        """The piece centred on its own mean, with one more column for the shift of the mean; updates the mean."""

        def average(y: Tensor) -> Tensor:
            summed: Tensor = (y if weights is None else y * weights).sum(1, keepdim=True)
            return torch.div(summed, total[:, :, None])

        # In two steps: the second finds what rounding left in the first.
        first = average(x)
        x = x - first
        second = average(x)
        x = x - second
        mean = (precise(first) + precise(second))[:, 0]
        if roots is not None:
            # Both factors of each product carry the root.
            x = x * roots
        key = f"{name}/{part}"
        if before is None:
            self._means[key] = mean
            return x
        weight = precise(total)
        apart = mean - self._means[key]
        self._means[key] = self._means[key] + apart * (weight / (before + weight))
        root = (before * weight / (before + weight)).sqrt()
        return torch.cat([x, (apart * root).to(x.dtype)[:, None]], dim=1)

    def _sum(self, name: str, part: int, value: Tensor) -> None:
        key = f"{name}/{part}"
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value

    def _forget_dense(self) -> None:
        for held in (self._sums, self._means):
            for key in [key for key in held if key.split("/")[0] in DENSE]:
                del held[key]

    def share(self, ranks: Ranks) -> None:
        """Merge the other ranks' moments into these; raw inputs are not exchanged."""
        if ranks.size == 1:
            return
        columns, paired = zip(*ranks.all((self.columns, self._paired)), strict=True)
        self.columns = sum(columns)
        if False in paired:
            self._forget_dense()
        weights = {key: one for key, one in self._means.items() if key.startswith("weight/")}
        own = dict(self._means)
        self._means = {key: one.clone() if key in weights else one * weights[_weight_of(key)] for key, one in own.items()}
        ranks.sum_(self._means)
        for key, one in self._means.items():
            if not key.startswith("weight/"):
                one /= self._means[_weight_of(key)].clamp(min=torch.finfo(one.dtype).tiny)
        for key, one in self._sums.items():
            name, part = key.split("/")
            if name in ABOUT:
                # From the rank's own means to those of all.
                left, right = (
                    (own[f"{mean}/{part}"] - self._means[f"{mean}/{part}"]) * weights[f"weight/{part}"].sqrt()
                    for mean in ABOUT[name]
                )
                one.addcmul_(left.to(one.dtype)[:, :, None], right.to(one.dtype)[:, None, :])
        ranks.sum_(self._sums)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(one.nbytes for one in (*self._sums.values(), *self._means.values(), *self._inputs))

    def statistics(self) -> Statistics:
        """The averages so far."""

        def parts(name: str, held: dict[str, Tensor]) -> list[int]:
            return sorted(int(key.split("/")[1]) for key in held if key.startswith(f"{name}/")) if self.columns else []

        def average(name: str) -> Tensor | None:
            found = []
            for part in parts(name, self._sums):
                one = self._sums[f"{name}/{part}"]
                total = self._means[f"weight/{part}"].to(one.dtype).clamp(min=torch.finfo(one.dtype).tiny)
                found.append(one / total.view(-1, *[1] * (one.ndim - 1)))
            return torch.cat(found) if found else None

        def mean(name: str) -> Tensor | None:
            found = [self._means[f"{name}/{part}"].float() for part in parts(name, self._means)]
            return torch.cat(found) if found else None

        square = average("square")
        return Statistics(
            self.columns,
            None if square is None else square.sqrt(),
            mean("mean"),
            average("covariance"),
            average("cross_covariance"),
            mean("dense_mean"),
            average("dense_covariance"),
            tuple(self._inputs) if Statistic.INPUTS in self.needs else None,
        )


def _weight_of(key: str) -> str:
    return f"weight/{key.split('/')[1]}"
