"""A Linear layer in training with sparse products; the optimizer keeps the dense weight.

Installed in place by changing a Linear's class, so hooks, names and references to the module do not change. The `state_dict`
has a plain dense weight, and `restore_` turns the module back into the original class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from bisparse.accelerate.backends import BACKENDS, backend_or_reference
from bisparse.accelerate.eligibility import Plan
from bisparse.accelerate.operators import autocast_dtype, checked_input, in_forward_mode, linear_2to4, refuse_onnx
from bisparse.kernels.sparse24.metadata import MetadataLayout, empty_slots, lay_out
from bisparse.kernels.sparse24.positions import find_positions, kept_mask
from bisparse.training import MVUELinear
from bisparse.training.parametrizations import layer_state, trained_parameter
from bisparse.training.shared_classes import separate_class, share_class
from bisparse.verification import verify

__all__ = ["SparseLinear", "SparseProducts"]

UNKNOWN_LAYOUT = "its metadata layout is unknown, or there was too little memory to find it"


class Slots(NamedTuple):
    """Positions of a mask's kept entries and hardware metadata, of W and, if used, of W^T. All None without a mask."""

    positions: UInt8[Tensor, "O G"] | None = None
    metadata: Shaped[Tensor, "..."] | None = None
    positions_t: UInt8[Tensor, "I H"] | None = None
    metadata_t: Shaped[Tensor, "..."] | None = None


