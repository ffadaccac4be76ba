"""A layer as a least-squares problem: which weights on a support come closest to the dense layer's output.

With z the dense network's inputs of the layer, x its inputs now (z = x unless earlier layers are pruned already) and W the
dense weight, a weight W' has the mean squared output error, summed over the outputs of a problem, ::

    error(W') = E |W z - W' x|^2 = energy - 2 <W', B> + <W' G, W'>,    G = E[x x^T],  B = W E[z x^T],  energy = E |W z|^2

Where the layer's bias may change too, its best value for any W' is b + W E[z] - W' E[x], which turns each moment into the
covariance: the problem is then `centred`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.pruning.calibration.statistics import CalibrationError, Statistics, precise

__all__ = ["LeastSquaresProblem", "make_problem"]

EPSILON = torch.finfo(torch.float32).eps
RESOLUTION = 4.0
"""Rounding errors, in units of `EPSILON`, that a moment or a fitted output may accumulate."""
SILENT = 1e-30
"""Mean squares below this are too small for a ridge in float32: they count as zero."""


@dataclass(frozen=True)
class LeastSquaresProblem:
    """G least-squares problems of O outputs over K inputs each, float32."""

    weight: Float[Tensor, "G O K"]
    """The dense weight."""
    gram: Float[Tensor, "G K K"]
    target: Float[Tensor, "G O K"]
    """B above; ``weight @ gram`` where dense and present inputs are the same."""
    energy: Float[Tensor, "G O"]
    """Mean square of each dense output (variance if centred)."""
    floor: Float[Tensor, "G K"]
    """The mean square of an input below which it cannot be distinguished from rounding."""
    same_inputs: bool = False
    """Dense and present inputs are the same, so that the dense weight has no error, and no slope."""

    @property
    def scale(self) -> Float[Tensor, " G"]:
        """Mean of the diagonal of G: the unit in which damping is given."""
        return self.gram.diagonal(dim1=1, dim2=2).mean(1)

    def row_error(self, weight: Float[Tensor, "G O K"]) -> Float[Tensor, "G O"]:
        """Mean squared error of each output; clamped at zero against rounding."""
        # Around the dense weight, so that a small error is not the difference of two large numbers.
        step = weight - self.weight
        curved = ((step @ self.gram) * step).sum(2)
        if self.same_inputs:
            return curved.clamp(min=0)
        slope = self.weight @ self.gram - self.target
        at_dense = self.energy + ((slope - self.target) * self.weight).sum(2)
        return (at_dense + 2 * (slope * step).sum(2) + curved).clamp(min=0)

    def error(self, weight: Float[Tensor, "G O K"], energy_of: Float[Tensor, "G O"] | None = None) -> float:
        """Relative output error: error over energy, square root; 0 = as dense, 1 = as an output of zeros.

        `energy_of` gives the energy to relate to, in place of the problem's own.
        """
        energy = float((self.energy if energy_of is None else energy_of).double().sum())
        total = float(self.row_error(weight).double().sum())
        return (total / energy) ** 0.5 if energy > 0 else (0.0 if total == 0 else float("inf"))

    @property
    def silent(self) -> Bool[Tensor, " G"]:
        """Problems with no input that varies by more than rounding (none that is not zero, if not centred)."""
        varies = self.gram.diagonal(dim1=1, dim2=2) > self.floor.clamp(min=SILENT)
        return ~varies.any(1)

    @property
    def note(self) -> str:
        """A note for the report on inputs that give nothing to fit; empty if there are none."""
        silent = int(self.silent.sum())
        if silent == 0:
            return ""
        which = "no input" if silent == len(self.gram) else f"no input of {silent} of {len(self.gram)} groups"
        varies = "varies in the calibration data by more than rounding, or 1e-15"
        return f"{which} {varies}: nothing to fit, the kept weights are unchanged"

    def damped(self, damping: float) -> LeastSquaresProblem:
        """The problem with ``damping * scale * |W' - W|^2`` added: weights are pulled to the dense ones, not to zero."""
        if damping == 0:
            return self
        # Where no input of a problem varies there is no scale; any ridge leaves the weights unchanged.
        scale = torch.where(self.scale > SILENT, self.scale, 1.0)
        ridge = damping * scale[:, None] + self.floor
        gram = self.gram.clone(memory_format=torch.contiguous_format)
        # An input that is never used has no scale of its own; the mean keeps its row of G invertible.
        gram.diagonal(dim1=1, dim2=2).add_(ridge)
        return replace(
            self,
            gram=gram,
            target=self.target + ridge[:, None, :] * self.weight,
            energy=self.energy + (ridge[:, None, :] * self.weight.square()).sum(2),
        )

    def rows(self, index: Tensor) -> LeastSquaresProblem:
        """The same problems with only some of the outputs."""
        return replace(self, weight=self.weight[:, index], target=self.target[:, index], energy=self.energy[:, index])


