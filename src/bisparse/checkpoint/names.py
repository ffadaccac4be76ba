"""Weights under the names and shapes that their source has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from bisparse.checkpoint.reader import Source
from bisparse.errors import CheckpointError

__all__ = ["named_as_in", "some_of"]

NAMES_SHOWN = 4


def named_as_in(source: Source, weights: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights under exactly the names that the source has; further names of tied weights are left out.

    Args:
        keep: names that stay in any case.

    Raises:
        CheckpointError: the weights lack a tensor of the source, have one more, or one of another shape.
    """
    tensors = source.tensors
    present = {_place(weights[name]) for name in tensors if name in weights}
    fitting = {name: value for name, value in weights.items() if name in tensors or name in keep or _place(value) not in present}
    lost = [name for name in tensors if name not in weights]
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
            "load it with transformers, write it to another folder with save_pretrained and start from that, or name a function "
            "of yours, module:function, that returns the model",
        )
    return fitting


def some_of(names: Collection[str]) -> str:
    """The first few names, and whether there are more."""
    shown = sorted(names)[:NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _place(weight: Tensor) -> tuple[int, tuple[int, ...]]:
    """Equal for tied weights."""
    return weight.data_ptr(), tuple(weight.shape)
