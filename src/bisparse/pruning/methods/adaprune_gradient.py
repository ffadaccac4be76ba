"""AdaPrune as the paper's code does it: mean absorption, then Adam on the kept weights and the bias, layer by layer.

The mask is applied again at every step; the loss is the mean squared difference to the layer's dense output on samples drawn
at random. It is here for comparison: `AdaPrune` solves the same problem exactly, in less time.
Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, section 5: 1000 steps, batches of 50, rates 1e-3 (weights) and 1e-2 (bias).
Departures: it runs in any order of calibration; the paper's is "parallel".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bisparse.arguments import check_count, check_number
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned, method_setting_, prune_in_range
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.pruning.methods.mean_absorption import absorb_mean

__all__ = ["GradientAdaPrune"]

USUAL_FOR_ADAM = 6
"""Weights are used as they are if the largest is between 2^-6 and 2^6. Adam's steps have an absolute size, about 1e-3, which the
paper chose for usual weights: where the largest weight is 2^-20, each step is a thousand times as large as it."""


@dataclass(frozen=True)
class GradientAdaPrune(Method):
    """Adam on the mask that another method selects.

    Args:
        selection: the method that chooses the mask, or its name.
        steps, batch_size, rate, bias_rate: the paper's.
        seed: of the samples drawn.
    """

    selection: Method = field(default_factory=Magnitude)
    steps: int = 1000
    batch_size: int = 50
    rate: float = 1e-3
    bias_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        method_setting_(self, "selection")
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size)
        check_number("rate", self.rate, above=0)
        check_number("bias_rate", self.bias_rate, least=0)
        check_count("seed", self.seed, least=0)

    @property
    def name(self) -> str:
        return "adaprune by gradient"

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.selection.needs | {Statistic.INPUTS, Statistic.GRAM}

    def prune(self, problem: LayerProblem) -> Pruned:
        return prune_in_range(self._fit, problem, USUAL_FOR_ADAM)

    def _fit(self, problem: LayerProblem) -> Pruned:
        selected = self.selection.prune(problem)
        inputs = problem.measured.inputs
        if inputs is None or problem.output is None:
            raise CalibrationError(f"{problem.name}: calibration kept no raw inputs of this layer")
        mask = selected.solution.mask
        weight = absorb_mean(problem.weight * mask, problem.weight, mask, problem.pattern).float()
        weight, bias = self._adam(problem, inputs, weight, mask)
        whole = problem.least_squares(centred=False)
        rows = problem.rows(weight)
        # The error of the weights alone, where a bias moved too, would not be the layer's: it is measured on the inputs.
        error = whole.error(rows) if bias is None else _measured_error(problem, inputs, weight, bias)
        before = whole.error(whole.weight * problem.rows(mask))
        if not error <= before:
            note = f"kept weights are unchanged, since Adam made the error larger: {error:.3g}"
            return Pruned(selected.solution, error=before, error_before=before, note=note)
        return Pruned(selected.solution, weight, bias, error=error, error_before=before)

    def _adam(
        self, problem: LayerProblem, inputs: tuple[Tensor, ...], weight: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if torch.is_inference_mode_enabled():
            raise ValueError("GradientAdaPrune needs gradients: call this outside of torch.inference_mode(), or use AdaPrune")
        assert problem.output is not None
        generator = torch.Generator().manual_seed(self.seed)
        alike = len({one.shape[1:] for one in inputs}) == 1
        pools = (torch.cat(inputs),) if alike else inputs
        with torch.enable_grad():
            kept = weight.clone().requires_grad_()
            bias = None if problem.bias is None else problem.bias.float().clone().requires_grad_()
            groups = [{"params": [kept], "lr": self.rate}]
            if bias is not None:
                groups.append({"params": [bias], "lr": self.bias_rate})
            optimizer = torch.optim.Adam(groups)
            # The dense outputs are kept, as the paper's code does, instead of made again at every step.
            goals = [_dense_outputs(problem, pool, weight.device) for pool in pools]
            for _ in range(self.steps):
                chosen = int(torch.randint(len(pools), (1,), generator=generator, device="cpu"))
                pool = pools[chosen]
                index = torch.randint(pool.shape[0], (min(self.batch_size, pool.shape[0]),), generator=generator, device="cpu")
                x, goal = (kind[index].float().to(weight.device) for kind in (pool, goals[chosen]))
                loss = torch.nn.functional.mse_loss(problem.output(x, kept * mask, bias), goal)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    kept.mul_(mask)
        return kept.detach(), None if bias is None else bias.detach()


@torch.no_grad()
def _dense_outputs(problem: LayerProblem, inputs: Tensor, device: torch.device) -> Tensor:
    assert problem.output is not None
    bias = None if problem.bias is None else problem.bias.float()
    return torch.cat([problem.output(x.float().to(device), problem.weight.float(), bias).cpu() for x in inputs.split(64)])


def _measured_error(problem: LayerProblem, inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> float:
    assert problem.output is not None and problem.bias is not None
    wrong, energy = 0.0, 0.0
    for one in inputs:
        for x in one.split(64):
            x = x.float().to(weight.device)
            linear = problem.output(x, problem.weight.float(), None)
            now = problem.output(x, weight, bias - problem.bias.float())
            wrong += float((now - linear).double().square().sum())
            energy += float(linear.double().square().sum())
    return (wrong / energy) ** 0.5 if energy > 0 else 0.0
