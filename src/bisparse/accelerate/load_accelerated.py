"""`load_accelerated_`: loads a checkpoint into an empty model layer by layer, each packed before the next is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.accelerate.accelerate import (
    AcceleratedLayer,
    AccelerationReport,
    held_bytes,
    install,
    tied_parameters,
)
from bisparse.accelerate.advice import check_tokens
from bisparse.accelerate.eligibility import Plan, plan_layer
from bisparse.arguments import check_flag
from bisparse.checkpoint.load import check_fit, check_names, checked_sidecar, warn_of_figures, warn_of_others
from bisparse.checkpoint.model_state import ModelState, state_of, write_into
from bisparse.checkpoint.reader import Source, open_source
from bisparse.checkpoint.stored_tensor import StoredTensor, as_bytes
from bisparse.errors import CheckpointError
from bisparse.layers import Filter, Layer, Skipped, check_unheld, find_layers
from bisparse.rollback import Rollback
from bisparse.tiles import Layout
from bisparse.training.layer import Accelerated
from bisparse.wrappers import check_module

__all__ = ["load_accelerated_"]


@torch.inference_mode(False)
@torch.no_grad()
def load_accelerated_(
    model: nn.Module,
    folder: str | Path,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    tokens: int = 1,
    int8: bool = False,
    key: str | None = None,
) -> AccelerationReport:
    """Load a checkpoint into an empty model on the CPU, each layer packed as soon as it is read. Returns `accelerate_`'s report.

    Equivalent to `load` and `accelerate_`, but of the layers that are packed only one is in memory in dense form at a time. The
    model is put into evaluation mode. Build it with parameters on the meta device and real buffers::

        with accelerate.init_empty_weights():  # Hugging Face's package accelerate
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        bisparse.accelerate.load_accelerated_(model, "pruned")

    Args:
        model: its parameters are replaced; their dtypes are kept.
        folder: the output of `save` or `prune_checkpoint`, or any checkpoint that `load` reads.
        include, exclude, layouts: which layers are packed, as for `accelerate_`.
        tokens: the number of input rows for which layers are timed.
        int8: round weights to int8, as for `accelerate_`.
        key: where a torch file keeps the state dict; by default it is found.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of the model, or has others; shapes or dtypes do not fit; a corrupt file,
            or one that changes while it is loaded. The model is unchanged.
        PatternError: the weights break the pattern that the sidecar states; the model is unchanged.
        ValueError: the model is accelerated already, in sparse training, or not on the CPU or the meta device; its state_dict
            has copies of its parameters; tokens below 1.
    """
    check_module(model)
    check_tokens(tokens)
    check_flag("int8", int8)
    for name, module in model.named_modules():
        if isinstance(module, Accelerated):
            raise ValueError(f"{name or 'the model'} is accelerated already: build a new model to load into")
    check_unheld(model, "loading weights")
    source = open_source(folder, key)
    state = state_of(model)
    if elsewhere := [name for name, value in state.tensors.items() if value.device.type not in ("cpu", "meta")]:
        raise ValueError(f"{elsewhere[0]} is on {state.entries[elsewhere[0]].device}: build the model on the meta device")
    _check_copies(model, state)
    check_fit(state, source)
    check_names(state, source, strict=True)
    _check_buffers(model, state)
    stored = _stored(state, source)
    _, wrong = checked_sidecar(source, key)
    layers, left = find_layers(model, include, exclude, layouts=layouts)
    by_parameter = {id(layer.module._parameters.get(layer.parameter)): layer for layer in layers}
    tied, dense = tied_parameters(model), 0
    done: list[AcceleratedLayer] = []
    made = {name: tensor for name, tensor in source.tensors.items() if name in state.made}
    with Rollback(model) as rollback:
        if made:
            state.check(state.load(made, rollback), made)
        model.eval()
        for old, tensor in stored:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            write_into(tensor, new)
            placed = _put(model, old, new)
            dense += new.nbytes
            layer = by_parameter.get(id(old))
            if layer is not None:
                outcome = _packed(layer, {id(placed)} if id(old) in tied else set(), tokens, int8)
                if isinstance(outcome, AcceleratedLayer):
                    done.append(outcome)
                else:
                    left.append(outcome)
        source.check_unchanged()
    warn_of_figures(source, wrong)
    warn_of_others(state, source)
    return AccelerationReport(tuple(done), tuple(left), dense, held_bytes(model))


def _check_copies(model: nn.Module, state: ModelState) -> None:
    """Raise for parameters and buffers whose entry in the state_dict is a copy, so that what it is a copy of is not known."""
    held = {
        name
        for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, _ in tensors
    }
    if copies := [name for name in state.entries if name in state.made and name in held]:
        raise ValueError(
            f"{copies[0]}: the model's state_dict has a copy of it, made by a hook or by its module, so that it cannot be "
            "replaced on its own: use load, and then accelerate_"
        )


def _stored(state: ModelState, source: Source) -> list[tuple[Tensor, StoredTensor]]:
    """Each parameter and buffer of the model, tied ones once, with the stored tensor for it.

    Raises:
        CheckpointError: tensors that the model ties differ in the file.
    """
    found: dict[int, tuple[Tensor, StoredTensor]] = {}
    tensors = source.tensors
    for name in (one for one in state.entries if one in tensors and one not in state.made):
        tensor, entry = tensors[name], state.entries[name]
        own, first = found.setdefault(id(entry), (entry, tensor))
        if first is not tensor and as_bytes(first.read().to(own.dtype)) != as_bytes(tensor.read().to(own.dtype)):
            raise CheckpointError(
                tensor.path,
                f"has other values than {first.name}, to which the model ties it: the model has one place for both",
                "build a model in which they are not tied, or make them equal in the file",
                tensor=name,
            )
    return list(found.values())


def _check_buffers(model: nn.Module, state: ModelState) -> None:
    """Raise for buffers on the meta device that no checkpoint has, such as a table of rotary positions."""
    saved = {id(value) for value in state.entries.values()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in saved:
            raise ValueError(
                f"the buffer {name} is on the meta device, and is not part of checkpoints: build the model under "
                "accelerate.init_empty_weights(), which computes buffers, or with to_empty and an initialisation of your own"
            )


def _put(model: nn.Module, old: Tensor, new: Tensor) -> Tensor:
    """Replace a parameter or buffer by new values wherever the model holds it; the new object."""
    placed = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for held in holders:
            for name, value in held.items():
                if value is old:
                    held[name] = placed
    return placed


def _packed(layer: Layer, tied: set[int], tokens: int, int8: bool) -> AcceleratedLayer | Skipped:
    """Pack one layer whose weight was just read, if that is faster."""
    plan = plan_layer(layer, "auto", None, tied, tokens, int8)
    outcome = install(layer, plan, search=False) if isinstance(plan, Plan) else plan
    return outcome if isinstance(outcome, AcceleratedLayer) else Skipped(layer.name, outcome.reason)
