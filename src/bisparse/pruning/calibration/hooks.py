"""Hooks that record the inputs of layers while a model runs; they depend on module types, not on the architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.layers import Layer
from bisparse.pruning.calibration.expert_inputs import BUSY, EXPERTS, ExpertInputs, experts_hook
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.tiles import LayoutKind
from bisparse.user_errors import ends_the_process, error_in_one_line

__all__ = [
    "LAST_PART",
    "WITHOUT_DATA",
    "EnoughSeen",
    "Seen",
    "batch_error_context",
    "call_model",
    "none_reached",
    "observed",
    "unreached_reason",
    "unseen_reason",
]

Seen = Callable[[Layer, Tensor | ExpertInputs, int | None], None]
"""Called with a layer, its input, and which part of a packed projection the input belongs to (None: all of it)."""

WITHOUT_DATA = "prune it by a method that needs no data, such as magnitude"

LAST_PART = 2
"""The value projection of packed attention, the last to be seen."""


def unseen_reason(layer: Layer) -> str | None:
    """Why calibration cannot observe the inputs of a layer's weight; None if it can."""
    module = layer.module
    if layer.layout.kind in EXPERTS:
        return None
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return (
            f"a recurrent layer multiplies by its weights inside of one call, which shows calibration no inputs; {WITHOUT_DATA}"
        )
    if layer.layout.kind is LayoutKind.CONV_TRANSPOSED:
        return f"calibration does not unfold the inputs of transposed convolutions; {WITHOUT_DATA}"
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
        return None
    if layer.parameter == "weight" and layer.layout.kind is LayoutKind.TRANSPOSED and type(module).__name__ == "Conv1D":
        return None
    return (
        f"how {type(module).__name__} uses its parameter is not known, so that calibration cannot see its inputs; {WITHOUT_DATA}"
    )


def unreached_reason(layer: Layer) -> str:
    """Why calibration has no inputs of a layer."""
    if (reason := unseen_reason(layer)) is not None:
        return reason
    if layer.layout.kind in EXPERTS:
        return (
            "calibration saw no product of these experts: no batch reached them, or their module is not called itself or does "
            f"not multiply by views of the parameter; {WITHOUT_DATA}"
        )
    return "no calibration batch reached this layer"


def none_reached(layers: Sequence[Layer]) -> str:
    """Why calibration has no inputs of any of these layers."""
    reasons = {unseen_reason(layer) for layer in layers}
    if None not in reasons:
        why = "; ".join(sorted(map(str, reasons)))
        return f"calibration can observe none of these layers, such as {layers[0].name}: {why}"
    return (
        f"no calibration batch reached any of the {len(layers)} layers, such as {layers[0].name}; check that the batches run "
        "this part of the model"
    )


class EnoughSeen(Exception):
    """Raised to stop a forward pass once all requested layers were seen."""


