"""A Linear layer in training whose products are sparse: the dense weight stays the optimizer's.

Installed in place, by changing a Linear's class: hooks, names and whoever holds the module stay as they are. It gives a plain
dense weight to `state_dict`, and `restore_` makes it again what it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from bisparse.accelerate.backends.base import BACKENDS, Backend, backend_or_reference
from bisparse.accelerate.operators import checked_input, linear_2to4
from bisparse.kernels.sparse24.metadata import MetadataForm, empty_slots, lay_out
from bisparse.kernels.sparse24.positions import find_positions, kept_mask
from bisparse.solution import verify
from bisparse.training import MVUELinear
from bisparse.training.layer import static_mask
from bisparse.training.parametrizations import Masked, own_parametrization, trained_parameter
from bisparse.training.shared_classes import separate_class, share_class

__all__ = ["SparseLinear"]

SLOTS = ("positions", "metadata", "positions_t", "metadata_t")


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
    anew: bool
    """The order of the backend's metadata is not known: it packs the weight in every pass, and the metadata held are not used.
    They are held nevertheless, since averages copy buffers from layers that run elsewhere."""
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
        module.wanted_backend, module.search, module.layer_name = backend, search, name
        module.input_dtype, module.mvue, module.both_ways, module.warned = dtype, mvue, transposed, False
        module._settle(backend)
        # A mask that nobody else holds does not move: then gradients of pruned weights would be lost work, or worse.
        module.fixed = own is None and static_mask(module, "weight") is None
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
        metadata, metadata_t = self.metadata, self.metadata_t
        if self.anew:
            metadata, metadata_t = metadata[:0], None if metadata_t is None else metadata_t[:0]
        transposed = None if self.positions_t is None or metadata_t is None else (self.positions_t, metadata_t)
        return linear_2to4(
            checked_input(input, self.in_features),
            trained_parameter(self, "weight"),
            self.bias,
            self.positions,
            metadata,
            transposed,
            self.backend,
            mvue=self.mvue,
            fixed=self.fixed,
            search=self.search,
        )

    @torch.no_grad()
    def mask_changed(self, *, proved: bool = False) -> None:
        """Find the positions of the mask as it is now; sparse training calls it after each refresh.

        Args:
            proved: the mask is known to obey the layer's pattern. Then nothing waits for the device.

        Raises:
            PatternError: the mask is not 2:4. What was found before stays.
        """
        own = own_parametrization(self, "weight")
        # All ones are a dense phase's, also where the state of the Sparsity, which says so, is loaded after the model's.
        if own is not None and (own.dense or (not proved and bool(own.mask.all()))):
            self._hold((None, None, None, None))
        elif not self.fixed:
            # A static mask may be 2:4 on W^T by chance, and its pattern promise less.
            known = proved and (own is not None or not self.both_ways)
            held = tuple(self._buffers[name] for name in SLOTS) if known else None
            self._hold(_find(_mask_of(self), self.backend, self.input_dtype, self.both_ways, held, self.layer_name))
        elif self.positions is not None:
            there = _nonzero(self)
            # Other zeros than before: the weight was loaded. A kept weight may well be zero for now.
            if bool((there & ~kept_mask(self.positions, self.in_features)).any()):
                self._hold(_find(there, self.backend, self.input_dtype, self.both_ways))

    @torch.no_grad()
    def restore_(self) -> None:
        """Become again what it was made of. Pruned entries of a weight in training keep their dense values."""
        if self.fixed:
            trained_parameter(self, "weight").copy_(self.dense_weight())
        self._loaded.remove()
        for name in SLOTS:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        kind = MVUELinear if self.mvue else nn.Linear
        for name in ("backend", "wanted_backend", "input_dtype", "served", "search", "layer_name"):
            delattr(self, name)
        for name in ("mvue", "both_ways", "warned", "fixed", "anew", "_loaded"):
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

    def _settle(self, backend: str) -> None:
        """Run by a backend from now on."""
        own, device = BACKENDS[backend], trained_parameter(self, "weight").device
        self.backend = backend
        self.anew = _forms(own, self.out_features, self.in_features, self.input_dtype, device, self.both_ways) is None
        self.served = own.dtypes if self.anew else own.served(self.input_dtype, device)

    def _hold(self, tensors: tuple[Tensor | None, ...]) -> None:
        for name, tensor in zip(SLOTS, tensors, strict=True):
            held = self._buffers.get(name)
            if held is None or tensor is None or not _alike(held, tensor):
                self.register_buffer(name, tensor, persistent=False)
            elif held is not tensor:
                held.copy_(tensor)  # where a compiled graph, or a captured one, reads it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, backend = self.positions, self.backend
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Also while there is no mask to follow: the next one is found where the layer is then.
        self._settle(backend_or_reference(self.wanted_backend, trained_parameter(self, "weight").device, self.input_dtype))
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
    """The input as autocast wants it, which leaves float64 alone. The weight is cast by the products themselves: autocast's own
    cache of casts would miss an optimizer's step within its context."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(kind))


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _mask_of(module: nn.Module) -> Bool[Tensor, "O I"]:
    own = own_parametrization(module, "weight")
    if own is not None:
        return own.mask
    static = static_mask(module, "weight")
    return static if static is not None else _nonzero(module)


