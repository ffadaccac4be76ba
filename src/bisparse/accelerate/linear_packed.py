"""Layers with a permanently packed weight: less memory, and products on sparse tensor cores or by CPU kernels.

Installed in place by changing a module's class, so hooks, names and references to the module do not change. The `state_dict`
has a plain dense weight, and `restore_` turns the module back into the original one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import linear

from bisparse.accelerate.backends import BACKENDS, BackendError, backend_or_reference
from bisparse.accelerate.backends.cpu import CPU, BitmaskWeight, rounding_error
from bisparse.accelerate.eligibility import Plan
from bisparse.accelerate.operators import (
    autocast_dtype,
    checked_input,
    in_forward_mode,
    packed_linear_2to4,
    refuse_onnx,
)
from bisparse.verification import PatternError, verify

__all__ = ["PackedLayer", "PackedLinear", "PackedWeight"]


@dataclass(frozen=True)
class PackedWeight:
    """A constant 2:4 weight as a backend stores it, with W^T if gradients of the input are sparse products too."""

    shape: tuple[int, int]
    """(out_features, in_features)."""
    backend: str
    wanted_backend: str
    """The backend to use whenever the layer is on a device where it runs."""
    search: bool
    """Whether the backend searches for its fastest algorithm, once per shape."""
    trainable: bool
    """Whether the dense weight required a gradient."""
    packed: Shaped[Tensor, "..."]
    metadata: Shaped[Tensor, "..."]
    packed_t: Shaped[Tensor, "..."] | None = None
    metadata_t: Shaped[Tensor, "..."] | None = None

    @classmethod
    @torch.inference_mode(False)  # its tensors outlive the mode of the caller
    @torch.no_grad()
    def from_dense(
        cls, weight: Float[Tensor, "O I"], backend: str, *, transposed: bool, search: bool = True, name: str = ""
    ) -> PackedWeight:
        """Pack a weight, with `transposed` also W^T. The packed weight is unpacked once and compared.

        Raises:
            PatternError: the weight, or with `transposed` its transpose, is not 2:4.
            BackendError: unpacking does not return the same weight.
        """
        trainable, weight = weight.requires_grad, weight.detach()
        verify(weight, "2:4-T" if transposed else "2:4", name=name).check()
        own, tensors = BACKENDS[backend], []
        for matrix in (weight, weight.t()) if transposed else (weight,):
            matrix = matrix.contiguous()
            packed, metadata = own.pack(matrix)
            if not torch.equal(own.unpack(packed, metadata, *matrix.shape), matrix):
                raise BackendError(
                    f"{name or 'a weight'} of shape {tuple(matrix.shape)} and {matrix.dtype}: unpacking what {backend} packed "
                    "does not return the same values (NaN among the weights, or a fault of the library); it is not packed"
                )
            tensors += [packed, metadata]
        return cls((weight.shape[0], weight.shape[1]), backend, backend, search, trainable, *tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        dtype: torch.dtype = self.packed.dtype
        return dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors; the first one has the weight's dtype."""
        return tuple(one for one in (self.packed, self.metadata, self.packed_t, self.metadata_t) if one is not None)

    @property
    def description(self) -> str:
        """How the weight is stored, for `repr`."""
        return f"packed 2:4 by {self.backend}{'' if self.packed_t is None else ', both ways'}"

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "O I"]:
        """The dense weight. Its zeros are all 0.0, since packed storage does not keep the sign of zeros."""
        return BACKENDS[self.backend].unpack(self.packed, self.metadata, *self.shape)

    @torch.inference_mode(False)
    def parameter(self) -> nn.Parameter:
        """The dense weight as a parameter."""
        return nn.Parameter(self.dense(), self.trainable)

    def linear(self, input: Float[Tensor, "*T I"], bias: Float[Tensor, " O"] | None) -> Float[Tensor, "*T O"]:
        """``x W^T + b``, in the weight's dtype."""
        transposed = None if self.packed_t is None or self.metadata_t is None else (self.packed_t, self.metadata_t)
        return packed_linear_2to4(
            input, self.packed, self.metadata, transposed, bias, self.shape[0], self.backend, search=self.search
        )

    def repacked(self, weight: Float[Tensor, "O I"], name: str = "") -> PackedWeight:
        """A different dense weight packed the same way: by the wanted backend where it runs, otherwise by the reference."""
        backend = backend_or_reference(self.wanted_backend, weight.device, weight.dtype)
        found = self.from_dense(weight, backend, transposed=self.packed_t is not None, search=self.search, name=name)
        return replace(found, wanted_backend=self.wanted_backend, trainable=self.trainable)

    @torch.inference_mode(False)
    @torch.no_grad()
    def mapped(self, fn: Callable[[Tensor], Tensor]) -> PackedWeight:
        """A copy with a function applied to all tensors, which keep their dtypes."""

        def apply(tensor: Tensor) -> Tensor:
            return fn(tensor).to(tensor.dtype)

        packed_t, metadata_t = (None if one is None else apply(one) for one in (self.packed_t, self.metadata_t))
        return replace(self, packed=apply(self.packed), metadata=apply(self.metadata), packed_t=packed_t, metadata_t=metadata_t)


