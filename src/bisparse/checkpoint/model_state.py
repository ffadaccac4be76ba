"""The entries of a model's state_dict, and how stored tensors become them.

Most entries are memory of the model, which is written to directly. Others are made when the state_dict is made, such as copies
by a hook of the model, states of torchmetrics, or what `get_extra_state` returns: those are left to `load_state_dict`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.checkpoint.stored_tensor import StoredTensor
from bisparse.errors import CheckpointError
from bisparse.rollback import Rollback, same_bits

__all__ = ["ModelState", "is_extra", "state_of", "write_into"]

EXTRA = "_extra_state"
"""The key of what a module's `get_extra_state` returns."""


@dataclass(frozen=True)
class ModelState:
    """The state_dict of a model."""

    model: nn.Module
    entries: Mapping[str, Any]
    """With the model's own parameters, not detached: tied ones are the same object."""
    made: frozenset[str]
    """Names of entries that are not memory of the model."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The entries that are tensors."""
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, Tensor)}

    def left(self, stored: Mapping[str, StoredTensor]) -> list[str]:
        """Names of entries that are no tensors and not among the stored ones, so that they stay as they are."""
        return [
            name for name, entry in self.entries.items() if not (entry is None or isinstance(entry, Tensor) or name in stored)
        ]

    def with_siblings(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are made, and those of the same modules, whose loading may need them together."""
        names = list(names)
        modules = {_module(name) for name in names if name in self.made}
        return [name for name in names if _module(name) in modules]

    def load(self, stored: Mapping[str, StoredTensor], rollback: Rollback, strict: bool = True) -> dict[str, Tensor]:
        """Load stored tensors by the model's `load_state_dict`; what their entries must now be equal to, for `check`.

        Args:
            rollback: of the model; it is given the tensors of the modules concerned.
            strict: raise for extra state that its module does not take.

        Raises:
            CheckpointError: the model refuses them.
        """
        values = OrderedDict((name, self._value(name, tensor)) for name, tensor in stored.items())
        if (versions := getattr(self.entries, "_metadata", None)) is not None:
            values._metadata = versions  # type: ignore[attr-defined]  # else modules migrate the entries, as from older versions
        modules = dict(self.model.named_modules(remove_duplicate=False))
        concerned = [modules[path] for path in {_module(name) for name in stored} if path in modules]
        rollback.touch(*(one for module in concerned for one in _held_by(module) if not one.is_meta))
        try:
            refused: list[str] = self.model.load_state_dict(values, strict=False).unexpected_keys
        except RuntimeError as error:
            first = next(iter(stored.values()))
            raise CheckpointError(
                first.path,
                f"is refused by the model's load_state_dict: {' '.join(str(error).split())}",
                "build the model of this checkpoint",
            ) from error
        for name in refused:
            if strict or not is_extra(name):
                raise CheckpointError(
                    stored[name].path,
                    "is in the model's state_dict, but its load_state_dict does not take it",
                    "define set_extra_state or _load_from_state_dict in its module, or remove it from the state_dict",
                    tensor=name,
                )
        return {name: value for name, value in values.items() if not is_extra(name)}

    def check(self, loaded: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
        """Raise CheckpointError unless the state_dict now has the values that `load` returned."""
        now = self.model.state_dict() if loaded else {}
        for name, value in loaded.items():
            if not isinstance(own := now.get(name), Tensor) or not same_bits(own, value):
                raise CheckpointError(
                    stored[name].path,
                    "was passed to the model's load_state_dict, but its state_dict then has other values",
                    "check its hooks, _load_from_state_dict, and whether it ties tensors that differ in the file",
                    tensor=name,
                )

    def _value(self, name: str, tensor: StoredTensor) -> Tensor:
        entry = self.entries[name]
        device = entry.device if isinstance(entry, Tensor) and not entry.is_meta else torch.device("cpu")
        if is_extra(name) or not isinstance(entry, Tensor):
            value: Tensor = tensor.read().view(tensor.shape).to(device)
        else:
            value = torch.empty(entry.shape, dtype=entry.dtype, device=device)
            write_into(tensor, value)
        return value


def state_of(model: nn.Module) -> ModelState:
    """The state of a model, whose entries share its memory where possible."""
    entries = model.state_dict(keep_vars=True)
    held = [tensor for module in model.modules() for tensor in _held_by(module)]
    ids, storages = {id(one) for one in held}, {_storage(one) for one in held} - {None}
    made = frozenset(
        name
        for name, entry in entries.items()
        if not isinstance(entry, Tensor)
        or is_extra(name)
        or not (id(entry) in ids or _storage(entry) in storages or (entry.numel() == 0 and not entry.is_meta))
    )
    return ModelState(model, entries, made)


def is_extra(name: str) -> bool:
    """Whether a key of a state_dict is that of a module's extra state."""
    return name.rpartition(".")[2] == EXTRA


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _held_by(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and other attributes of one module that are tensors."""
    for held in (module._parameters, module._buffers, vars(module)):
        yield from (one for one in held.values() if isinstance(one, Tensor))


def _storage(tensor: Tensor) -> tuple[torch.device, int] | None:
    """A key of the memory that a tensor is in; None if it has none that can be compared."""
    if tensor.is_meta or tensor.layout != torch.strided or not (place := tensor.untyped_storage().data_ptr()):
        return None
    return tensor.device, place


def write_into(tensor: StoredTensor, own: Tensor) -> None:
    """Copy a stored tensor into a tensor of the model.

    Raises:
        CheckpointError: it cannot be copied, or numbers would become infinite, NaN or different integers.
    """
    new = tensor.read().view(tensor.shape)
    try:
        own.copy_(new)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            tensor.path,
            f"cannot be written to the model's {own.dtype}: {str(error).splitlines()[0]}",
            "build the model in the dtype of the checkpoint",
            tensor=tensor.name,
        ) from error
    if own.dtype == new.dtype:
        return
    written = own.cpu()
    if own.dtype.is_floating_point or own.dtype.is_complex:
        # Some conversions saturate instead of overflowing.
        limits = torch.finfo(own.dtype)
        lost = _finite(new) & (~_finite(written) | (_wide(new).abs() > limits.max * (1 + limits.eps / 2)))
    else:
        lost = written.to(new.dtype) != new
    if bool(lost.any()):
        worst = _wide(new)[lost].abs().max()
        raise CheckpointError(
            tensor.path,
            f"has {int(lost.sum()):,} values, up to {float(worst):.6g}, that the model's {own.dtype} cannot hold",
            f"build the model in the dtype of the checkpoint ({tensor.dtype}) or in bfloat16, which has the range of float32",
            tensor=tensor.name,
        )


def _finite(values: Tensor) -> Tensor:
    return torch.isfinite(_wide(values))


def _wide(values: Tensor) -> Tensor:
    """The values in a dtype for which torch has arithmetic."""
    return values if values.is_complex() else values.double()