def _nonzero(module: nn.Module) -> Bool[Tensor, "O I"]:
    """The non-zeros of a weight, whole on every rank where it is sharded (a collective call)."""
    weight = trained_parameter(module, "weight").detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight) != 0


@torch.no_grad()
def _find(
    mask: Bool[Tensor, "O I"],
    backend: str,
    dtype: torch.dtype,
    transposed: bool,
    held: tuple[Tensor | None, ...] | None = None,
    name: str = "",
) -> tuple[Tensor | None, ...]:
    """Positions and metadata of a mask and, with `transposed`, of its transpose.

    Args:
        held: those of an earlier mask, to be overwritten where they fit; the mask is not checked then.
    """
    device, (rows, columns) = mask.device, mask.shape
    forms = _forms(BACKENDS[backend], rows, columns, dtype, device, transposed)
    if forms is None:  # then metadata are packed anew in every pass, and not used
        found: list[Tensor | None] = []
        for side in (mask, mask.t()) if transposed else (mask,):
            try:
                positions = find_positions(side)
            except ValueError:
                _say_where(mask, transposed, name)
                raise
            found += [positions, positions.new_zeros(len(side), side.shape[1] // 8)]
        return (*found, *(None,) * (4 - len(found)))
    slots, slots_t = _memory(held, 0, rows, columns, device), _memory(held, 2, columns, rows, device) if transposed else None
    broken = torch.zeros((), dtype=torch.int32, device=device) if held is None else None
    lay_out(mask, forms[0], *slots, None if slots_t is None else (forms[1], *slots_t), broken)
    if broken is not None and bool(broken):
        _say_where(mask, transposed, name)
    return (*slots, *(slots_t or (None, None)))


def _forms(
    backend: Backend, rows: int, columns: int, dtype: torch.dtype, device: torch.device, transposed: bool
) -> tuple[MetadataForm, MetadataForm] | None:
    """The forms of W and of W^T, which is W's own where it is not asked for; None where one is not known."""
    form = backend.form(rows, columns, dtype, device)
    form_t = backend.form(columns, rows, dtype, device) if transposed else form
    return None if form is None or form_t is None else (form, form_t)


def _memory(
    held: tuple[Tensor | None, ...] | None, start: int, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the slots of one side go: into those held, if there are any here."""
    positions, metadata = (None, None) if held is None else held[start : start + 2]
    if positions is None or metadata is None or positions.device != device:
        return empty_slots(rows, columns, device)
    return positions, metadata


def _say_where(mask: Bool[Tensor, "O I"], transposed: bool, name: str) -> None:
    verify(mask, "2:4-T" if transposed else "2:4", name=name).check()


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