class PackedLayer(nn.Module):
    """Base of layers with a constant weight, stored as its kept values and their positions.

    `weight` is the dense weight, unpacked at each access; so is the entry of `state_dict`, which loads into a plain layer.
    Loading takes a plain layer's entry, which must be 2:4 for a 2:4 library. Packed tensors are not buffers, since they are
    specific to a device and a library, and tools that average or copy buffers between models would corrupt them.
    """

    plain: type[nn.Module]
    """The class of the original module."""
    packed_weight: PackedWeight | BitmaskWeight

    @classmethod
    def install_(cls, module: nn.Module, plan: Plan, *, search: bool = True, name: str = "") -> str:
        """Turn a module into this class, with its weight packed and the dense parameter dropped. Returns a note, often empty.

        Raises:
            PatternError, BackendError: as for `from_dense` of the packed weight; the module is unchanged.
        """
        packed: PackedWeight | BitmaskWeight
        note, weight = "", module.weight.flatten(1)  # type: ignore[operator]
        if plan.backend == CPU:
            packed = BitmaskWeight.from_dense(weight, max_tokens=plan.max_tokens, int8=plan.int8, name=name)
            if plan.int8:
                note = f"in int8, relative error {rounding_error(weight, packed):.2%}"
        else:
            packed = PackedWeight.from_dense(weight, plan.backend, transposed=plan.both_ways, search=search, name=name)
        del module._parameters["weight"]
        module.__class__ = cls
        assert isinstance(module, cls)
        module.packed_weight = packed
        return note

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return self.packed_weight.shape

    @property
    def weight(self) -> Float[Tensor, "O I *K"]:
        """The dense weight, unpacked at each access."""
        return self.dense_weight()

    @property
    def derived_tensors(self) -> tuple[Tensor, ...]:
        """The packed tensors."""
        return self.packed_weight.tensors

    def dense_weight(self) -> Float[Tensor, "O I *K"]:
        """The dense weight, with zeros."""
        return self.packed_weight.dense().view(self.weight_shape)

    @torch.inference_mode(False)
    def parameter(self) -> nn.Parameter:
        """The dense weight as a parameter."""
        own = self.packed_weight.parameter()
        return nn.Parameter(own.detach().view(self.weight_shape), own.requires_grad)

    def multiplied(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """``x W^T + b``, in the input's dtype, or autocast's."""
        own = self.packed_weight
        if in_forward_mode():
            return linear(input, own.dense(), self._parameters["bias"])
        if isinstance(own, BitmaskWeight):
            output = own.product.directly(input, self._parameters["bias"])
            if output is not None:
                return output
        refuse_onnx()
        wanted = autocast_dtype(input)
        if wanted is not None:  # the packed weight cannot be cast, so the input is; the output has autocast's dtype
            input = input.to(own.dtype)
        return own.linear(self._checked(input), self._parameters["bias"]).to(wanted or input.dtype)

    def mask_changed(self, *, proved: bool = False) -> None:
        """No-op, since the weight is a constant."""

    @torch.no_grad()
    def restore_(self) -> None:
        """Become a plain layer again, with a new parameter."""
        weight = self.parameter()
        del self.packed_weight
        self.__class__ = self.plain  # type: ignore[assignment]
        self.register_parameter("weight", weight)
        self._parameters["bias"] = self._parameters.pop("bias")  # in the layer's own order

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.packed_weight.description}"

    def _checked(self, input: Tensor) -> Tensor:
        dtype = self.packed_weight.dtype
        if checked_input(input, self.packed_weight.shape[1]).dtype != dtype:
            raise ValueError(
                f"the weight is packed in {dtype} and the input is {input.dtype}: "
                "convert the input, run under autocast, or convert the module with .to(dtype)"
            )
        return input

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = self.packed_weight
        held = own.tensors[0]
        found = fn(torch.empty(1, dtype=own.dtype, device=held.device))
        # A packed matrix belongs to a device and a dtype. The old one is dropped only once the new one exists.
        same = found.dtype == own.dtype and found.device == held.device  # such as `share_memory_()`
        if not same and found.is_meta:  # there are no values to pack
            if found.dtype != own.dtype:
                raise ValueError(f"a packed weight cannot become {found.dtype} on the meta device: call finalize_(model) first")
            same = True
        if held.is_meta and not same:
            raise ValueError("the packed weight is on the meta device and has no values to pack again: load a state_dict first")
        moved = own.mapped(fn) if same else own.repacked(fn(own.dense()))
        if same and not _same_positions(own, moved):  # after `to_empty`, kernels would read where nothing is
            moved = own
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed_weight = moved
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.dense_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, own = f"{prefix}weight", self.packed_weight
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight = state_dict.get(key)
        if weight is None:
            if strict:
                missing_keys.append(key)
        elif tuple(weight.shape) != self.weight_shape:
            error_msgs.append(f"{key}: shape {tuple(weight.shape)}, expected {self.weight_shape}")
        else:
            try:
                held = own.tensors[0].device
                device = weight.device if held.type == "meta" else held  # a model on the meta device gets its values here
                self.packed_weight = own.repacked(weight.detach().to(device, own.dtype).flatten(1), key)
            except (BackendError, PatternError) as error:
                error_msgs.append(str(error))


def _same_positions(one: PackedWeight | BitmaskWeight, other: PackedWeight | BitmaskWeight) -> bool:
    """Whether a copy of a packed weight has the same integers: the positions of its values. True without values to compare."""
    pairs = [(own, new) for own, new in zip(one.tensors, other.tensors, strict=True) if not own.is_floating_point()]
    known = [(own, new) for own, new in pairs if not (own.is_meta or new.is_meta) and own.data_ptr() != new.data_ptr()]
    return all(torch.equal(own, new) for own, new in known)


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]  # its weight is a property
    """A Linear with a packed weight; see `PackedLayer`."""

    plain = nn.Linear

    def forward(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        return self.multiplied(input)
