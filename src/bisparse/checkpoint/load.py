"""`load`: loads a checkpoint's weights into a plain model, in place, all or none."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bisparse.checkpoint.model_state import ModelState, is_extra, state_of, write_into
from bisparse.checkpoint.reader import Source, open_source
from bisparse.checkpoint.save_load import HasDenseWeight
from bisparse.checkpoint.sidecar import Sidecar, read_own_sidecar
from bisparse.checkpoint.statements import corrected
from bisparse.checkpoint.stored_tensor import StoredTensor, as_bytes
from bisparse.checkpoint.verify import verify_checkpoint
from bisparse.errors import CheckpointError
from bisparse.layers import check_unheld, not_written
from bisparse.rollback import Rollback
from bisparse.verification import PatternError
from bisparse.wrappers import check_module

__all__ = ["check_fit", "check_names", "checked_sidecar", "load", "warn_of_figures", "warn_of_others"]


@torch.no_grad()
def load(model: nn.Module, folder: str | Path, *, strict: bool = True, key: str | None = None) -> Sidecar | None:
    """Load a checkpoint's weights into a plain model, in place, after checking that they fit and obey their patterns.

    Args:
        folder: the output of `save` or `prune_checkpoint`, or any checkpoint that `prune_checkpoint` reads.
        strict: require that model and checkpoint have the same tensors, except for tied weights and views that the checkpoint's
            tensors fill. Otherwise tensors of other names are ignored on both sides, but at least one must match.
        key: where a torch file keeps the state dict, such as ``"model.state_dict"``; by default it is found.

    Returns:
        The sidecar; None if there is none. Figures that the weights contradict are corrected, or set to None if the weights do
        not determine them, with a note and a warning.

    Entries of the state_dict that are not memory of the model, such as copies that a hook makes, states of torchmetrics and
    tensors from `get_extra_state`, are loaded by the model's own `load_state_dict`. Entries that are no tensors are in no
    checkpoint: they stay as they are, with a warning.

    Raises:
        CheckpointError: names, shapes or dtypes that do not fit; values that the model's dtype cannot hold; tensors that differ
            although the model ties them, or that its `load_state_dict` does not take; a corrupt file, or one that changes while
            it is loaded. The model is unchanged.
        ValueError: the model is accelerated or in sparse training, whose masks would not be those of the weights, or has tensors
            on the meta device.
        PatternError: the weights break the pattern that the sidecar states; the model is unchanged.
    """
    check_module(model)
    if packed := [name for name, module in model.named_modules() if isinstance(module, HasDenseWeight)]:
        raise ValueError(
            f"the model is accelerated (at {packed[0]!r}): load into the plain model, then call accelerate_, or read the weights "
            "yourself and pass them to model.load_state_dict"
        )
    check_unheld(model, "loading weights")
    source = open_source(folder, key)
    state = state_of(model)
    if absent := [name for name, value in state.tensors.items() if value.is_meta]:
        raise ValueError(
            f"{absent[0]} is on the meta device and has no memory: call model.to_empty(device='cpu') first, and initialise "
            "what the checkpoint lacks"
        )
    check_fit(state, source)
    check_names(state, source, strict)
    sidecar, wrong = checked_sidecar(source, key)
    chosen = {name: tensor for name, tensor in source.tensors.items() if name in state.entries}
    for tensor in chosen.values():
        tensor.read(0, min(tensor.size, 1))  # raises for a dtype that torch lacks and for a wrong checksum
    by_model = {name: chosen[name] for name in state.with_siblings(chosen)}
    direct = {name: tensor for name, tensor in chosen.items() if name not in by_model}
    with Rollback(model if by_model else None) as rollback:
        places = {name: state.entries[name].detach() for name in direct}  # tensors of inference mode can be written to by a view
        # All tensors are saved before the first is written, since tensors of the model may share memory.
        rollback.touch(*places.values())
        loaded = state.load(by_model, rollback, strict) if by_model else {}
        for name, tensor in direct.items():
            write_into(tensor, places[name])
        _check_shared(places, direct)
        state.check(loaded, by_model)
        source.check_unchanged()
    warn_of_figures(source, wrong)
    warn_of_others(state, source)
    return sidecar


def checked_sidecar(source: Source, key: str | None) -> tuple[Sidecar | None, Sequence[str]]:
    """The sidecar, corrected by the weights, and what was wrong in it; None if there is none.

    Raises:
        CheckpointError: it is corrupt, or belongs to other weights.
        PatternError: the weights break a pattern that it states.
    """
    sidecar = read_own_sidecar(source.path, source.tensors)
    if sidecar is None:
        return None, ()
    checked = verify_checkpoint(source.path, key=key)
    if checked.violations:
        raise PatternError(f"{source.path}: {checked.message}; the masks were lost after pruning, prune again")
    return corrected(sidecar, source, checked.layers), checked.contradicted


def warn_of_figures(source: Source, wrong: Sequence[str]) -> None:
    """Warn of figures in the sidecar that the weights contradict, at the line that called `load`."""
    if wrong:
        warnings.warn(f"{source.path}: bisparse.json is wrong: {'; '.join(wrong)}", stacklevel=4)


def warn_of_others(state: ModelState, source: Source) -> None:
    """Warn of entries of the model's state_dict that no file of tensors has, at the line that called `load`."""
    if left := state.left(source.tensors):
        warnings.warn(
            f"{source.path}: {len(left)} entries of the model's state_dict are no tensors, so that they are not in the "
            f"checkpoint and stay as they were in the model: {left[:4]}",
            stacklevel=4,
        )


