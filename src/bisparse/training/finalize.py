"""`finalize_`: ends sparse training and turns a sparsified model into a plain one."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from bisparse.layers import memory_of
from bisparse.rollback import Rollback
from bisparse.static_mask import MASK_SUFFIX, static_masks
from bisparse.training.forward_hook import remove_hooks
from bisparse.training.layer import Accelerated, local, part_of
from bisparse.training.mask_check import remove_mask_checks
from bisparse.training.mvue import MVUELinear
from bisparse.training.parametrizations import masked_parameters, sample_of, trained_parameter
from bisparse.training.shared_classes import separate_class
from bisparse.training.sparsity import live_sparsities
from bisparse.verification import verify
from bisparse.wrappers import plain_names, unwrapped_model

__all__ = ["finalize_", "plain_state_dict"]


@torch.no_grad()
def finalize_(model: nn.Module) -> nn.Module:
    """Turn a sparsified or accelerated model into a plain one: weights contain their zeros, and wrappers and hooks are removed.

    Returns the model. Its `Sparsity` ends: it detaches from the optimizers, and further training is dense. Parameters stay the
    same objects, so optimizers keep them, except weights that were packed: these are new parameters, which require gradients as
    they did before `accelerate_`. The masks are checked against their patterns first.
    A layer whose module was replaced after `sparsify_` is not changed, and a warning names it. Parametrizations that were added
    after `sparsify_`, such as a spectral norm, are kept. An average of the weights (a copy of the model, such as
    `AveragedModel`) uses the masks of the model that it averages. A model that is plain already, as after `accelerate_` has
    converted nothing, is returned with a warning. On an error the model is unchanged.

    Raises:
        ValueError: weights are sharded over ranks (use `plain_state_dict` instead).
        PatternError: a mask breaks its pattern, for example because masks were averaged.
    """
    with Rollback(unwrapped_model(model)) as rollback:
        return _finalize(model, rollback)


def _finalize(given: nn.Module, rollback: Rollback) -> nn.Module:
    model = unwrapped_model(given)
    own_runs = [sparsity for sparsity in live_sparsities() if sparsity.called[0] is model]
    for sparsity in own_runs:
        sparsity.notice_replaced()
    dynamic = masked_parameters(model)
    accelerated = [module for module in model.modules() if isinstance(module, Accelerated)]
    static = [(module, parameter, held) for module in model.modules() for parameter, held in static_masks(module)]
    if not dynamic and not static and not accelerated and not own_runs:
        warnings.warn(
            "the model is plain already, and finalize_ changed nothing: it is not sparsified (finalize_ takes the model that "
            "sparsify_ was called with, or a copy of it), and no layer of it is accelerated (its report says why); "
            "merge_lora_ ends adapters",
            stacklevel=4,  # past no_grad
        )
        return given
    weights = [(name, trained_parameter(module, parameter)) for name, module, parameter, _ in dynamic]
    own_form = {id(layer) for layer in accelerated}
    for prefix, module in model.named_modules():
        if id(module) in own_form:
            weights += module.named_parameters(prefix, recurse=False)
    for name, weight in weights:
        if isinstance(weight, DTensor):
            raise ValueError(
                f"{name} is sharded over ranks: save plain_state_dict(model), whose keys and zeros are the finalized model's, or "
                "gather the state into an unsharded copy and finalize that"
            )
    for name, module, parameter, own in dynamic:
        own.follow()
        if not own.dense:
            verify(getattr(module, parameter), own.pattern, layout=own.layout, name=name).check()
    ending = [(sparsity, sparsity.facts_within(model)) for sparsity in live_sparsities()]
    for layer in accelerated:
        # One that trains a fixed mask sets what was written off it to zero; its products never read that.
        weight = layer._parameters.get("weight")
        if weight is not None and not torch.equal(local(weight), local(layer.dense_weight())):
            rollback.touch(weight)
        layer.restore_()
    now = ((own.start, sample_of(trained_parameter(module, parameter))) for _, module, parameter, own in dynamic)
    if any(start is not None and not torch.equal(start.to(sample), sample) for start, sample in now):
        warnings.warn(
            "the weights were trained, but the masks were never refreshed, since no optimizer step was counted: call "
            "Sparsity.attach(optimizer) before the first step, or Sparsity.refresh() in a loop of your own",
            stacklevel=4,  # past no_grad
        )
    elif dense := [name for name, _, _, own in dynamic if own.state.warm_up]:
        warnings.warn(
            f"the run ends in its initial dense phase (Schedule.dense_until): {len(dense)} layers stay dense, the first "
            f"{dense[0]!r}. prune_(model, pattern) makes them sparse",
            stacklevel=4,  # past no_grad
        )
    masked = {id(own): own(trained_parameter(module, parameter)).clone() for _, module, parameter, own in dynamic}
    for _, module, parameter, own in dynamic:
        # Copied into the dense weight, whose storage may be shared; tied weights are written twice, with the same values.
        weight = trained_parameter(module, parameter)
        rollback.touch(weight)
        weight.copy_(masked[id(own)])
        _remove(module, parameter, own)
    moved = False
    for module, parameter, held in static:
        weight = getattr(module, parameter)
        mask, weight = part_of(held.mask.to(weight.device), weight), local(weight)
        if bool((weight.masked_fill(mask, 0) != 0).any()):
            moved = True
            rollback.touch(weight)
            weight.masked_fill_(~mask, 0)
        delattr(module, f"{parameter}{MASK_SUFFIX}")
    if moved:
        warnings.warn(
            "pruned weights were no longer zero, as without Sparsity.attach(optimizer): they are set to zero again, "
            "which loses what they learned",
            stacklevel=4,  # past no_grad
        )
    for module in model.modules():
        MVUELinear.remove_(module)
        remove_hooks(module)
        remove_mask_checks(module)
    for sparsity, facts in ending:
        sparsity.end(facts)
    return given


def _remove(module: nn.Module, parameter: str, own: nn.Module) -> None:
    """Remove one parametrization; others of the same parameter stay."""
    chain: Any = module.parametrizations[parameter]  # type: ignore[index]
    if len(chain) > 1:
        del chain[next(index for index, one in enumerate(chain) if one is own)]
    else:
        separate_class(module)
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict that the finalized model would have, with its names, without changing the model.

    Sharded weights are gathered, so in a sharded run all ranks must call it.
    """
    model = unwrapped_model(model)
    plain = plain_names(model)
    state = {plain(name): _whole(value) for name, value in model.state_dict().items()}
    for full_name, module, parameter, own in masked_parameters(model, each_name=True):
        own.follow()
        name = plain(full_name)
        prefix = f"{name.removesuffix(parameter)}parametrizations.{parameter}"
        weight = own(state.pop(f"{prefix}.original"))
        others = {key: state.pop(key) for key in list(state) if key.startswith(f"{prefix}.")}
        chain: Any = module.parametrizations[parameter]  # type: ignore[index]
        kept = [str(index) for index, one in enumerate(chain) if one is not own]
        if not kept:
            state[name] = weight
            continue
        state[f"{prefix}.original"] = weight
        for number, index in enumerate(kept):
            inside = f"{prefix}.{index}."
            state |= {f"{prefix}.{number}.{key[len(inside) :]}": value for key, value in others.items() if key.startswith(inside)}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter, held in static_masks(module):
            key = plain(f"{name}.{parameter}" if name else parameter)
            weight = state.get(key)
            if not isinstance(weight, Tensor) or weight.is_meta:
                continue
            mask = held.mask.to(weight.device)
            if bool(weight.masked_fill(mask, 0).any()):  # something else has written to it
                zeroed, memory = weight.masked_fill(~mask, 0), memory_of(weight)
                tied = [one for one, value in state.items() if isinstance(value, Tensor) and memory_of(value) == memory]
                state |= dict.fromkeys(tied, zeroed)
    return state


def _whole(entry: Any) -> Any:
    """An entry of a state_dict, gathered; what `get_extra_state` returns need not be a tensor."""
    if isinstance(entry, DTensor):
        return entry.full_tensor()
    return entry.detach() if isinstance(entry, Tensor) else entry
