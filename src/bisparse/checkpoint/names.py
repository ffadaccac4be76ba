"""Names a model's weights as in its source, and checks that they match."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from bisparse.checkpoint.reader import Source
from bisparse.checkpoint.stored_tensor import StoredTensor
from bisparse.errors import CheckpointError
from bisparse.wrappers import plain_names

__all__ = ["check_tied", "named_as_in", "some_of", "unsaved_buffers"]

NAMES_SHOWN = 4


def named_as_in(
    source: Source, weights: Mapping[str, Tensor], keep: Collection[str] = (), unsaved: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights under exactly the names that the source has; further names of tied weights are left out.

    Args:
        keep: names that stay in any case.
        unsaved: buffers that the model has and does not save, by name; see `unsaved_buffers`. A tensor of the source by the name
            of one is kept as the source has it: older versions of a library saved more buffers than newer ones.

    Raises:
        CheckpointError: the weights lack a tensor of the source, have an additional one or one of another shape, or are tied
            although the source has different values.
    """
    tensors = source.tensors
    check_tied(source, weights)
    present = {_place(weights[name]) for name in tensors if name in weights}
    fitting = {name: value for name, value in weights.items() if name in tensors or name in keep or _place(value) not in present}
    old = {name for name, own in (unsaved or {}).items() if name in tensors and tensors[name].shape == tuple(own.shape)}
    fitting |= {name: tensors[name].read().view(tensors[name].shape) for name in tensors if name in old and name not in weights}
    lost = [name for name in tensors if name not in weights and name not in old]
    added = [name for name in fitting if name not in tensors and name not in keep]
    reshaped = [
        f"{name} {tensor.shape} as {tuple(weights[name].shape)}"
        for name, tensor in tensors.items()
        if name in weights and tuple(weights[name].shape) != tuple(tensor.shape)
    ]
    problems = {"lost": lost, "added": added, "written in another shape": reshaped}
    if said := [f"{len(names)} would be {how} ({some_of(names)})" for how, names in problems.items() if names]:
        raise CheckpointError(
            source.path,
            f"holds other tensors than the model built from it: {'; '.join(said)}",
            "name a function of yours, module:function, that returns the model: it is written under its own names, which "
            "from_pretrained reads, too. A copy by save_pretrained helps only if that writes the model's own names",
        )
    return fitting


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a model has and its state_dict leaves out, by the name that they would have there."""
    plain = plain_names(model)
    return {
        plain(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def check_tied(source: Source, weights: Mapping[str, Tensor]) -> None:
    """Check that weights that are tied in the model are equal in the source.

    Raises:
        CheckpointError: two tied weights differ in the source; names both.
    """
    tensors = source.tensors
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name in tensors:
        if name not in weights or not weights[name].numel() or weights[name].is_meta:
            continue
        other = tensors[first.setdefault(_place(weights[name]), name)]
        if other.name != name and not _equal(tensors[name], other):
            raise CheckpointError(
                tensors[name].path,
                f"has other values than {other.name}, to which the model ties it: only one of them would be used",
                "make them equal in the file, or set tie_word_embeddings to false in config.json if they are meant to differ",
                tensor=name,
            )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return one.size == other.size and bool((one.read().double() == other.read().double()).all())
    return all(mine == its for mine, its in zip(one.pieces(), other.pieces(), strict=True))


def some_of(names: Collection[str]) -> str:
    """The first few names, and whether there are more."""
    shown = sorted(names)[:NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _place(weight: Tensor) -> tuple[int, tuple[int, ...]]:
    """A key that is equal for tied weights."""
    return weight.data_ptr(), tuple(weight.shape)
