"""A Linear layer whose weight is packed for good: half the memory, and products on sparse tensor cores.

Installed in place, by changing a Linear's class: hooks, names and whoever holds the module stay as they are. It gives a plain
dense weight to `state_dict`, and `restore_` makes it the Linear again that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from bisparse.accelerate.backends.base import BACKENDS, BackendError, backend_or_reference
from bisparse.accelerate.operators import checked_input, packed_linear_2to4
from bisparse.solution import PatternError, verify

__all__ = ["PackedLinear"]

OPERANDS = ("packed", "metadata", "packed_t", "metadata_t")


class PackedLinear(nn.Linear):
    """A Linear whose weight is a constant, stored as its kept values and where they stand.

    `weight` is the dense weight, made anew at each reading; so is the entry of `state_dict`, which loads into a plain Linear and,
    the other way round, takes a plain Linear's entry if it is 2:4. The packed operands are no buffers: they belong to a device
    and a library, and whoever copies or averages buffers would mix them up.
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
        kind, wanted = input.device.type, input.dtype
        if torch.is_autocast_enabled(kind) and wanted != torch.float64:
            # In the dtype of the weight, which cannot be cast; the output as autocast wants it.
            wanted, input = torch.get_autocast_dtype(kind), input.to(self.packed.dtype)
        input = checked_input(input, self.in_features)
        if input.dtype != self.packed.dtype:
            raise ValueError(
                f"the weight is packed in {self.packed.dtype} and the input of shape {tuple(input.shape)} is {input.dtype}: "
                "convert the input, run under autocast, or convert the module with .to(dtype)"
            )
        transposed = None if self.packed_t is None or self.metadata_t is None else (self.packed_t, self.metadata_t)
        output = packed_linear_2to4(
            input, self.packed, self.metadata, transposed, self.bias, self.out_features, self.backend, search=self.search
        )
        return output.to(wanted)

    def operands(self) -> tuple[Tensor | None, ...]:
        """What the weight is stored in: W packed, its metadata, and the same of W^T."""
        return self.packed, self.metadata, self.packed_t, self.metadata_t

    def mask_changed(self, *, proved: bool = False) -> None:
        """Nothing to do: the weight is a constant."""

    @torch.no_grad()
    def restore_(self) -> None:
        """Become a plain Linear again, with the dense weight."""
        weight = self.dense_weight()
        self._hold((None, None, None, None))
        trained = self.was_trained
        for name in (*OPERANDS, "backend", "wanted_backend", "search", "was_trained"):
            delattr(self, name)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
        self._parameters["bias"] = self._parameters.pop("bias")  # in Linear's own order

    def extra_repr(self) -> str:
        backward = "" if self.packed_t is None else ", both ways"
        return f"{super().extra_repr()}, packed 2:4 by {self.backend}{backward}"

    def _hold(self, tensors: tuple[Tensor | None, ...]) -> None:
        for name, tensor in zip(OPERANDS, tensors, strict=True):
            setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        found = fn(self.packed.new_empty(1))
        if found.dtype == self.packed.dtype and found.device == self.packed.device:
            # As for sharing memory. Metadata stay whole numbers whatever all of a module is cast to, as by .type().
            self._hold(tuple(None if one is None else fn(one).to(one.dtype) for one in self.operands()))
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The packed form belongs to a device and a dtype. It is let go once there is another: packing may fail.
        weight = fn(self.dense_weight())
        backend = backend_or_reference(self.wanted_backend, weight.device, weight.dtype)
        operands = _pack(weight, backend, self.packed_t is not None)
        del weight
        self._hold((None, None, None, None))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.backend = backend
        self._hold(operands)
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
            except (BackendError, PatternError) as error:
                error_msgs.append(str(error))


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
                "back (NaN among the weights, or a fault of the library); it is not packed"
            )
        tensors += [packed, metadata]
    return (*tensors, *(None,) * (4 - len(tensors)))