@dataclass(frozen=True)
class SparseProducts:
    """The backend and options by which the products of a layer in training run."""

    backend: str
    wanted_backend: str
    """The backend to use whenever the layer is on a device where it runs."""
    dtype: torch.dtype
    """Dtype of the inputs for which the layer was accelerated."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes of all inputs that run sparse."""
    both_ways: bool
    """Whether the gradient of the input is a sparse product too."""
    mvue: bool
    fixed: bool
    """Whether the mask is fixed to the weight's non-zeros."""
    search: bool
    """Whether the backend searches for its fastest algorithm, once per shape."""
    repacks_every_pass: bool
    """Whether the backend's metadata layout is unknown, so that it packs the weight in every pass and `metadata` is unused."""
    name: str
    """Name of the layer, for messages."""

    @classmethod
    def of(cls, module: nn.Linear, plan: Plan, *, search: bool = True, name: str = "") -> SparseProducts:
        """The planned products of a Linear, plain or in sparse training; `name` is the layer's, for messages."""
        # A mask that only follows from the weight is fixed, so pruned weights must not get gradients.
        state, backend = layer_state(module), plan.backend
        mvue, fixed = isinstance(module, MVUELinear), state.phase == "plain"
        own = cls(backend, backend, plan.dtype, (), plan.both_ways, mvue, fixed, search, False, name)
        return own.on(backend, state.weight)

    def on(self, backend: str, weight: Float[Tensor, "O I"]) -> SparseProducts:
        """The same products by another backend, on the weight's device."""
        library, device = BACKENDS[backend], weight.device
        repacks = self.layouts(backend, weight.shape[0], weight.shape[1], device) is None
        dtypes = library.dtypes if repacks else library.dtypes_of_layout(self.dtype, device)
        return replace(self, backend=backend, dtypes=dtypes, repacks_every_pass=repacks)

    def layouts(
        self, backend: str, rows: int, columns: int, device: torch.device
    ) -> tuple[MetadataLayout, MetadataLayout] | None:
        """The metadata layouts of W and of W^T (W's again if W^T is not used); None if one is unknown."""
        library = BACKENDS[backend]
        layout = library.metadata_layout(rows, columns, self.dtype, device)
        layout_t = library.metadata_layout(columns, rows, self.dtype, device) if self.both_ways else layout
        return None if layout is None or layout_t is None else (layout, layout_t)

    @torch.inference_mode(False)  # they outlive the mode of the caller
    @torch.no_grad()
    def slots(self, mask: Bool[Tensor, "O I"], held: Slots | None = None) -> Slots:
        """Positions and metadata of a mask and, if both ways are sparse, of its transpose.

        Args:
            held: slots of an earlier mask, to be overwritten if they fit; the mask is then not checked.

        Raises:
            PatternError: the mask is not 2:4.
        """
        device, (rows, columns) = mask.device, mask.shape
        layouts = self.layouts(self.backend, rows, columns, device)
        if layouts is None:
            return self._unused_metadata(mask)
        invalid = None if held is not None else torch.zeros((), dtype=torch.int32, device=device)
        held = held or Slots()
        side = _memory(held[:2], rows, columns, device)
        side_t = _memory(held[2:], columns, rows, device) if self.both_ways else None
        lay_out(mask, layouts[0], *side, None if side_t is None else (layouts[1], *side_t), invalid)
        if invalid is not None and bool(invalid):
            self.check(mask)
        return Slots(*side, *(side_t or (None, None)))

    def check(self, mask: Bool[Tensor, "O I"]) -> None:
        """Raise PatternError unless the mask is 2:4 in every direction that the products use."""
        verify(mask, "2:4-T" if self.both_ways else "2:4", name=self.name).check()

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether inputs of a dtype run sparse; warns if not."""
        if dtype in self.dtypes:
            return True
        _warn_of_dense(self.name, self.backend, self.dtype, dtype)
        return False

    def linear(self, input: Float[Tensor, "*T I"], weight: Tensor, bias: Tensor | None, slots: Slots) -> Float[Tensor, "*T O"]:
        """``x W~^T + b`` with W~ the weight at the positions of the slots."""
        positions, metadata, positions_t, metadata_t = slots
        assert positions is not None and metadata is not None
        if self.repacks_every_pass:
            metadata, metadata_t = metadata[:0], None if metadata_t is None else metadata_t[:0]
        transposed = None if positions_t is None or metadata_t is None else (positions_t, metadata_t)
        return linear_2to4(
            input, weight, bias, positions, metadata, transposed, self.backend,
            mvue=self.mvue, fixed=self.fixed, search=self.search,
        )  # fmt: skip

    def _unused_metadata(self, mask: Bool[Tensor, "O I"]) -> Slots:
        """Slots for a backend that packs in every pass: positions, and uninitialised metadata."""
        found: list[Tensor] = []
        for side in (mask, mask.t()) if self.both_ways else (mask,):
            try:
                positions = find_positions(side)
            except ValueError:
                self.check(mask)  # the error says where
                raise
            found += [positions, positions.new_zeros(len(side), side.shape[1] // 8)]
        return Slots(*found)


class SparseLinear(nn.Linear):
    """A trainable Linear: the optimizer has its dense weight, and products are sparse, at the mask's positions.

    Positions are found when the mask changes; values are read from the weight in every pass, so they cannot be stale. Without
    a mask (a dense phase), and for inputs of other dtypes, it runs masked-dense.
    """

    products: SparseProducts
    slots: Slots
    """Positions and metadata of the current mask. They are not buffers, since tools that average models average buffers."""

    @classmethod
    def install_(cls, module: nn.Linear, plan: Plan, *, search: bool = True, name: str = "") -> str:
        """Turn a Linear, plain or in sparse training, into this class; parameters and masks stay the same objects.

        Returns a note on what makes its products slow, or an empty string.

        Raises:
            PatternError: the mask is not 2:4; the module is unchanged.
        """
        products = SparseProducts.of(module, plan, search=search, name=name)
        slots = Slots() if layer_state(module).phase == "dense" else products.slots(_mask_of(module))
        _set_class(module, cls)
        assert isinstance(module, cls)
        module.products = products
        module._hold(slots)
        module._loaded = module.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
        slow = products.repacks_every_pass and BACKENDS[plan.backend].learns_layout
        return f"{plan.backend} compresses its weight in every pass: {UNKNOWN_LAYOUT}" if slow else ""

    @property
    def positions(self) -> UInt8[Tensor, "O G"] | None:
        """Positions of the kept entries along the rows of W; None without a mask."""
        return self.slots.positions

    @property
    def derived_tensors(self) -> tuple[Tensor, ...]:
        """Positions and metadata, of W and of W^T."""
        return tuple(one for one in self.slots if one is not None)

    @torch.no_grad()
    def dense_weight(self) -> Float[Tensor, "O I"]:
        """The weight that the products multiply by: dense, with zeros."""
        state = layer_state(self)
        if state.parametrization is not None:
            assert state.mask is not None
            return torch.where(state.mask, state.weight, 0)
        assert self.positions is not None
        return torch.where(kept_mask(self.positions, self.in_features), state.weight, 0)

    def forward(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        refuse_onnx()
        input = _autocast(input)
        if self.positions is None or in_forward_mode() or not self.products.serves(input.dtype):
            return self._masked_dense(input)
        weight = trained_parameter(self, "weight")
        slots = self.slots
        if slots.positions is not None and slots.positions.device != weight.device:  # as FSDP2 moves it
            slots = self.slots = self.products.slots(kept_mask(slots.positions, self.in_features).to(weight.device))
        return self.products.linear(checked_input(input, self.in_features), weight, self.bias, slots)

    @torch.no_grad()
    def mask_changed(self, *, proved: bool = False) -> None:
        """Find the positions of the current mask. Sparse training calls this after each refresh.

        Args:
            proved: the mask is known to obey the layer's pattern, so that no check has to synchronise with the device.

        Raises:
            PatternError: the mask is not 2:4; the previous positions are kept.
        """
        state, own = layer_state(self), self.products
        # An all-True mask means a dense phase, even if the Sparsity's state, which would say so, is loaded after the model's.
        if state.phase == "dense" or (state.phase == "dynamic" and not proved and bool(_mask_of(self).all())):
            self._hold(Slots())
        elif not own.fixed:
            # A static mask may be 2:4 on W^T although its pattern does not require it.
            known = proved and (state.phase == "dynamic" or not own.both_ways)
            self._hold(own.slots(_mask_of(self), self.slots if known else None))
        elif not self.weight.is_meta:
            nonzero = _mask_of(self)
            # The weight has different zeros, so it was loaded. A kept weight may be zero temporarily.
            known = self.positions is not None and not self.positions.is_meta
            if not known or bool((nonzero & ~self._kept().to(nonzero.device)).any()):
                self._hold(own.slots(nonzero))

    @torch.no_grad()
    def restore_(self) -> None:
        """Turn the module back into its original class. Pruned entries of a weight in training keep their dense values."""
        if self.products.fixed:
            weight, pruned = self.weight, ~self._kept()
            if bool((weight[pruned] != 0).any()):
                weight.masked_fill_(pruned, 0)
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _after_loading]:
            del hooks[key]
        del self.slots
        kind = MVUELinear if self.products.mvue else nn.Linear
        del self.products
        _set_class(self, kind)

    def extra_repr(self) -> str:
        ways = "both ways" if self.products.both_ways else "forward"
        return f"{super().extra_repr()}, 2:4 by {self.products.backend}, {ways}{', mvue' if self.products.mvue else ''}"

    def _kept(self) -> Bool[Tensor, "O I"]:
        assert self.positions is not None
        return kept_mask(self.positions, self.in_features)

    def _masked_dense(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        if parametrize.is_parametrized(self, "weight"):
            weight: Tensor = self.weight
        elif self.positions is not None:
            weight = torch.where(self._kept(), self.weight, 0)
        else:
            weight = self.weight
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

    def _hold(self, slots: Slots) -> None:
        kept: list[Tensor | None] = []
        for held, tensor in zip(vars(self).get("slots", Slots()), slots, strict=True):
            if held is None or tensor is None or not _alike(held, tensor):
                kept.append(tensor)
                continue
            if held is not tensor:
                held.copy_(tensor)  # in place: compiled and captured graphs read this memory
            kept.append(held)
        self.slots = Slots(*kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, backend = self.positions, self.products.backend
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Also without a mask: the next one will be found on the new device.
        weight, own = layer_state(self).weight, self.products
        self.products = own.on(backend_or_reference(own.wanted_backend, weight.device, own.dtype), weight)
        if before is None or before.device == weight.device:
            if before is not None and backend != self.products.backend:
                self._hold(self.products.slots(self._kept()))
        elif before.is_meta:  # no positions yet; loading a state finds those of its weight
            self.slots = Slots()
        elif weight.is_meta:
            self.slots = Slots(*(None if one is None else one.to(weight.device) for one in self.slots))
        else:
            self._hold(self.products.slots(self._kept().to(weight.device)))
        return self


@torch.compiler.assume_constant_result
def _warn_of_dense(name: str, backend: str, wanted: torch.dtype, given: torch.dtype) -> bool:
    """Warn that a layer runs masked-dense. Python shows this once per layer; compiled code warns at compile time."""
    warnings.warn(
        f"{name or 'a sparse Linear'} runs masked-dense: it was accelerated for {wanted}, the input is {given}. Run under "
        f"autocast, or pass dtype={given} to accelerate_ if {backend} takes it.",
        stacklevel=4,
    )
    return True


def _autocast(input: Tensor) -> Tensor:
    """The input, cast as autocast does, which leaves float64 unchanged. The products cast the weight themselves, since
    autocast's cache of casts would miss an optimizer step inside its context."""
    dtype = autocast_dtype(input)
    return input if dtype is None else input.to(dtype)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _mask_of(module: nn.Module) -> Bool[Tensor, "O I"]:
    """The mask of a layer, or its non-zeros if it is plain; of a sharded one the whole mask (a collective call)."""
    state = layer_state(module)
    if state.mask is not None:
        return state.mask
    weight = state.weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight) != 0


def _memory(
    held: tuple[Tensor | None, ...], rows: int, columns: int, device: torch.device
) -> tuple[UInt8[Tensor, "R G"], UInt8[Tensor, "R B"]]:
    """Output tensors for positions and metadata of one side: those of `held`, if they are on the device."""
    positions, metadata = held
    if positions is None or metadata is None or positions.device != device:
        return empty_slots(rows, columns, device)
    return positions, metadata


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
