"""The kind of a parameter: its layout, or why it cannot be pruned, or why it stays dense unless included by name.

`modules.py` and `files.py` turn evidence from modules and from stored tensors into a `Kind`, and `why_dense` decides for both.
The caller can give the layout as text; see `parse_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bisparse.static_mask import static_masks
from bisparse.tiles import DIMENSIONS, Layout, LayoutKind
from bisparse.wrappers import check_module

__all__ = [
    "DEPTHWISE",
    "Kind",
    "Skipped",
    "check_unheld",
    "computed_reason",
    "dtype_reason",
    "held_reason",
    "parse_layout",
    "parse_layouts",
    "why_dense",
]

CHANGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be scored, masked and fitted; torch lacks some operations for others, such as float8."""
DEPTHWISE = "depthwise convolution, or one that reads a single channel: one input per filter, no reduction to make sparse"

EXPECTED = (
    f"expected one of {', '.join(kind for kind in LayoutKind if kind is not LayoutKind.PACKED)}, groups:32 (a convolution's "
    "groups), parts:3 or parts:q,k,v (equal parts) or parts:4096,1024,1024 (outputs per part)"
)


@dataclass(frozen=True)
class Skipped:
    """A layer left dense, with the reason."""

    name: str
    reason: str
    undecided: bool = False
    """Whether it may be a layer that can be pruned, but its layout is not known."""


@dataclass(frozen=True)
class Kind:
    """What a parameter is to pruning: how it stores its matrices, or why it is left dense."""

    layout: Layout | None = None
    """The layout; None if the evidence is insufficient, as described by `uncertain`."""
    refused: str = ""
    """Why it can never be pruned; overrides the caller's choice."""
    uncertain: str = ""
    """What is not known about it; resolved by a layout from the caller."""
    default: str = ""
    """Why it stays dense unless the caller includes it by name."""


def why_dense(kind: Kind, *, included: bool | None, excluded: bool) -> str | None:
    """Why a parameter stays dense; None if it is pruned.

    Args:
        included: whether the caller's `include` matches it; None without an `include`.
        excluded: whether the caller's `exclude` matches it.
    """
    if kind.refused:
        return kind.refused
    if excluded:
        return "excluded by the caller"
    if included is False:
        return "not among the layers asked for"
    if kind.default and not included:
        return kind.default
    return kind.uncertain or None


def parse_layouts(layouts: Mapping[str, str | Layout] | None) -> dict[str, str | Layout]:
    """Check the argument ``layouts=`` of `prune_` and others, as far as possible without the weights, and return it as a dict.

    Args:
        layouts: by a layer's name, glob or ``re:`` pattern, how it stores its matrices: a `Layout` or its name, such as "linear".

    Raises:
        ValueError: no mapping, or a text that is not a layout.
    """
    if layouts is not None and not isinstance(layouts, Mapping):
        raise ValueError(f"layouts={layouts!r:.60}: expected a mapping from layer names or globs to layouts")
    for one in (layouts or {}).values():
        if isinstance(one, str):
            _parse(one)
        elif not isinstance(one, Layout):
            raise ValueError(f"{one!r} is not a layout: {EXPECTED}")
    return dict(layouts or {})


def parse_layout(text: str | Layout, shape: tuple[int, ...], name: str) -> Layout:
    """Parse a caller's layout for a weight of this shape.

    ``"linear"``, ``"transposed"``, ``"conv"``, ``"conv-last"``, ``"conv-transposed"``, ``"experts"``, ``"experts-transposed"``;
    ``"groups:32"`` is a convolution of 32 groups; ``"parts:3"`` and ``"parts:q,k,v"`` are 3 equal projections stacked along the
    outputs, and ``"parts:4096,1024,1024"`` are projections with these numbers of outputs.

    Raises:
        ValueError: not a layout, or one that does not fit the shape; names the layer.
    """
    layout, outputs = (text, None) if isinstance(text, Layout) else _parse(text)
    if len(shape) not in DIMENSIONS[layout.kind]:
        raise ValueError(
            f"{name}: a weight of shape {shape} cannot have the layout {str(text)!r}, which needs "
            f"{' or '.join(map(str, DIMENSIONS[layout.kind]))} dimensions"
        )
    if outputs is not None and outputs != shape[0]:
        raise ValueError(
            f"{name}: the parts of {str(text)!r} have {outputs} outputs in total, which does not fit a weight of shape {shape}"
        )
    if shape[0] % (layout.groups if layout.is_convolution else layout.parts):
        raise ValueError(f"{name}: {str(text)!r} does not divide the first side of its weight of shape {shape}")
    return layout