def call_model(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None, index: int = 0) -> Any:
    """Run the model on one batch: ``forward(model, batch)``, or a mapping by keyword, a tuple or list by position, else as one.

    The model gets a copy: one that works on its inputs in place would see other data in each pass. Compiled modules run
    uncompiled, since compiled code has the hooks of an earlier run.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    ways = (
        "Batches are passed as model(**batch), model(*batch) or model(batch); pass forward=lambda model, batch: ... for anything "
        "else, such as (inputs, labels) pairs"
    )
    forget_casts()
    with (
        batch_error_context(batch, index, f"the model {type(model).__name__}", ways),
        _without_cache(model),
        torch.compiler.set_stance("force_eager"),
    ):
        batch = _copied(batch)
        if forward is not None:
            return forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch)
        return model(batch)


def _copied(batch: Any) -> Any:
    """A batch with tensors of its own. Those that are one tensor stay one, since layers with the same input share statistics."""
    twins: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in twins:
                twins[id(leaf)] = leaf.detach().clone()
            return twins[id(leaf)]
        if isinstance(leaf, MutableMapping):  # a tokenizer's output
            twin = copy.copy(leaf)
            for key, value in leaf.items():
                twin[key] = pytree.tree_map(copied, value)
            return twin
        return leaf

    return pytree.tree_map(copied, batch)


def forget_casts() -> None:
    """Forget autocast's casts of weights: inside a caller's autocast they would outlive a change of the weights."""
    torch.clear_autocast_cache()


@contextmanager
def batch_error_context(batch: Any, index: int, taker: str, remedy: str = "") -> Iterator[None]:
    """Turn any error inside into one that names the batch and `taker`: a model may raise anything.

    Raises:
        CalibrationError: something went wrong.
    """
    try:
        yield
    except (CalibrationError, EnoughSeen, ImportError, MemoryError):
        # These have clear messages and are not caused by the batch.
        raise
    except (Exception, SystemExit) as error:
        if ends_the_process(error):
            raise
        described = {key: _describe(value) for key, value in batch.items()} if isinstance(batch, Mapping) else _describe(batch)
        problem = f"calibration batch {index} ({described}) does not fit {taker}: {error_in_one_line(error)}"
        raise CalibrationError(f"{problem}. {remedy}" if remedy else problem) from error


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Disable a transformers model's key-value cache: blocks that run again would find their own tokens in it."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        yield
        return
    assert config is not None
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(_describe(one) for one in value[:4])}"
    return type(value).__name__


@contextmanager
def observed(model: nn.Module, layers: Sequence[Layer], seen: Seen) -> Iterator[None]:
    """While open, `seen` is called at every use of one of the layers, in the order of execution."""
    handles = []
    attention_of_projection = {
        id(module.out_proj): module for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }
    # The fused attention path calls no submodule and shows no hook anything.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        stacks: dict[int, list[Layer]] = {}
        for layer in layers:
            if layer.layout.kind in EXPERTS:
                stacks.setdefault(id(layer.module), []).append(layer)
            elif isinstance(layer.module, nn.MultiheadAttention):
                hook = _attention_hook(layer, seen)
                handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
            elif id(layer.module) in attention_of_projection:
                attention = attention_of_projection[id(layer.module)]
                handles.append(attention.register_forward_pre_hook(_projection_hook(layer, seen), with_kwargs=True))
            elif unseen_reason(layer) is None:
                handles.append(layer.module.register_forward_pre_hook(_input_hook(layer, seen), with_kwargs=True))
        for own in stacks.values():
            handles.append(own[0].module.register_forward_pre_hook(experts_hook(own, seen), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _input_hook(layer: Layer, seen: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, BUSY, False):
            return
        inputs = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if isinstance(inputs, Tensor):
            seen(layer, inputs, None)

    return hook


def _attention_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    return named["query"], named["key"], named["value"]


def _attention_hook(layer: Layer, seen: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, BUSY, False):
            return
        inputs = _attention_arguments(args, kwargs)
        separate = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}.get(layer.parameter)
        if separate is not None:
            seen(layer, inputs[separate], None)
        elif inputs[0] is inputs[1] is inputs[2]:
            seen(layer, inputs[0], None)
        else:
            for part, one in enumerate(inputs):
                seen(layer, one, part)

    return hook


def _projection_hook(layer: Layer, seen: Seen) -> Callable[..., None]:
    """Packed attention multiplies by its output projection without calling it: with an identity there, it returns the input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, BUSY, False):
            return
        assert isinstance(module, nn.MultiheadAttention)
        weight = module.out_proj.weight
        identity = {"out_proj.weight": torch.eye(weight.shape[0], device=weight.device, dtype=weight.dtype)}
        if module.out_proj.bias is not None:
            identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        object.__setattr__(module, BUSY, True)
        try:
            heads, _ = torch.func.functional_call(module, identity, args, kwargs)
        finally:
            object.__delattr__(module, BUSY)
        seen(layer, heads, None)

    return hook
