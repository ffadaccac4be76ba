"""Masks a tensor by its bits: its values where the mask is True (or False), and exactly zero elsewhere, even for NaN.

ANDing the bits with all ones or all zeros takes a fifth of the time of `torch.where`, which is not vectorised on a CPU
(1.6 and 7.6 ms for 2^20 float32 numbers and a random mask), and a compiled kernel does it in one pass where it applies. A
product would keep NaN and the sign of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from bisparse.kernels.masking.dispatch import MIN_WEIGHTS, add_masked_each, applies, fits, keep_only_each, masked

__all__ = ["BITS", "add_off_each_", "keep_only_", "keep_only_each_", "kept", "kept_straight_through", "off"]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by size in bytes."""


def kept(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A new tensor: the values where the mask is True, exactly zero elsewhere.

    >>> kept(torch.tensor([-1.0, torch.nan, 2.0]), torch.tensor([True, False, True]))
    tensor([-1.,  0.,  2.])
    """
    if applies(tensor, mask):
        masked(out := torch.empty_like(tensor, requires_grad=False), tensor, mask, kept=True)
        return out
    bits = BITS[tensor.element_size()]
    return mask.to(bits).neg_().bitwise_and_(tensor.view(bits)).view(tensor.dtype)


def off(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A new tensor: the values where the mask is False, exactly zero elsewhere.

    >>> off(torch.tensor([-1.0, 3.0, torch.inf]), torch.tensor([True, False, True]))
    tensor([0., 3., 0.])
    """
    if applies(tensor, mask):
        masked(out := torch.empty_like(tensor, requires_grad=False), tensor, mask, kept=False)
        return out
    bits = BITS[tensor.element_size()]
    return mask.to(bits).sub_(1).bitwise_and_(tensor.view(bits)).view(tensor.dtype)


def keep_only_(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> None:
    """Set a tensor to exactly zero off the mask, even if it has NaN there.

    >>> weight = torch.tensor([-1.0, torch.nan, 2.0])
    >>> keep_only_(weight, torch.tensor([True, False, False]))
    >>> weight
    tensor([-1.,  0.,  0.])
    """
    keep_only_each_([(tensor, mask)])


def keep_only_each_(pairs: Iterable[tuple[Shaped[Tensor, "..."], Bool[Tensor, "..."]]]) -> None:
    """`keep_only_` for many tensors: one call of the compiled kernel for those that it takes; each call has a cost."""
    by_size: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for tensor, mask in pairs:
        by_size.setdefault(tensor.element_size() if fits(tensor, mask) else 0, []).append((tensor, mask))
    for size, some in by_size.items():
        if size and sum(tensor.numel() for tensor, _ in some) >= MIN_WEIGHTS:
            keep_only_each(some)
            increment_version([tensor for tensor, _ in some])  # autograd must notice that they were written to
            continue
        for tensor, mask in some:
            bits = BITS[tensor.element_size()]
            tensor.view(bits).bitwise_and_(mask.to(bits).neg_())


def add_off_each_(rows: Iterable[tuple[Float[Tensor, "..."], Float[Tensor, "..."], Bool[Tensor, "..."], float]]) -> None:
    """Add a factor times the values where the mask is False.

    Args:
        rows: target, values, mask and factor of each. The target is the tensor of the values itself, or shares no memory with it.

    >>> gradient = torch.zeros(3)
    >>> add_off_each_([(gradient, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]), 0.5)])
    >>> gradient
    tensor([0., 1., 0.])
    """
    compiled: dict[bool, list[tuple[Tensor, Tensor, Tensor, float]]] = {False: [], True: []}
    for target, values, mask, factor in rows:
        in_place = target is values
        float32 = values.dtype is target.dtype is torch.float32
        if float32 and fits(values, mask) and (in_place or fits(target, mask)):
            compiled[in_place].append((target, values, mask, factor))
        else:
            target.add_(off(values, mask), alpha=factor)
    for in_place, some in compiled.items():
        if sum(values.numel() for _, values, _, _ in some) >= MIN_WEIGHTS:
            add_masked_each(some, in_place=in_place)
            increment_version([target for target, _, _, _ in some])
            continue
        for target, values, mask, factor in some:
            target.add_(off(values, mask), alpha=factor)


class _Transformable(torch.autograd.Function):
    """Forward: mask * weight. Backward: the gradient of the masked weight, for the whole weight (the STE)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Eager(torch.autograd.Function):
    """The same for plain tensors in eager mode, without `setup_context`, for which torch inspects a signature in each call."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        masked: Tensor = kept(weight, mask)
        return masked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def kept_straight_through(weight: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The weight where the mask is True, zero elsewhere; the whole weight gets the gradient (the STE, Bengio et al. 2013)."""
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    eager = plain and not traced and not torch._C._are_functorch_transforms_active()
    function: Any = _Eager if eager else _Transformable
    result: Tensor = function.apply(weight, mask)
    return result
