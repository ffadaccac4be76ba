"""Masking by bits: the values of a tensor where a mask is True (or False), and exactly zero elsewhere, whatever was there.

ANDing the bits with all ones or all zeros takes a fifth of the time of `torch.where` on a CPU, which is not vectorised there
(1.6 and 7.6 ms for 2^20 float32 numbers and a random mask). A product would keep NaN, and the sign of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

__all__ = ["BITS", "kept", "kept_straight_through", "off"]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the same size as a number of so many bytes."""


def kept(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A new tensor: the values where the mask is True, exactly zero elsewhere.

    >>> kept(torch.tensor([-1.0, torch.nan, 2.0]), torch.tensor([True, False, True]))
    tensor([-1.,  0.,  2.])
    """
    bits = BITS[tensor.element_size()]
    return mask.to(bits).neg_().bitwise_and_(tensor.view(bits)).view(tensor.dtype)


def off(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A new tensor: the values where the mask is False, exactly zero elsewhere.

    >>> off(torch.tensor([-1.0, 3.0, torch.inf]), torch.tensor([True, False, True]))
    tensor([0., 3., 0.])
    """
    bits = BITS[tensor.element_size()]
    return mask.to(bits).sub_(1).bitwise_and_(tensor.view(bits)).view(tensor.dtype)


class _Transformable(torch.autograd.Function):
    """Forward: mask * weight. Backward: the gradient of the masked weight, to all of the weight (the STE)."""

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
    """The same for plain tensors in eager mode: torch inspects a signature at each call of one with `setup_context`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        masked: Tensor = kept(weight, mask)
        return masked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def kept_straight_through(weight: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The weight where the mask is True, zero elsewhere; all of the weight gets the gradient (the STE, Bengio et al. 2013)."""
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    eager = plain and not traced and not torch._C._are_functorch_transforms_active()
    function: Any = _Eager if eager else _Transformable
    result: Tensor = function.apply(weight, mask)
    return result