def check_fit(state: ModelState, source: Source) -> None:
    """Raise unless common tensors have equal shapes, and dtypes whose values the model's can represent.

    Extra state is not compared: its module decides what it takes.
    """
    held = state.tensors
    for name, tensor in source.tensors.items():
        if name not in held or is_extra(name):
            continue
        own = held[name]
        if tuple(own.shape) != tensor.shape:
            raise CheckpointError(
                tensor.path,
                f"has shape {tensor.shape}, the model's is {tuple(own.shape)}",
                "build the model of this checkpoint",
                tensor=name,
            )
        if not _keeps_values(tensor.torch_dtype, own.dtype):
            raise CheckpointError(
                tensor.path,
                f"is {tensor.dtype}, whose values the model's {own.dtype} does not have",
                "build the model in the dtype of the checkpoint",
                tensor=name,
            )


def check_names(state: ModelState, source: Source, strict: bool) -> None:
    """Raise unless the two have common names, or with `strict` the same names, except for tied weights and views."""
    tensors, own = source.tensors, state.tensors
    if own and not state.entries.keys() & tensors.keys():
        raise CheckpointError(
            source.path,
            f"has none of the model's tensors: its names begin with {list(tensors)[:2]}, the model's with {list(own)[:2]}"
            + _prefix_hint(own, tensors),
            "build the model of this checkpoint, or rename its tensors; nothing was loaded",
        )
    if not strict:
        return
    missing = not_written(own, tensors.keys())
    unexpected = [name for name in tensors if name not in state.entries]
    if missing or unexpected:
        raise CheckpointError(
            source.path,
            f"lacks {len(missing)} of the model's tensors {missing[:4]} and has {len(unexpected)} others {unexpected[:4]}",
            "build the plain model of this checkpoint (before sparsify_ or accelerate_), or pass strict=False",
        )


def _check_shared(state: Mapping[str, Tensor], chosen: Mapping[str, StoredTensor]) -> None:
    """Raise if tensors that share memory in the model differ in the file, since the last one would overwrite the others."""
    places: dict[int, list[str]] = defaultdict(list)
    for name in chosen:
        if state[name].numel():
            places[state[name].untyped_storage().data_ptr()].append(name)
    for names in places.values():
        for name in names if len(names) > 1 else ():
            own = state[name].cpu()
            stored = chosen[name].read().view(own.shape).to(own.dtype)
            if as_bytes(stored) != as_bytes(own):
                others = ", ".join(other for other in names if other != name)
                raise CheckpointError(
                    chosen[name].path,
                    f"has other values than {others}, to which the model ties it: the model has one place for both",
                    "build a model in which they are not tied, or make them equal in the file",
                    tensor=name,
                )


def _keeps_values(stored: torch.dtype | None, own: torch.dtype) -> bool:
    """Whether a dtype can represent the values of another, up to precision and range; integers cannot represent fractions.

    Masks of 0 and 1 count as bool. Dtypes that torch lacks are refused when they are read.
    """
    return stored is None or torch.can_cast(stored, own) or (own == torch.bool and stored in (torch.uint8, torch.int8))


def _prefix_hint(state: Mapping[str, Tensor], tensors: Mapping[str, StoredTensor]) -> str:
    """A hint on a prefix that one side's names have in addition, if that is the only difference."""
    for longer, shorter, whose in ((tensors, state, "the checkpoint's"), (state, tensors, "the model's")):
        for name in longer:
            for place in (i for i, letter in enumerate(name) if letter == "."):
                if name[place + 1 :] in shorter:
                    return f"; {whose} have the prefix {name[: place + 1]!r}"
    return ""
