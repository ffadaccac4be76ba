"""The inputs of experts stored in one 3-D parameter, observed as the products that their module computes.

Which tokens an expert gets is known only inside the forward pass of its module. The module is therefore run once more on the
arguments of its call, while every matrix product is looked at: an operand that is a view of expert e's matrix shows the inputs of
expert e, and on which side of the stored matrix they are. This does not depend on names or on an architecture, only on the module
multiplying by views of the parameter. transformers' experts do so in their "eager" implementation, which is used for this run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bisparse.layers import Layer
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.tiles import LayoutKind

__all__ = ["BUSY", "EXPERTS", "ExpertInputs", "experts_hook", "number_of_experts"]

EXPERTS = frozenset({LayoutKind.EXPERTS, LayoutKind.EXPERTS_TRANSPOSED})
"""Layouts with one matrix per expert."""
BUSY = "_bisparse_calibrating"
"""Attribute of modules that calibration runs itself, whose hooks then do nothing."""

aten = torch.ops.aten
PRODUCTS: dict[Any, int] = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
"""Products of matrices, with the position of their left operand."""
EAGER = "_experts_implementation_internal"
"""Attribute of transformers' configurations that chooses how experts are computed."""

Rows = dict[int, Float[Tensor, "T I"]]
"""By expert, the inputs that its matrix multiplies. Experts without inputs are left out."""


def number_of_experts(layer: Layer) -> int:
    """How many experts a layer's parameter holds; 0 for other layouts."""
    return layer.weight.shape[0] if layer.layout.kind in EXPERTS else 0


