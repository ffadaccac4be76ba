"""Block reconstruction: fits the kept weights of a whole block together to the dense block's output.

After the layers of a block have been pruned one by one, with x the block's inputs in the pruned network and z in the dense one::

    min over W' of sum over tokens of weight * |dense block(z) - block(x; S * W')|^2       S the masks, fixed

Unlike a fit per layer, this takes the softmax of attention and the gate of an MLP into account, and lets one layer compensate
for another. It uses Adam, since a block is not linear, with steps relative to the size of each parameter.
Guarantee: masks do not change, and the error on held-out batches (every fifth) does not grow; otherwise the block is left
unchanged. Deterministic.
Cost: about three forward passes of the block per epoch, and float32 copies and moments of one block's parameters.
Source: the objective is that of BRECQ (Li et al., ICLR 2021, arXiv 2102.05426), for pruned models EBFT (Guo et al., 2024, arXiv
2402.12419). Departures: held-out data decides; tokens of very high energy count less, as in all statistics here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bisparse.arguments import check_count, check_number
from bisparse.pruning.calibration.finished_block import BlockFit, FinishedBlock
from bisparse.pruning.calibration.moments import token_weights

__all__ = ["BlockReconstruction"]

WARM_UP = 0.05
"""Fraction of an epoch's steps in which the step size rises; after that it falls along a cosine."""


@dataclass(frozen=True)
class BlockReconstruction:
    """Options of block reconstruction, for ``prune_(..., reconstruction=...)``.

    Args:
        epochs: maximum number of passes over the calibration batches.
        learning_rate: initial step of Adam, as a fraction of the root mean square of a parameter's kept weights.
        worthwhile: another epoch follows only if the last one reduced the held-out error by at least this fraction. The first
            blocks improve for many epochs, and all later blocks inherit their error; later blocks soon stop improving.
    """

    epochs: int = 8
    learning_rate: float = 0.02
    worthwhile: float = 0.03

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("worthwhile", self.worthwhile, least=0)

    def fit_(self, block: FinishedBlock) -> BlockFit:
        """Fit the kept weights, and biases, of the block's pruned layers, in place."""
        fitted = _parameters(block)
        # In float32, since steps are below the resolution of bfloat16.
        precise = [parameter.detach().float().clone() for parameter in fitted]
        kept = [parameter != 0 for parameter in precise[: len(block.layers)]]
        adam = torch.optim.Adam([{"params": [one]} for one in precise], betas=(0.9, 0.95), fused=True)
        sizes = [_size(one) for one in precise]
        generator = torch.Generator().manual_seed(0)
        start = _error(block)
        best, best_values = start, [parameter.detach().clone() for parameter in fitted]
        with _only_these_require_grad(block.module, fitted):
            for _ in range(self.epochs):
                for step, position in enumerate(torch.randperm(len(block.fit), generator=generator, device="cpu").tolist()):
                    for group, size in zip(adam.param_groups, sizes, strict=True):
                        group["lr"] = self.learning_rate * size * _rate(step, len(block.fit))
                    distance, energy = _distance(block, block.fit[position])
                    (distance / energy).backward()
                    for number, (parameter, one) in enumerate(zip(fitted, precise, strict=True)):
                        assert parameter.grad is not None
                        one.grad = parameter.grad.float()
                        if number < len(kept):
                            one.grad.mul_(kept[number])
                        parameter.grad = None
                    adam.step()
                    _write_(fitted, precise)
                before, end = best, _error(block)
                # NaN does not count as an improvement.
                if end < best:
                    best, best_values = end, [parameter.detach().clone() for parameter in fitted]
                if not end < (1 - self.worthwhile) * before:
                    break
        _write_(fitted, best_values)
        return BlockFit(block.name, start, best)


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
    """Squared distance of the block's output from its target over a batch, and the target's energy, both weighted by token."""
    target = block.target(index)
    target = target.reshape(-1, target.shape[-1]).float()
    output = block.output(index).reshape(target.shape).float()
    weights = token_weights(target[None])
    each = torch.ones(len(target), device=target.device) if weights is None else weights[0, :, 0]
    if (keep := block.keep(index)) is not None and keep.numel() == len(each):
        each = each * keep.reshape(-1).to(each.device)
    return (each * (output - target).square().sum(1)).sum(), (each * target.square().sum(1)).sum()


def _error(block: FinishedBlock) -> float:
    with torch.no_grad():
        pairs = [_distance(block, index) for index in block.judge]
        total, energy = (float(sum(one.double() for one in column)) for column in zip(*pairs, strict=True))
    return (total / energy) ** 0.5 if energy > 0 else 0.0


@contextmanager
def _only_these_require_grad(module: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
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
