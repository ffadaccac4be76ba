"""Updates of the weights off the mask, masked decay and SR-STE, for any torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bisparse.training.bits import add_off_, keep_only_, off
from bisparse.training.layer import SparseLayer, local, part_of
from bisparse.training.optimizer import Held, learning_rate

__all__ = ["MaskedGradients", "after_closure", "decay_pruned"]


class MaskedGradients:
    """Masks the gradients of static layers when they are accumulated, and again before the step if they have changed since."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def mask(self, layer: SparseLayer, weight: Tensor) -> None:
        """Set the gradient of a layer's weight to zero off the mask, unless nothing has changed it since that was done."""
        gradient = weight.grad
        if gradient is None:
            return
        seen, version = self._seen.get(layer.name, (None, -1))
        if seen is not None and seen() is gradient and gradient._version == version:
            return
        if layer.active:
            keep_only_(local(gradient.detach()), part_of(layer.mask, weight))
            self._seen[layer.name] = weakref.ref(gradient), gradient._version


def decay_pruned(method: str, rates: Mapping[str, float], held: Iterable[Held], optimizer: Optimizer) -> None:
    """Add masked decay to the gradients, or take SR-STE's step on the weights.

    Args:
        method: "masked-decay" or "sr-ste".
        rates: lambda by layer name; layers without one do not decay.
        held: layers whose weights have gradients.
    """
    scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves, after this
    for layer, weight, group in held:
        own = rates.get(layer.name, 0.0)
        if own == 0.0:
            continue
        dense, mask = local(weight.detach()), part_of(layer.mask, weight)
        if method == "sr-ste":
            rate = learning_rate(group)
            if isinstance(rate, Tensor):  # reading its value would synchronise with the device
                dense.sub_(off(dense, mask) * (rate.to(dense.device, dense.dtype) * own))
            else:
                add_off_(dense, dense, mask, alpha=-rate * own)
        else:
            assert weight.grad is not None
            sign = -1.0 if group.get("maximize") else 1.0  # such an optimizer negates the gradient
            add_off_(local(weight.grad), dense, mask, alpha=sign * own * (float(scale) if scale is not None else 1.0))


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[bool], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of `optimizer.step` with a closure that calls `then(first)` after each evaluation; None without a closure.

    Args:
        args: the arguments of a step hook, the optimizer first.
    """
    given = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(given):
        return None
    closure: Callable[[], Any] = given
    first = True

    def wrapped() -> Any:
        nonlocal first
        loss = closure()
        with torch.no_grad():
            then(first)
        first = False
        return loss

    if "closure" in kwargs:
        return args, kwargs | {"closure": wrapped}
    return (args[0], wrapped, *args[2:]), kwargs
