"""The loop of reconstruction: Adam on the kept weights of pruned layers, judged on held-out batches.

Masks do not change. Steps are relative to the size of each parameter and taken on float32 copies, since they are below the
resolution of bfloat16. Guarantee: the error on held-out batches does not grow; otherwise all weights are left unchanged.
Deterministic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bisparse.distances import logit_divergence
from bisparse.pruning.calibration.finished_block import BlockFit, FinishedBlock
from bisparse.pruning.calibration.moments import token_weights
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.token_masks import fitted

__all__ = ["fit_kept_", "only_these_require_grad"]

STORE_EVERY = 600.0
"""Seconds between two copies of a fit's state on disk, for fits that are stored."""
STORED_NUMBERS = ("epoch", "step", "start", "best", "scale")
SMALLER = 0.25
"""Factor of the step size after a pass that reduced the held-out error too little; after a second such pass the fit ends."""
WARM_UP = 0.05
"""Fraction of an epoch's steps in which the step size rises; after that it falls along a cosine."""


def fit_kept_(block: FinishedBlock, epochs: int, learning_rate: float, worthwhile: float) -> BlockFit:
    """Fit the kept weights, and biases, of the block's pruned layers, in place.

    Args:
        epochs: maximum number of passes over the batches.
        learning_rate: largest step, as a fraction of the root mean square of a parameter's kept weights.
        worthwhile: after a pass that does not reduce the held-out error by at least this fraction, the fit goes on from the best
            weights with a quarter of the step, and after another one it ends.

    Raises:
        CalibrationError: an output without gradients.
    """
    fitted = _parameters(block)
    state = _State.of(fitted)
    precise = state.precise
    kept = [parameter != 0 for parameter in precise[: len(block.layers)]]
    sizes = [_size(one) for one in precise]
    generator = torch.Generator().manual_seed(0)
    found = None if block.stored is None else block.stored.load()
    if found is not None:
        state.load(*found)
        _write_(fitted, precise)
    else:
        state.start = state.best = _error(block)
    stored = time.monotonic()
    with only_these_require_grad(block.module, fitted):
        for epoch in range(epochs):
            order = [block.fit[place] for place in torch.randperm(len(block.fit), generator=generator, device="cpu").tolist()]
            if epoch < state.epoch:
                continue
            for step, index in enumerate(block.each(order[state.step :], f"fitting {block.name}"), start=state.step):
                for group, size in zip(state.adam.param_groups, sizes, strict=True):
                    group["lr"] = learning_rate * state.scale * size * _rate(step, len(order))
                distance, energy = _distance(block, index)
                if not distance.requires_grad:
                    raise CalibrationError(
                        f"{block.name}: its output has no gradient with respect to the pruned weights, as with "
                        "torch.no_grad() in its forward pass; leave out reconstruction="
                    )
                (distance / energy).backward()
                for number, (parameter, one) in enumerate(zip(fitted, precise, strict=True)):
                    one.grad = None if parameter.grad is None else parameter.grad.float()
                    if one.grad is not None and number < len(kept):
                        one.grad.mul_(kept[number])
                    parameter.grad = None
                state.adam.step()
                _write_(fitted, precise)
                state.step = step + 1
                if block.stored is not None and time.monotonic() - stored >= STORE_EVERY:
                    block.stored.store(*state.as_stored())
                    stored = time.monotonic()
            before, end = state.best, _error(block)
            # NaN does not count as an improvement.
            if end < state.best:
                state.best, state.best_values = end, [parameter.detach().clone() for parameter in fitted]
            if not end < (1 - worthwhile) * before:
                if state.scale < 1 or epoch + 1 == epochs:
                    break
                state.scale = SMALLER
                if not end < before:
                    state.return_to_best()
            state.epoch, state.step = epoch + 1, 0
    _write_(fitted, state.best_values)
    return BlockFit(block.name, state.start, state.best)


@dataclass
class _State:
    """Everything that an interrupted fit continues from."""

    precise: list[Tensor]
    """The parameters in float32."""
    adam: torch.optim.Adam
    best_values: list[Tensor]
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    start: float = math.nan
    best: float = math.nan
    scale: float = 1.0
    """Factor of the step size."""

    def return_to_best(self) -> None:
        """Give up what was fitted since the best pass, and the moments."""
        for one, best in zip(self.precise, self.best_values, strict=True):
            one.copy_(best)
        self.adam = _adam(self.precise)

    @classmethod
    def of(cls, fitted: list[nn.Parameter]) -> _State:
        precise = [parameter.detach().float().clone() for parameter in fitted]
        return cls(precise, _adam(precise), [parameter.detach().clone() for parameter in fitted])

    def as_stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for number, (one, best) in enumerate(zip(self.precise, self.best_values, strict=True)):
            tensors |= {f"{number}/value": one, f"{number}/best": best}
            tensors |= {f"{number}/{name}": value for name, value in self.adam.state[one].items()}
        return tensors, {name: getattr(self, name) for name in STORED_NUMBERS}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        for number, one in enumerate(self.precise):
            own = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{number}/")}
            one.copy_(own.pop("value"))
            self.best_values[number] = own.pop("best").to(one.device)
            self.adam.state[one] = {name: value.to(one.device) for name, value in own.items()}
        for name in STORED_NUMBERS:
            setattr(self, name, numbers[name])


def _adam(parameters: list[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam([{"params": [one]} for one in parameters], betas=(0.9, 0.95), fused=True)


def _parameters(block: FinishedBlock) -> list[nn.Parameter]:
    """Weights of the layers, then their biases."""
    weights = [layer.weight for layer in block.layers]
    biases = [layer.module._parameters.get("bias") for layer in block.layers]
    found = {id(one): one for one in (*weights, *biases) if isinstance(one, nn.Parameter)}
    return list(found.values())


def _size(parameter: Tensor) -> float:
    kept = parameter[parameter != 0]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _write_(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _distance(block: FinishedBlock, index: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Squared distance of the block's output from its target over a batch, and the target's energy, both weighted by token.

    Of logits, the divergence of the probabilities, summed over positions, and the number of positions.
    """
    target = block.target(index)
    keep = fitted(block.keep(index), target.shape[:-1])
    if block.classes:
        output = block.output(index)
        where = None if keep is None else keep.to(target.device)
        count = target[..., 0].numel() if where is None else int(where.sum())
        return logit_divergence(output, target, where=where) * count, torch.tensor(
            float(count), dtype=torch.float32, device=target.device
        )
    target = target.reshape(-1, target.shape[-1]).float()
    output = block.output(index).reshape(target.shape).float()
    weights = token_weights(target[None])
    each = torch.ones(len(target), dtype=target.dtype, device=target.device) if weights is None else weights[0, :, 0]
    if keep is not None:
        each = each * keep.reshape(-1).to(each.device)
    return (each * (output - target).square().sum(1)).sum(), (each * target.square().sum(1)).sum()


def _error(block: FinishedBlock) -> float:
    with torch.no_grad():
        pairs = [_distance(block, index) for index in block.each(block.judge, f"judging {block.name}")]
        total, energy = (float(sum(one.double() for one in column)) for column in zip(*pairs, strict=True))
    if energy <= 0:
        if block.classes:
            raise CalibrationError(f"{block.name}: no position of the held-out batches counts: see their attention_mask")
        return 0.0
    return total / energy if block.classes else (total / energy) ** 0.5


@contextmanager
def only_these_require_grad(module: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """While open, gradients are recorded, of these parameters of a module and of no others; `.grad` is kept aside."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    ids = {id(parameter) for parameter in chosen}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in ids)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
