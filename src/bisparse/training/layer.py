"""One sparse layer of a model in training: its dense parameter and its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bisparse.pattern import Pattern, Structure
from bisparse.static_mask import MASK_SUFFIX, StaticMask, static_mask
from bisparse.tiles import Layout
from bisparse.training.bits import keep_only_
from bisparse.training.decay import Decay
from bisparse.training.parametrizations import Masked, SoftThreshold, own_parametrization, trained_parameter

__all__ = [
    "Accelerated",
    "SparseLayer",
    "local",
    "part_of",
]


@runtime_checkable
class Accelerated(Protocol):
    """An accelerated layer, with its own storage of the weight and its own products; see `bisparse.accelerate`."""

    @property
    def derived_tensors(self) -> tuple[Tensor, ...]:
        """Tensors made from the weight or its mask: neither parameters nor buffers, and in no state_dict."""

    def dense_weight(self) -> Tensor:
        """The weight, dense, with zeros."""

    def mask_changed(self, *, proved: bool = False) -> None:
        """Update to the weight's current mask; with `proved` the mask is known to obey the layer's pattern."""

    def restore_(self) -> None:
        """Turn the module back into the original layer."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(mask: Tensor, weight: Tensor) -> Tensor:
    """The part of a full mask for this rank's shard of its weight; the whole mask if the weight is not sharded."""
    if isinstance(weight, DTensor):
        mask = distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
    return mask


@dataclass(frozen=True)
class SparseLayer:
    """A parameter whose forward value obeys a pattern.

    Parameter and mask are looked up in the module at each use, since wrappers such as FSDP replace the objects.
    """

    name: str
    module: nn.Module
    parameter: str
    """The parameter's name inside its module."""
    layout: Layout
    pattern: Structure
    key: str
    """The parameter's key in the plain model's state_dict."""
    decay: Decay | None = None
    """Decay of this layer; None: that of the run."""
    sharing: tuple[nn.Module, ...] = ()
    """Other modules that share the parameter, and therefore the mask."""

    def __repr__(self) -> str:
        return f"SparseLayer({self.name!r}: {type(self.module).__name__}, {self.parameter}, {self.pattern})"

    @property
    def parametrization(self) -> Masked | SoftThreshold | None:
        """The parametrization of a dynamic layer; None for a static one, or once finalized."""
        return own_parametrization(self.module, self.parameter)

    @property
    def active(self) -> bool:
        """Whether the layer still has its mask; False once it is finalized."""
        return isinstance(vars(self.module).get(self.mask_name), StaticMask) or self.parametrization is not None

    @property
    def mask_name(self) -> str:
        """Name of the module's attribute that holds a static layer's mask."""
        return f"{self.parameter}{MASK_SUFFIX}"

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The parameter that the optimizer holds: dense in a dynamic run. A DTensor where the model is sharded."""
        return trained_parameter(self.module, self.parameter)

    @property
    def mask(self) -> Bool[Tensor, "..."]:
        """The whole mask, on every rank; all True in a dense phase."""
        own = self.parametrization
        mask = own.on_device_of(self.weight) if own is not None else static_mask(self.module, self.parameter)
        assert mask is not None
        return mask

    @property
    def local_mask(self) -> Bool[Tensor, "..."]:
        """The part of the mask that belongs to this rank's shard of the weight."""
        return part_of(self.mask, self.weight)

    @torch.no_grad()
    def full_weight(self) -> Float[Tensor, "..."]:
        """The dense weight, gathered from all ranks if it is sharded (a collective call)."""
        weight = self.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set the weight to exactly zero off the mask."""
        keep_only_(local(self.weight.detach()), self.local_mask)

    def follow_nothing(self) -> None:
        """In a copy of a model: stop using the original's mask, and keep an independent one."""
        if (own := self.parametrization) is not None:
            own.origin = own.copied = None

    def mask_changed(self, *, proved: bool = False) -> None:
        """Notify modules that cache something derived from the mask."""
        for module in (self.module, *self.sharing):
            # The name is checked first, since isinstance with a protocol looks up every method, which is slow for small layers.
            if hasattr(module, "mask_changed") and isinstance(module, Accelerated):
                module.mask_changed(proved=proved)

    @property
    def refreshed_tensors(self) -> list[Tensor]:
        """What a mask refresh writes: the mask, and what accelerated modules derive from it."""
        derived = (one.derived_tensors for one in (self.module, *self.sharing) if isinstance(one, Accelerated))
        return [self.mask, *(tensor for tensors in derived for tensor in tensors)]

    def use_mask(self, mask: Bool[Tensor, "..."], *, proved: bool = False) -> None:
        """Use another mask from now on, which ends a dense phase; with `proved` it is known to obey the pattern."""
        self.mask.copy_(mask)
        if (own := self.parametrization) is not None:
            own.state.dense, own.state.warm_up, own.start = False, False, None
        self.mask_changed(proved=proved)

    def resume_phase(self, *, dense: bool, warm_up: bool) -> None:
        """Continue a run in a dense phase, the first of the run if `warm_up`, or with the mask."""
        if (own := self.parametrization) is not None:
            own.state.dense, own.state.warm_up, own.start = dense, dense and warm_up, None
        self.mask_changed()

    @property
    def is_dense(self) -> bool:
        """Whether a dynamic layer is in a dense phase."""
        own = self.parametrization
        return own is not None and own.dense

    def make_dense(self) -> None:
        """Begin a dense phase: the mask is all True. A static layer is unchanged."""
        own = self.parametrization
        if own is not None:
            own.state.dense = True
            own.mask.fill_(True)
            self.mask_changed()

    def decay_or(self, given: Decay | None) -> Decay | None:
        """The decay of this layer; `given`, that of the run, if it has none of its own."""
        return given if self.decay is None else self.decay

    @property
    def transposable(self) -> bool:
        """Whether the pattern holds along columns too."""
        return isinstance(self.pattern, Pattern) and self.pattern.transposable
