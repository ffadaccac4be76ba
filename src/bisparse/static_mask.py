"""The mask of a static weight: an attribute of its module next to the parameter."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor, nn

from bisparse.kernels.masking.dispatch import CHANNELS_LAST
from bisparse.pattern import Structure

__all__ = ["MASK_SUFFIX", "StaticMask", "static_mask", "static_masks"]

MASK_SUFFIX = "_mask"
"""The mask of the static weight `NAME` is its module's attribute `NAME` + this suffix."""


@dataclass
class StaticMask:
    """The mask of a static weight, an attribute of its module next to the parameter.

    It is not a buffer, so state_dicts omit it and averaging of buffers does not change it.
    """

    mask: Bool[Tensor, "..."]
    pattern: Structure


def static_masks(module: nn.Module) -> list[tuple[str, StaticMask]]:
    """(parameter, mask) of each static weight of a module."""
    return [(name.removesuffix(MASK_SUFFIX), held) for name, held in vars(module).items() if isinstance(held, StaticMask)]


def static_mask(module: nn.Module, parameter: str) -> Bool[Tensor, "..."] | None:
    """The mask of a static weight, on its device and in its memory format; None for other weights."""
    held = vars(module).get(f"{parameter}{MASK_SUFFIX}")
    if not isinstance(held, StaticMask):
        return None
    weight = module._parameters.get(parameter)
    if weight is not None:
        if held.mask.device != weight.device:
            held.mask = held.mask.to(weight.device)
        if (last := CHANNELS_LAST.get(weight.ndim)) is not None and weight.is_contiguous(memory_format=last):
            held.mask = held.mask.contiguous(memory_format=last)  # operators on different formats are several times slower
    return held.mask