def _parse(text: str) -> tuple[Layout, int | None]:
    """A layout, and the total outputs of its parts if the text gives them."""
    what, colon, detail = text.strip().partition(":")
    if not colon:
        if what in (*LayoutKind,) and what != LayoutKind.PACKED:
            return Layout(LayoutKind(what)), None
    elif what == "groups" and detail.isdecimal() and int(detail) > 0:
        return Layout(LayoutKind.CONV, groups=int(detail)), None
    elif what == "parts":
        parts = [part.strip() for part in detail.split(",")]
        numbers = [int(part) for part in parts if part.isdecimal()]
        if len(numbers) == len(parts) == 1 and numbers[0] > 0:
            return Layout(LayoutKind.PACKED, parts=numbers[0]), None
        if len(numbers) == len(parts) and min(numbers) > 0:
            # The greatest common divisor, so that no tile of one projection extends into the next.
            return Layout(LayoutKind.PACKED, parts=sum(numbers) // math.gcd(*numbers)), sum(numbers)
        if not numbers and all(parts) and len(parts) > 1:
            return Layout(LayoutKind.PACKED, parts=len(parts)), None
    raise ValueError(f"{text!r} is not a layout: {EXPECTED}")


def computed_reason(module: nn.Module, parameter: str) -> str | None:
    """Why values written to a module's weight would be lost; None if the weight is the parameter itself."""
    if not hasattr(module, parameter):
        raise ValueError(f"{type(module).__name__} has no parameter {parameter!r:.60}")
    if getattr(module, parameter) is module._parameters.get(parameter):
        return None
    return f"its {parameter} is computed by {type(module).__name__} at each access, so values written to it are lost"


def held_reason(module: nn.Module, parameter: str) -> str | None:
    """Why the mask of a weight cannot be changed: it is stored by sparse training or an accelerated layer.

    None if no mask is stored separately from the weight.
    """
    for name, held in static_masks(module):
        if name == parameter:
            return (
                f"it is in sparse training with a fixed mask of {held.pattern} (sparsify_, mode='static'), which would undo "
                "any other mask: call finalize_(model) first"
            )
    if hasattr(module, "dense_weight") and hasattr(module, "mask_changed"):
        return (
            "it is accelerated, and the positions of its kept weights are stored separately: call finalize_(model) first, and "
            "accelerate_ afterwards"
        )
    if parametrize.is_parametrized(module, parameter):
        chain = module.parametrizations[parameter]  # type: ignore[index]
        if isinstance(chain, nn.ModuleList) and any(hasattr(one, "lora_A") for one in chain):
            return "it has an adapter under its mask: call merge_lora_ first"
        if isinstance(chain, nn.ModuleList) and any(hasattr(one, "pattern") for one in chain):
            return "it is in dynamic sparse training: call finalize_(model) first"
    return None


def check_unheld(model: nn.Module, doing: str) -> None:
    """Raise ValueError if any layer's mask is stored separately from its weight, before a function that changes weights."""
    check_module(model)
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in static_masks(module)] or ["weight"]
        for parameter in [*own, *(module.parametrizations if parametrize.is_parametrized(module) else ())]:
            if (reason := held_reason(module, parameter)) is not None:
                raise ValueError(f"{doing} would change {name or 'the layer'}, but {reason}")


def dtype_reason(weight: Tensor) -> str | None:
    """Why a weight of this dtype cannot be made sparse in place; None if it can."""
    if weight.dtype in CHANGEABLE:
        return None
    name = str(weight.dtype).removeprefix("torch.")
    return f"its weight is {name}, which cannot be made sparse in place: convert the model to bfloat16, or exclude the layer"