class ExpertInputs:
    """One call of a module with experts in 3-D parameters. Inputs are computed when asked for, with the present weights."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._module = module
        self._args = args
        self._kwargs = dict(kwargs)

    def routed(self, layer: Layer, keep: Bool[Tensor, "..."] | None = None) -> Rows:
        """The inputs of the experts, by the model's own routing.

        Args:
            layer: a stack of experts of the module.
            keep: which tokens count, if the call has one row per token.

        Raises:
            CalibrationError: the module multiplies along the other side of the stored matrices than the layout says.
        """
        return self._products([layer], *self._call(keep)).get(layer.name, {})

    def all_tokens(self, layer: Layer, experts: Sequence[int], keep: Bool[Tensor, "..."] | None = None) -> Rows:
        """The inputs that each of these experts would have if every token were routed to it.

        Empty if the routing is not an argument of the module's call: token indices with weights of the same shape, or one
        tensor with the same number of rows for each expert.
        """
        args, kwargs = self._call(keep)
        found: Rows = {}
        for expert in experts:
            call = _rerouted(args, kwargs, expert, number_of_experts(layer))
            if call is None:
                return {}
            rows = self._products([layer], *call).get(layer.name, {})
            if expert in rows:
                found[expert] = rows[expert]
        return found

    def order(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """The stacks in the order of their first product, grouped by equal inputs. Stacks without any product are left out."""
        found = self._products(layers, self._args, self._kwargs)
        groups: list[list[Layer]] = []
        for layer in sorted((one for one in layers if one.name in found), key=lambda one: list(found).index(one.name)):
            if groups and _equal(found[groups[-1][0].name], found[layer.name]):
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups

    def _call(self, keep: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments without tokens that do not count."""
        if keep is None or bool(keep.all()):
            return self._args, self._kwargs
        flat = keep.reshape(-1)

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            if value.ndim > 2 and value.shape[: keep.ndim] == keep.shape:
                return value[keep.to(value.device)][None]
            times, rest = divmod(value.shape[0], len(flat))
            return value[flat.repeat(times).to(value.device)] if times and not rest else value

        args, kwargs = pytree.tree_map(kept, (list(self._args), self._kwargs))
        return tuple(args), kwargs

    def _products(self, layers: Sequence[Layer], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        with _apart(self._module), torch.no_grad(), _Products(layers) as products:
            self._module.forward(*args, **kwargs)
            found: dict[str, Rows] = products.rows()
        return found


def experts_hook(layers: Sequence[Layer], seen: Callable[[Layer, Any, int | None], None]) -> Callable[..., None]:
    """A forward pre-hook for a module with these stacks of experts: calls `seen` for each, in the order of their products."""
    order: list[list[Layer]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, BUSY, False):
            return
        if not order:
            order.extend(ExpertInputs(module, args, kwargs).order(layers))
        for group in order:
            inputs = ExpertInputs(module, args, kwargs)
            for layer in group:
                seen(layer, inputs, None)

    return hook


class _Products(TorchDispatchMode):
    """Records the inputs that matrices of expert stacks are multiplied by."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = [layer for layer in layers if layer.weight.is_contiguous()]
        # By stack, expert and offset in the expert's matrix: a part of a matrix, such as the gate, may be multiplied by itself.
        self._found: dict[str, dict[int, dict[int, list[Tensor]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # Composite operators arrive undecomposed there.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        first = PRODUCTS.get(getattr(func, "overloadpacket", None))
        if first is not None:
            left, right = args[first], args[first + 1]
            self._note(right, left, inputs_first_if_stored=True)
            self._note(left, right.transpose(-1, -2), inputs_first_if_stored=False)
        return func(*args, **kwargs)

    def _note(self, operand: Tensor, inputs: Tensor, *, inputs_first_if_stored: bool) -> None:
        """Record `inputs` (..., T, I) if the operand is a view of experts of a stack."""
        for layer in self._layers:
            weight = layer.weight
            start = int(operand.storage_offset()) - int(weight.storage_offset())
            if operand.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() or not 0 <= start < weight.numel():
                continue
            expert, inner = divmod(start, weight.stride(0))
            columns = weight.shape[2]
            stored = operand.stride(-1) == 1 and operand.stride(-2) == columns
            if not stored and not (operand.stride(-2) == 1 and operand.stride(-1) == columns):
                return
            inputs_first = stored == inputs_first_if_stored
            if inputs.shape[-1] != weight.shape[1 if inputs_first else 2]:
                return
            if inputs_first != layer.layout.inputs_first:
                right = LayoutKind.EXPERTS_TRANSPOSED if inputs_first else LayoutKind.EXPERTS
                raise CalibrationError(
                    f"{layer.name}: {type(layer.module).__name__} multiplies these experts as {right.value!r}, but their layout "
                    f"is {layer.layout.kind.value!r}; pass layouts={{{layer.name!r}: {right.value!r}}}"
                )
            parts = self._found.setdefault(layer.name, {})
            if operand.ndim == 2:
                parts.setdefault(expert, {}).setdefault(inner, []).append(inputs.detach().clone())
            elif operand.stride(0) == weight.stride(0) or operand.shape[0] == 1:
                for number, rows in enumerate(inputs.detach()):
                    # Rows of zeros belong to tokens of other experts: they were multiplied by a routing weight of zero.
                    rows = rows[(rows != 0).any(1)]
                    if rows.shape[0]:
                        parts.setdefault(expert + number, {}).setdefault(inner, []).append(rows)
            return

    def rows(self) -> dict[str, Rows]:
        """By stack, in the order of the first product, the inputs of each expert."""
        return {
            name: {expert: torch.cat(parts[min(parts)]) for expert, parts in sorted(experts.items())}
            for name, experts in self._found.items()
        }


def _rerouted(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], expert: int, experts: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call's arguments with all tokens routed to one expert; None if the routing is not recognised."""
    leaves, structure = pytree.tree_flatten((list(args), dict(kwargs)))
    tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    indices = [number for number in tensors if leaves[number].dtype in (torch.int32, torch.int64) and leaves[number].ndim == 2]
    if len(indices) == 1:
        index = leaves[indices[0]]
        weights = [number for number in tensors if number not in indices and leaves[number].shape == index.shape]
        if len(weights) != 1:
            return None
        leaves[indices[0]] = torch.full_like(index[:, :1], expert)
        leaves[weights[0]] = torch.ones_like(leaves[weights[0]][:, :1])
    elif len(leaves) == len(tensors) == 1 and leaves[tensors[0]].ndim == 2 and leaves[tensors[0]].shape[0] % experts == 0:
        rows = leaves[tensors[0]]
        leaves[tensors[0]] = rows[(rows != 0).any(1)].repeat(experts, 1)
    else:
        return None
    new_args, new_kwargs = pytree.tree_unflatten(leaves, structure)
    return tuple(new_args), new_kwargs


def _equal(one: Rows, other: Rows) -> bool:
    return one.keys() == other.keys() and all(torch.equal(rows, other[expert]) for expert, rows in one.items())


@contextmanager
def _apart(module: nn.Module) -> Iterator[None]:
    """Run a module without its hooks, and with transformers' eager experts."""
    inside = list(module.modules())
    configs = [
        one for one in {id(own): own for own in (getattr(part, "config", None) for part in inside)}.values() if one is not None
    ]
    before = [(config, getattr(config, EAGER)) for config in configs if hasattr(config, EAGER)]
    try:
        for part in inside:
            object.__setattr__(part, BUSY, True)
        for config, _ in before:
            setattr(config, EAGER, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, EAGER, implementation)
        for part in inside:
            if BUSY in part.__dict__:
                object.__delattr__(part, BUSY)
