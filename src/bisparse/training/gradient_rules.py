"""Updates of the weights off the mask, masked decay and SR-STE, for any torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bisparse.training.bits import add_off_each_, keep_only_each_, off
from bisparse.training.layer import SparseLayer, local, part_of
from bisparse.training.optimizer import Held, learning_rate

__all__ = ["MaskedGradients", "after_closure", "decay_pruned"]


class MaskedGradients:
    """Masks the gradients of static layers when they are accumulated, and again before the step if they have changed since."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def mask(self, pairs: Iterable[tuple[SparseLayer, Tensor]]) -> None:
        """Set gradients to zero off the mask, except those that nothing has changed since that was done.

        Args:
            pairs: layers and their weights.
        """
        changed: list[tuple[SparseLayer, Tensor, Tensor]] = []
        for layer, weight in pairs:
            if weight.grad is None:
                continue
            gradient = _writable(weight)
            seen, version = self._seen.get(layer.name, (None, -1))
            if (seen is None or seen() is not gradient or gradient._version != version) and layer.active:
                changed.append((layer, weight, gradient))
        keep_only_each_((local(gradient.detach()), part_of(layer.mask, weight)) for layer, weight, gradient in changed)
        for layer, _, gradient in changed:
            self._seen[layer.name] = weakref.ref(gradient), gradient._version


def _writable(weight: Tensor) -> Tensor:
    """A weight's gradient; one whose elements share memory, such as by `expand`, is first replaced by a copy."""
    gradient = weight.grad
    assert gradient is not None
    strides = gradient.stride() if gradient.layout is torch.strided else ()
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, gradient.shape, strict=True)):
        weight.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
    return gradient


def decay_pruned(method: str, rates: Mapping[str, float], held: Iterable[Held], optimizer: Optimizer) -> None:
    """Add masked decay to the gradients, or take SR-STE's step on the weights.

    Args:
        method: "masked-decay" or "sr-ste".
        rates: lambda by layer name; layers without one do not decay.
        held: layers whose weights have gradients.
    """
    scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves, after this
    rows: list[tuple[Tensor, Tensor, Tensor, float]] = []
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
                rows.append((dense, dense, mask, -rate * own))
        else:
            sign = -1.0 if group.get("maximize") else 1.0  # such an optimizer negates the gradient
            rows.append((local(_writable(weight)), dense, mask, sign * own * (float(scale) if scale is not None else 1.0)))
    add_off_each_(rows)


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