def make_problem(
    weight: Float[Tensor, "G O K"], statistics: Statistics, *, centred: bool = False, name: str = "layer"
) -> LeastSquaresProblem:
    """The least-squares problem of a layer with the given dense weight, from its calibration statistics.

    Args:
        centred: the layer has a bias that will be refitted.

    Raises:
        CalibrationError: no column was seen, or moments that do not fit the weight or are not finite.
    """
    covariance = statistics.covariance
    if covariance is None or statistics.columns == 0:
        raise CalibrationError(f"{name}: calibration collected no input moments of this layer")
    assert not centred or statistics.mean is not None, "a centred problem needs the mean"
    gram = covariance if centred else statistics.gram
    assert gram is not None
    if gram.shape[-1] != weight.shape[-1] or gram.shape[0] not in (1, weight.shape[0]):
        raise CalibrationError(
            f"{name}: moments of shape {tuple(gram.shape)} do not fit a weight of {weight.shape[0]} problems with "
            f"{weight.shape[2]} inputs"
        )
    weight = weight.float()
    problems = weight.shape[0]
    cross, dense_gram = gram, gram
    if statistics.cross_covariance is not None:
        between = statistics.cross_covariance if centred else statistics.cross
        dense = statistics.dense_covariance if centred else statistics.dense_gram
        assert between is not None and dense is not None
        cross, dense_gram = between, dense
    floor = RESOLUTION * EPSILON * gram.diagonal(dim1=1, dim2=2)
    if centred and statistics.mean is not None:
        # The rounding error of float32 inputs of this size, and of their sums.
        floor = floor + (RESOLUTION * EPSILON * statistics.mean).square()
    floor = floor.expand(problems, -1).to(weight.device)
    gram, cross, dense_gram = (moment.expand(problems, -1, -1).to(weight.device) for moment in (gram, cross, dense_gram))
    target = weight @ cross
    same_inputs = statistics.cross_covariance is None
    energy = ((target if same_inputs else weight @ dense_gram) * weight).sum(2).clamp(min=0)
    problem = LeastSquaresProblem(weight, gram, target, energy, floor, same_inputs)
    if not bool(torch.isfinite(problem.energy).all() & torch.isfinite(gram).all()):
        raise CalibrationError(f"{name}: input moments are not finite; the inputs overflow float32")
    return problem


def refitted_bias(
    bias: Float[Tensor, " GO"] | None,
    weight: Float[Tensor, "G O K"],
    new_weight: Float[Tensor, "G O K"],
    mean: Float[Tensor, "G K"],
    dense_mean: Float[Tensor, "G K"] | None = None,
) -> Float[Tensor, " GO"]:
    """``b + W E[z] - W' E[x]``: the bias that keeps every output's mean where the dense layer has it."""
    dense_mean = mean if dense_mean is None else dense_mean
    # In float64: the difference of two large numbers where inputs have large means.
    shift = (precise(weight) @ precise(dense_mean)[:, :, None] - precise(new_weight) @ precise(mean)[:, :, None]).flatten()
    return (shift if bias is None else precise(bias) + shift).float()
