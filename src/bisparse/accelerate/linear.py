"""Linear layers that run sparse: `PackedLinear` holds its weight packed for good, `SparseLinear` trains a dense one.

Both are installed in place, by changing a Linear's class: hooks, names and whoever holds the module stay as they are. Both give
plain dense weights to `state_dict`, and `restore_` makes them the Linear again that they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from bisparse.accelerate.backend import BACKENDS, BackendError
from bisparse.accelerate.operators import linear_2to4, packed_linear_2to4
from bisparse.kernels.positions import find_positions, kept_mask
from bisparse.solution import PatternError, verify
from bisparse.training import MVUELinear
from bisparse.training.masked import Masked, own_parametrization, trained_parameter
from bisparse.training.parametrized import separate_class, share_class

__all__ = ["PackedLinear", "SparseLinear"]


class PackedLinear(nn.Linear):
    """A Linear whose weight is a constant, stored as its kept values and where they stand.

    `weight` is the dense weight, made anew at each reading; so is the entry of `state_dict`, which loads into a plain Linear and,
    the other way round, takes a plain Linear's entry if it is 2:4.
    """

    backend: str
    wanted_backend: str
    search: bool
    was_trained: bool
    packed: Shaped[Tensor, "..."]
    metadata: Shaped[Tensor, "..."]
    packed_t: Shaped[Tensor, "..."] | None
    metadata_t: Shaped[Tensor, "..."] | None

    @classmethod
    def install_(cls, module: nn.Linear, backend: str, *, transposed: bool, search: bool = True) -> None:
        """Turn a Linear into this class. With `transposed` W^T is packed too, for sparse gradients of the input.

        Raises:
            PatternError: the weight, or with `transposed` its transpose, is not 2:4.
            BackendError: what was packed does not give the weight back. The module is unchanged then.
        """
        weight = module.weight.detach()
        tensors = _pack(weight, backend, transposed)
        trained = module.weight.requires_grad
        del module._parameters["weight"]
        module.__class__ = cls
        assert isinstance(module, cls)
        module.backend, module.wanted_backend, module.search, module.was_trained = backend, backend, search, trained
        module._hold(tensors)

    @property
    def weight(self) -> Float[Tensor, "O I"]:  # type: ignore[override]
        """The dense weight, made anew at each reading."""
        return self.dense_weight()

    @torch.no_grad()
    def dense_weight(self) -> Float[Tensor, "O I"]:
        """The weight that was packed; its zeros, of either sign, are 0.0: the packed form has none to keep a sign of."""
        return BACKENDS[self.backend].unpack(self.packed, self.metadata, self.out_features, self.in_features)

    def forward(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        input = _checked(_cast(input), self.in_features)
        if input.dtype != self.packed.dtype:
            raise ValueError(
                f"the weight is packed in {self.packed.dtype} and the input of shape {tuple(input.shape)} is {input.dtype}: "
                "convert the input, run under autocast, or convert the module with .to(dtype)"
            )
        transposed = None if self.packed_t is None or self.metadata_t is None else (self.packed_t, self.metadata_t)
        return packed_linear_2to4(
            input, self.packed, self.metadata, transposed, self.bias, self.out_features, self.backend, search=self.search
        )

    def mask_changed(self) -> None:
        """Nothing to do: the weight is a constant."""

    @torch.no_grad()
    def restore_(self) -> None:
        """Become a plain Linear again, with the dense weight."""
        weight = self.dense_weight()
        self._hold((None, None, None, None))
        for name in ("packed", "metadata", "packed_t", "metadata_t"):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        trained = self.was_trained
        for name in ("backend", "wanted_backend", "search", "was_trained"):
            delattr(self, name)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
        self._parameters["bias"] = self._parameters.pop("bias")  # in Linear's own order

    def extra_repr(self) -> str:
        backward = "" if self.packed_t is None else ", both ways"
        return f"{super().extra_repr()}, packed 2:4 by {self.backend}{backward}"

    def _hold(self, tensors: tuple[Tensor | None, ...]) -> None:
        for name, tensor in zip(("packed", "metadata", "packed_t", "metadata_t"), tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        found = fn(self.packed.new_empty(1))
        if found.dtype == self.packed.dtype and found.device == self.packed.device:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The packed form belongs to a device and a dtype.
        both_ways, weight = self.packed_t is not None, fn(self.dense_weight())
        self._hold((None, None, None, None))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.backend = _usable(self.wanted_backend, weight.device, weight.dtype)
        self._hold(_pack(weight, self.backend, both_ways))
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
        key = f"{prefix}weight"
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight = state_dict.get(key)
        if weight is None:
            if strict:
                missing_keys.append(key)
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{key}: shape {tuple(weight.shape)}, expected {(self.out_features, self.in_features)}")
        else:
            try:
                weight = weight.detach().to(self.packed.device, self.packed.dtype)
                self._hold(_pack(weight, self.backend, self.packed_t is not None, key))
            except PatternError as error:
                error_msgs.append(str(error))


class SparseLinear(nn.Linear):
    """A Linear that trains: its dense weight is the optimizer's, its products are sparse at the mask's positions.

    Positions are found where the mask changes; the values are taken from the weight in every pass, so nothing can go stale.
    While there is no mask to follow (a dense phase), and for inputs of a dtype that is not `served`, it runs masked-dense.
    """

    backend: str
    wanted_backend: str
    input_dtype: torch.dtype
    search: bool
    layer_name: str
    mvue: bool
    both_ways: bool
    fixed: bool
    """The mask is the weight's own zeros, and stays."""
    warned: bool
    served: tuple[torch.dtype, ...]
    """Dtypes of inputs that run sparse."""
    _loaded: RemovableHandle
    positions: UInt8[Tensor, "O G"] | None
    metadata: Shaped[Tensor, "..."] | None
    positions_t: UInt8[Tensor, "I H"] | None
    metadata_t: Shaped[Tensor, "..."] | None

    @classmethod
    def install_(
        cls, module: nn.Linear, backend: str, dtype: torch.dtype, *, transposed: bool, search: bool = True, name: str = ""
    ) -> None:
        """Turn a Linear, plain or in sparse training, into this class; parameters and masks stay the same objects.

        Args:
            dtype: of the inputs, as autocast or the model's own dtype will have it.
            transposed: the mask is 2:4 along columns too, and the input's gradient shall be a sparse product.
            name: the layer's, for messages.

        Raises:
            PatternError: the mask is not 2:4. The module is unchanged then.
        """
        own = own_parametrization(module, "weight")
        resting = own is not None and own.dense
        tensors = (None,) * 4 if resting else _find(_mask_of(module), backend, dtype, transposed)
        mvue = isinstance(module, MVUELinear)
        _set_class(module, cls)
        assert isinstance(module, cls)
        module.backend, module.wanted_backend, module.search, module.layer_name = backend, backend, search, name
        module.input_dtype, module.served = dtype, BACKENDS[backend].served(dtype, trained_parameter(module, "weight").device)
        module.mvue, module.both_ways, module.warned = mvue, transposed, False
        # A mask that nobody else holds does not move: then gradients of pruned weights would be lost work, or worse.
        module.fixed = own is None and not isinstance(_static_mask(module), Tensor)
        module._hold(tensors)
        module._loaded = module.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def dense_weight(self) -> Float[Tensor, "O I"]:
        """The weight as the products see it: dense, with zeros."""
        weight = trained_parameter(self, "weight")
        if isinstance(own := own_parametrization(self, "weight"), Masked):
            return torch.where(own.mask, weight, 0)
        assert self.positions is not None
        return torch.where(kept_mask(self.positions, self.in_features), weight, 0)

    def forward(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        input = _cast(input)
        if self.positions is None or self.metadata is None or not self._takes(input.dtype):
            return self._dense(input)
        transposed = None if self.positions_t is None or self.metadata_t is None else (self.positions_t, self.metadata_t)
        return linear_2to4(
            _checked(input, self.in_features),
            trained_parameter(self, "weight"),
            self.bias,
            self.positions,
            self.metadata,
            transposed,
            self.backend,
            mvue=self.mvue,
            fixed=self.fixed,
            search=self.search,
        )

    @torch.no_grad()
    def mask_changed(self) -> None:
        """Find the positions of the mask as it is now; sparse training calls it after each refresh."""
        own = own_parametrization(self, "weight")
        if own is not None and own.dense:
            self._hold((None, None, None, None))
        elif not self.fixed:
            self._hold(_find(_mask_of(self), self.backend, self.input_dtype, self.both_ways))
        elif self.positions is not None:
            there = trained_parameter(self, "weight").detach() != 0
            # Other zeros than before: the weight was loaded. A kept weight may well be zero for now.
            if bool((there & ~kept_mask(self.positions, self.in_features)).any()):
                self._hold(_find(there, self.backend, self.input_dtype, self.both_ways))

    @torch.no_grad()
    def restore_(self) -> None:
        """Become again what it was made of. Pruned entries of a weight in training keep their dense values."""
        if self.fixed:
            trained_parameter(self, "weight").copy_(self.dense_weight())
        self._loaded.remove()
        for name in ("positions", "metadata", "positions_t", "metadata_t"):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        kind = MVUELinear if self.mvue else nn.Linear
        for name in ("backend", "wanted_backend", "input_dtype", "served", "search", "layer_name"):
            delattr(self, name)
        for name in ("mvue", "both_ways", "warned", "fixed", "_loaded"):
            delattr(self, name)
        _set_class(self, kind)

    def extra_repr(self) -> str:
        ways = "both ways" if self.both_ways else "forward"
        return f"{super().extra_repr()}, 2:4 by {self.backend}, {ways}{', mvue' if self.mvue else ''}"

    def _takes(self, dtype: torch.dtype) -> bool:
        if dtype in self.served:
            return True
        if torch.compiler.is_compiling():
            _warn_of_dense(self.layer_name, self.backend, self.input_dtype, dtype)
        elif not self.warned:
            self.warned = True
            _warn_of_dense(self.layer_name, self.backend, self.input_dtype, dtype)
        return False

    def _dense(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        weight = trained_parameter(self, "weight")
        if parametrize.is_parametrized(self, "weight"):
            weight = self.weight
        elif self.positions is not None:
            weight = torch.where(kept_mask(self.positions, self.in_features), weight, 0)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

    def _hold(self, tensors: tuple[Tensor | None, ...]) -> None:
        for name, tensor in zip(("positions", "metadata", "positions_t", "metadata_t"), tensors, strict=True):
            held = self._buffers.get(name)
            if held is not None and tensor is not None and _alike(held, tensor):
                held.copy_(tensor)  # where a compiled graph, or a captured one, reads it
            else:
                self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, backend = self.positions, self.backend
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Also while there is no mask to follow: the next one is found where the layer is then.
        device = trained_parameter(self, "weight").device
        self.backend = _usable(self.wanted_backend, device, self.input_dtype)
        self.served = BACKENDS[self.backend].served(self.input_dtype, device)
        if before is None or self.positions is None:
            return self
        if before.device != self.positions.device or backend != self.backend:
            mask = kept_mask(self.positions, self.in_features)
            self._hold(_find(mask, self.backend, self.input_dtype, self.both_ways))
        return self


@torch.compiler.assume_constant_result
def _warn_of_dense(name: str, backend: str, wanted: torch.dtype, given: torch.dtype) -> bool:
    """Compiled code warns when it is compiled, which is when it is decided how it will run."""
    warnings.warn(
        f"{name or 'a sparse Linear'} runs masked-dense: it was accelerated for {wanted}, the input is {given}. Run under "
        f"autocast, or pass dtype={given} to accelerate_ if {backend} takes it.",
        stacklevel=4,
    )
    return True


def _cast(input: Tensor) -> Tensor:
    """The input as autocast wants it. The weight is cast by the products themselves: autocast's own cache of casts would miss
    an optimizer's step within its context."""
    kind = input.device.type
    return input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input


def _checked(input: Tensor, columns: int) -> Tensor:
    if input.shape[-1:] != (columns,):
        raise ValueError(f"an input of shape {tuple(input.shape)} does not fit a layer of {columns} inputs")
    return input


def _usable(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that was wanted where it runs, else the reference, as for a copy on the CPU: it comes back with the GPU."""
    own = BACKENDS[wanted]
    return wanted if own.device_reason(device) is None and own.dtype_reason(dtype) is None else "reference"


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _static_mask(module: nn.Module) -> Tensor | None:
    mask = module._buffers.get("weight_mask")
    return mask if mask is not None and mask.dtype == torch.bool else None


def _mask_of(module: nn.Module) -> Bool[Tensor, "O I"]:
    own = own_parametrization(module, "weight")
    if own is not None:
        return own.mask
    static = _static_mask(module)
    return static if static is not None else trained_parameter(module, "weight").detach() != 0


@torch.no_grad()
def _find(
    mask: Bool[Tensor, "O I"], backend: str, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    own = BACKENDS[backend]
    try:
        positions = find_positions(mask)
        positions_t = find_positions(mask.t()) if transposed else None
    except ValueError:
        verify(mask, "2:4-T" if transposed else "2:4").check()  # says where
        raise
    if positions_t is None:
        return *own.layout(mask, positions, dtype), None, None
    layout, layout_t = own.layouts(mask, positions, positions_t, dtype)
    return *layout, *layout_t


@torch.no_grad()
def _pack(weight: Float[Tensor, "O I"], backend: str, transposed: bool, name: str = "") -> tuple[Tensor | None, ...]:
    verify(weight, "2:4-T" if transposed else "2:4", name=name).check()
    own, sides, tensors = BACKENDS[backend], [weight, weight.t()] if transposed else [weight], []
    for matrix in sides:
        matrix = matrix.contiguous()
        packed, metadata = own.pack(matrix)
        if not torch.equal(own.unpack(packed, metadata, *matrix.shape), matrix):
            raise BackendError(
                f"{name or 'a weight'} of shape {tuple(matrix.shape)} and {matrix.dtype}: what {backend} packed does not give it "
                "back (NaN among the weights, or a fault of the library); it stays dense"
            )
        tensors += [packed, metadata]
    return (*tensors, *(None,) * (4 - len(tensors)))


def _set_class(module: nn.Module, kind: type[nn.Linear]) -> None:
    """Change a module's class beneath its parametrizations."""
    if parametrize.is_parametrized(module):
        separate_class(module, kind)
        share_class(module)
    else:
        module.__class__ = kind


def _after_loading(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, SparseLinear)
    module.mask_changed()
