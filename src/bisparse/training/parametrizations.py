"""Computes the weight of the forward pass from the dense one: the mask times the weight, or its soft threshold.

Masks are in the state_dict, but they are not buffers, because weight averaging (torch's AveragedModel, Lightning's and timm's
moving averages) also averages buffers, and an average of masks is not a mask. A copy of a model, such as a snapshot, keeps its
masks as long as its weights do not change. Once they change, as in each update of an average, it uses the current masks and
phase of the model that it was copied from. A copy that is to be trained needs its own `Sparsity`, attached to its optimizer.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from bisparse._solve import solve
from bisparse.pattern import Pattern, Structure
from bisparse.static_mask import static_mask, static_masks
from bisparse.tiles import Layout, from_matrices, to_matrices
from bisparse.training.bits import kept_straight_through
from bisparse.verification import verify
from bisparse.wrappers import is_wrapper

__all__ = [
    "LayerState",
    "MaskState",
    "Masked",
    "SoftThreshold",
    "layer_state",
    "mask_refusal",
    "masked_parameters",
    "own_parametrization",
    "sample_of",
    "sample_step",
    "soft_threshold",
    "trained_parameter",
]


SAMPLED = 64
"""Number of entries per weight that are compared to detect changed values."""


def sample_of(weight: Float[Tensor, "..."]) -> Float[Tensor, " S"]:
    """A sample of a weight's entries, to detect training; copies, casts and broadcasts do not change it."""
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    flat = own.detach().flatten()
    return flat[:: sample_step(flat.numel())].clone()


