"""The weight that the forward pass sees: the mask times the dense weight, or its soft threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bisparse.pattern import Pattern, Structure
from bisparse.tiles import Layout, from_matrices, to_matrices

__all__ = [
    "MASK_SUFFIX",
    "LayerState",
    "Masked",
    "SoftThreshold",
    "layer_state",
    "masked_parameters",
    "own_parametrization",
    "sample_of",
    "soft_threshold",
    "trained_parameter",
]


MASK_SUFFIX = "_mask"
"""The buffer of a static layer's mask is named like its parameter, with this added; state_dict leaves it out."""
SAMPLED = 64
"""So many of a weight's entries tell whether it has other values."""


def sample_of(weight: Float[Tensor, "..."]) -> Float[Tensor, " S"]:
    """Some of a weight's entries, by which one that was trained is told: copies, casts and broadcasts leave them alone."""
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)].clone()


class _StraightThrough(torch.autograd.Function):
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


class _StraightThroughThreshold(torch.autograd.Function):
    """Forward: the values given. Backward: their gradient, to all of the weight."""

    @staticmethod
    def forward(weight: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Parametrization(nn.Module):
    """What makes the forward weight of a dense one that is trained (`torch.nn.utils.parametrize`)."""

    mask: Bool[Tensor, "..."]
    pattern: Structure
    start: Float[Tensor, " S"] | None = None
    """`sample_of` the weight when `sparsify_` found the mask; None where the mask needs no optimizer to follow, and once it
    follows one, was found anew, or was loaded."""

    def __init__(self, pattern: Structure, layout: Layout) -> None:
        super().__init__()
        self.pattern, self.layout = pattern, layout
        self.dense = False
        """The schedule is in a dense phase: the mask is all ones."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy, such as an average of the weights, gets its masks from the model that follows the optimizer.
        return self.__dict__ | {"start": None}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.start = None

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Assigning to the weight sets the dense weight."""
        return weight


class Masked(_Parametrization):
    """A parametrization whose weight is zero off the mask; all of it gets the gradient."""

    def __init__(self, mask: Bool[Tensor, "..."], pattern: Structure, layout: Layout) -> None:
        super().__init__(pattern, layout)
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        masked: Tensor = _StraightThrough.apply(weight, self.mask)  # type: ignore[no-untyped-call]
        return masked

    def extra_repr(self) -> str:
        return str(self.pattern)


class SoftThreshold(_Parametrization):
    """S-STE: the weight shrunk towards zero until at most N of every M are left, times a fixed scale.

    In each group, t is the (N + 1)-th largest magnitude; ``weight~ = scale * sign(w) * max(0, |w| - t)``. Continuous in w,
    so that the mask may change at every step without a jump. The gradient passes straight to all of w.
    Source: Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-Training", NeurIPS 2024.
    """

    scale: Float[Tensor, ""]
    pattern: Pattern

    def __init__(self, weight: Float[Tensor, "..."], pattern: Structure, layout: Layout) -> None:
        super().__init__(pattern, layout)
        if not isinstance(pattern, Pattern) or pattern.transposable:
            raise ValueError(f"S-STE's soft threshold is for plain N:M patterns such as '2:4', not '{pattern}'")
        with torch.no_grad():
            thresholded = soft_threshold(weight, pattern, layout)
            self.register_buffer("scale", least_squares_scale(weight, thresholded))
            # What is kept now; for the flip rate only, the forward pass does not read it.
            self.register_buffer("mask", thresholded != 0)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.dense:
            return weight
        with torch.no_grad():
            value = self.scale * soft_threshold(weight, self.pattern, self.layout)
        thresholded: Tensor = _StraightThroughThreshold.apply(weight, value)  # type: ignore[no-untyped-call]
        return thresholded

    def extra_repr(self) -> str:
        return f"{self.pattern}, soft threshold"


def soft_threshold(weight: Float[Tensor, "..."], pattern: Pattern, layout: Layout) -> Float[Tensor, "..."]:
    """``sign(w) * max(0, |w| - t)`` with t the (N + 1)-th largest magnitude of each group of M; t = 0 where N = M.

    >>> soft_threshold(torch.tensor([[4.0, -3.0, 1.0, 0.5]]), Pattern(2, 4), Layout()).tolist()
    [[3.0, -2.0, 0.0, 0.0]]
    """
    if pattern.n == pattern.m:
        return weight.clone()
    matrices = to_matrices(weight, layout)
    columns = matrices.shape[-1]
    groups = torch.nn.functional.pad(matrices, (0, -columns % pattern.m)).unflatten(-1, (-1, pattern.m))
    threshold = groups.abs().topk(pattern.n + 1, dim=-1).values[..., -1:]
    shrunk = torch.sign(groups) * (groups.abs() - threshold).clamp(min=0)
    return from_matrices(shrunk.flatten(-2)[..., :columns], layout, weight.shape)


def least_squares_scale(weight: Float[Tensor, "..."], thresholded: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The factor b that minimises ``||w - b S(w)||``; 1 where S(w) is zero."""
    power = (thresholded * thresholded).sum()
    return torch.where(power > 0, (weight * thresholded).sum() / power.clamp(min=torch.finfo(power.dtype).tiny), 1.0)


def own_parametrization(module: nn.Module, parameter: str) -> Masked | SoftThreshold | None:
    """What makes a dynamic parameter's forward weight; None for any other parameter."""
    chain: Any = module.parametrizations[parameter] if parametrize.is_parametrized(module, parameter) else ()  # type: ignore[index]
    return next((own for own in chain if isinstance(own, Masked | SoftThreshold)), None)


def trained_parameter(module: nn.Module, parameter: str) -> Float[Tensor, "..."]:
    """The parameter that the optimizer holds: the dense weight of a dynamic one."""
    chain: Any = module.parametrizations[parameter] if parametrize.is_parametrized(module, parameter) else None  # type: ignore[index]
    weight = getattr(module, parameter) if chain is None else chain.original
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class LayerState:
    """What sparse training holds for one parameter of a module, now."""

    weight: Float[Tensor, "..."]
    """The parameter that the optimizer holds; a DTensor where the model is sharded."""
    mask: Bool[Tensor, "..."] | None
    """The whole mask; all True in a dense phase, None for a plain layer."""
    pattern: Structure | None
    """Of a dynamic layer. The pattern of a static one is known to its Sparsity alone."""
    phase: Literal["plain", "static", "dynamic", "dense"]
    """No part of sparse training; a mask that stays; a mask that is found again; or the dense phase of a schedule."""
    parametrization: Masked | SoftThreshold | None
    """What computes a dynamic layer's forward weight."""


def layer_state(module: nn.Module, parameter: str = "weight") -> LayerState:
    """Weight, mask, pattern and phase of one parameter of a module, sparsified or not.

    >>> state = layer_state(nn.Linear(4, 4))
    >>> state.phase, state.mask
    ('plain', None)
    """
    own = own_parametrization(module, parameter)
    if own is not None:
        return LayerState(trained_parameter(module, parameter), own.mask, own.pattern, "dense" if own.dense else "dynamic", own)
    weight, mask = getattr(module, parameter), module._buffers.get(f"{parameter}{MASK_SUFFIX}")
    if mask is None or mask.dtype != torch.bool or f"{parameter}{MASK_SUFFIX}" not in module._non_persistent_buffers_set:
        return LayerState(weight, None, None, "plain", None)
    return LayerState(weight, mask, None, "static", None)


def masked_parameters(model: nn.Module) -> list[tuple[str, nn.Module, str, Masked | SoftThreshold]]:
    """(name of the parameter, module, name inside the module, parametrization) of each dynamic weight."""
    found: list[tuple[str, nn.Module, str, Masked | SoftThreshold]] = []
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for parameter in module.parametrizations:
            if (own := own_parametrization(module, parameter)) is not None:
                found.append((f"{prefix}.{parameter}" if prefix else parameter, module, parameter, own))
    return found