def sample_step(count: int) -> int:
    """The distance between `SAMPLED` of `count` entries, without a common factor, so that they are not all in one column."""
    step = max(1, count // SAMPLED)
    while math.gcd(step, count) > 1:
        step += 1
    return step


class _StraightThroughThreshold(torch.autograd.Function):
    """Forward: the given values. Backward: their gradient, for the whole weight."""

    @staticmethod
    def forward(weight: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass
class MaskState:
    """The mask and phase of a dynamic weight. Copies of the model refer to the state of the original."""

    mask: Tensor
    dense: bool = False
    """Whether the schedule is in a dense phase, in which the mask is all True."""
    warm_up: bool = False
    """Whether that is the initial dense phase of the run."""


class _Parametrization(nn.Module):
    """Base of the parametrizations that compute the forward weight from the trained dense one (`torch.nn.utils.parametrize`)."""

    pattern: Structure
    start: Float[Tensor, " S"] | None = None
    """`sample_of` the weight when `sparsify_` found the mask; None if the mask needs no optimizer, and once it was refreshed,
    loaded, or an optimizer has taken a step."""
    owner: tuple[nn.Module, str] | None = None
    """The module, in a tuple so that it is not a submodule, and the name of its parameter."""
    origin: MaskState | None = None
    """In a copy: the state of the original."""
    has_dense_phase: bool = False
    """Whether the run's schedule has a dense phase, so that an all-True mask is possible."""
    copied: Float[Tensor, " S"] | None = None
    """In a copy: `sample_of` the weight for which the mask was found."""

    def __init__(self, mask: Bool[Tensor, "..."], pattern: Structure, layout: Layout) -> None:
        super().__init__()
        self.state = MaskState(mask)
        self.pattern, self.layout = pattern, layout

    @property
    def mask(self) -> Bool[Tensor, "..."]:
        """The mask, True where the weight is kept; all True in a dense phase."""
        return self.state.mask

    @property
    def dense(self) -> bool:
        """Whether the schedule is in a dense phase."""
        return self.state.dense

    def follow(self) -> None:
        """In a copy whose weights have changed: use the original's current mask."""
        if self.origin is None or self.owner is None:
            return
        module, parameter = self.owner
        sample = sample_of(trained_parameter(module, parameter))
        if sample.is_meta:
            return
        if self.copied is not None and torch.equal(self.copied.to(sample), sample):
            return
        origin = self.origin
        self.copied = sample
        self.state.dense, self.state.warm_up = origin.dense, origin.warm_up
        self.state.mask.copy_(origin.mask)
        if hasattr(module, "mask_changed"):  # it caches something derived from the mask
            changed: Any = module
            changed.mask_changed()

    @torch.no_grad()
    def mask_refusal(self, mask: Tensor) -> str | None:
        """Why a given mask of the right shape cannot be this weight's; None if it can, or if it is an average of masks."""
        if mask.is_meta or mask.is_complex():
            return "the mask is complex" if mask.is_complex() else None
        if not bool(((mask == 0) | (mask == 1)).all()):
            if mask.is_floating_point() and bool(((mask >= 0) & (mask <= 1)).all()):
                return None
            return f"its mask of dtype {mask.dtype} has values other than 0 and 1"
        kept = mask != 0
        if bool(kept.all()) and (self.dense or self.has_dense_phase):
            return None
        return mask_refusal(kept, self.pattern, self.layout)

    def on_device_of(self, weight: Tensor) -> Bool[Tensor, "..."]:
        """The mask, moved to the weight's device if the weight was not moved by the module, such as by FSDP2."""
        if self.state.mask.device != weight.device:
            self.state.mask = self.state.mask.to(weight.device)
        return self.state.mask

    def __deepcopy__(self, memo: dict[int, Any]) -> _Parametrization:
        twin: _Parametrization = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy({name: value for name, value in self.__dict__.items() if name != "origin"}, memo))
        twin.start = None
        if self.owner is not None:
            twin.origin = self.origin or self.state
            if self.copied is None or self.origin is None:
                twin.copied = sample_of(trained_parameter(*self.owner))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"start": None, "origin": None, "copied": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.state.mask = fn(self.state.mask)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}mask"] = (
            self.state.mask.clone()
        )  # a clone, since some averages write into the tensors of a state_dict

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        others: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs)
        key = f"{prefix}mask"
        unexpected_keys += [name for name in others if name != key]
        mask = state_dict.get(key)
        if mask is None:
            if strict:
                missing_keys.append(key)
            return
        if mask.shape != self.mask.shape:
            error_msgs.append(f"{key}: shape {tuple(mask.shape)} in the checkpoint, {tuple(self.mask.shape)} in the model")
            return
        if (reason := self.mask_refusal(mask)) is not None:
            error_msgs.append(f"{key}: {reason}")
            return
        with torch.no_grad():
            weight = (
                trained_parameter(*self.owner) if self.owner is not None else None
            )  # already loaded, before its parametrizations
            if not bool(((mask == 0) | (mask == 1)).all()) and weight is not None and not isinstance(weight, DTensor):
                # An average of masks is not a mask: use the best mask for the average of the weights.
                mask = solve(weight.detach().abs(), self.pattern, layout=self.layout).mask
            if self.mask.is_meta:
                self.state.mask = mask.to(torch.bool).clone()
            else:
                self.mask.copy_(mask)
            self.start = None
            if self.origin is not None and weight is not None:
                self.copied = sample_of(weight)

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Assigning to the weight sets the dense weight."""
        return weight


@torch.compiler.disable
def _follow(own: _Parametrization) -> None:
    with torch.no_grad():
        own.follow()


class Masked(_Parametrization):
    """A parametrization that zeroes the weight off the mask; the whole dense weight gets the gradient."""

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.origin is not None:
            _follow(self)
        return kept_straight_through(weight, self.on_device_of(weight))

    def extra_repr(self) -> str:
        return str(self.pattern)


class SoftThreshold(_Parametrization):
    """S-STE: shrinks the weight towards zero until at most N of every M are non-zero, and multiplies by a fixed scale.

    In each group, t is the (N + 1)-th largest magnitude; ``weight~ = scale * sign(w) * max(0, |w| - t)``. Continuous in w,
    so the mask can change in every step without a jump. The gradient is passed unchanged to the whole w.
    Source: Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-Training", NeurIPS 2024.
    """

    scale: Float[Tensor, ""]
    pattern: Pattern

    def __init__(self, weight: Float[Tensor, "..."], pattern: Structure, layout: Layout) -> None:
        if not isinstance(pattern, Pattern) or pattern.transposable:
            raise ValueError(f"S-STE's soft threshold is for plain N:M patterns such as '2:4', not '{pattern}'")
        with torch.no_grad():
            thresholded = soft_threshold(weight, pattern, layout)
            # The mask of the currently non-zero weights is only for the flip rate; the forward pass does not read it.
            super().__init__(thresholded != 0, pattern, layout)
            self.register_buffer("scale", least_squares_scale(weight, thresholded))

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.origin is not None:
            _follow(self)
        if self.dense:
            return weight
        with torch.no_grad():
            value = self.scale * soft_threshold(weight, self.pattern, self.layout)
        thresholded: Tensor = _StraightThroughThreshold.apply(weight, value)  # type: ignore[no-untyped-call]
        return thresholded

    def extra_repr(self) -> str:
        return f"{self.pattern}, soft threshold"


def mask_refusal(mask: Bool[Tensor, "..."], pattern: Structure, layout: Layout) -> str | None:
    """Why a layer cannot be trained with a bool mask (it breaks the pattern, or keeps nothing); None if it can."""
    if not bool(mask.any()):
        return f"its mask at {pattern} keeps nothing, so no weight of the layer could be trained"
    found = verify(mask, pattern, layout=layout)
    return None if found else f"its mask does not obey {pattern}: {found.message}"


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
    """The factor b that minimises ``||w - b S(w)||``; 1 if S(w) is zero."""
    wide = torch.promote_types(weight.dtype, torch.float32)  # squares of float16 weights overflow, or become zero
    full, own = weight.to(wide), thresholded.to(wide)
    power = (own * own).sum()
    return torch.where(power > 0, (full * own).sum() / power.clamp(min=torch.finfo(wide).tiny), 1.0).to(weight.dtype)


def own_parametrization(module: nn.Module, parameter: str) -> Masked | SoftThreshold | None:
    """The parametrization of a dynamic parameter; None for any other parameter."""
    chain = _chain(module, parameter)
    return None if chain is None else next((own for own in chain if isinstance(own, Masked | SoftThreshold)), None)


def _chain(module: nn.Module, parameter: str) -> Any:
    """The parametrizations of a parameter, or None; read from the dictionaries for speed, since this runs often."""
    held = module._modules.get("parametrizations")
    return None if held is None else held._modules.get(parameter)


def trained_parameter(module: nn.Module, parameter: str) -> Float[Tensor, "..."]:
    """The parameter that the optimizer has: for a dynamic one, its dense weight."""
    chain = _chain(module, parameter)
    # By the dictionary where it is there, which is faster; FSDP1 takes parameters out of it.
    weight = getattr(module, parameter) if chain is None else chain._parameters.get("original", None)
    if weight is None:
        weight = chain.original
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class LayerState:
    """The current state of one parameter of a module in sparse training."""

    weight: Float[Tensor, "..."]
    """The parameter that the optimizer has; a DTensor if the model is sharded."""
    mask: Bool[Tensor, "..."] | None
    """The whole mask; all True in a dense phase, None for a plain layer."""
    pattern: Structure | None
    """The pattern of the mask; None for a plain layer."""
    phase: Literal["plain", "static", "dynamic", "dense"]
    """Not in sparse training; with a fixed mask; with a mask that is refreshed; or in a dense phase of the schedule."""
    parametrization: Masked | SoftThreshold | None
    """The parametrization of a dynamic layer."""


def layer_state(module: nn.Module, parameter: str = "weight") -> LayerState:
    """Weight, mask, pattern and phase of one parameter of a module, sparsified or not.

    >>> state = layer_state(nn.Linear(4, 4))
    >>> state.phase, state.mask
    ('plain', None)
    """
    own = own_parametrization(module, parameter)
    if own is not None:
        return LayerState(trained_parameter(module, parameter), own.mask, own.pattern, "dense" if own.dense else "dynamic", own)
    weight, mask = getattr(module, parameter), static_mask(module, parameter)
    pattern = next((held.pattern for name, held in static_masks(module) if name == parameter), None)
    return LayerState(weight, mask, pattern, "plain" if mask is None else "static", None)


def masked_parameters(model: nn.Module, *, each_name: bool = False) -> list[tuple[str, nn.Module, str, Masked | SoftThreshold]]:
    """(name of the parameter, module, name inside the module, parametrization) for each dynamic weight.

    With `each_name` a module that the model has under several names is listed under each of them, as in its state_dict.
    """
    found: list[tuple[str, nn.Module, str, Masked | SoftThreshold]] = []
    for prefix, module in model.named_modules(remove_duplicate=not each_name):
        if is_wrapper(module) or not parametrize.is_parametrized(module):
            continue
        for parameter in module.parametrizations:
            if (own := own_parametrization(module, parameter)) is not None:
                found.append((f"{prefix}.{parameter}" if prefix else parameter, module, parameter, own))
    return found
