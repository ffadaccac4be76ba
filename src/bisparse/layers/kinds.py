"""What a parameter is: its layout, or why it is none that can be pruned, or why it stays dense unless it is asked for.

`modules.py` and `files.py` collect the evidence, from modules and from stored tensors; what they make of it is a `Kind`, and one
function, `why_dense`, decides for both. The layout can be given by the caller as text; see `parse_layout`.
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
"""Dtypes of weights that can be scored, masked and fitted; of others, such as float8, torch lacks some of the operations."""
DEPTHWISE = "depthwise convolution, or one that reads a single channel: one input per filter, no reduction to make sparse"

EXPECTED = (
    f"expected one of {', '.join(kind for kind in LayoutKind if kind is not LayoutKind.PACKED)}, groups:32 (a convolution's "
    "groups), parts:3 or parts:q,k,v (equal parts) or parts:4096,1024,1024 (outputs per part)"
)


@dataclass(frozen=True)
class Skipped:
    """A layer left dense, and why."""

    name: str
    reason: str
    undecided: bool = False
    """Whether it may well be a layer that a pattern applies to, and only its layout is not known."""


@dataclass(frozen=True)
class Kind:
    """What a parameter is, by the evidence there is."""

    layout: Layout | None = None
    """None where the evidence does not tell: then `uncertain` says so."""
    refused: str = ""
    """Why it cannot be pruned, whatever the caller asks for."""
    uncertain: str = ""
    """What is not known of it; a layout given by the caller settles it."""
    default: str = ""
    """Why it stays dense unless the caller includes it by name."""


def why_dense(kind: Kind, *, included: bool | None, excluded: bool) -> str | None:
    """Why a parameter stays dense; None where it is pruned.

    Args:
        included: whether the caller's `include` names it; None where there is no `include`.
        excluded: whether the caller's `exclude` names it.
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
    """The layouts that a caller gives by layer, checked as far as they can be without the weights.

    Raises:
        ValueError: a text that is no layout.
    """
    if layouts is not None and not isinstance(layouts, Mapping):
        raise ValueError(f"layouts={layouts!r:.60}: expected a mapping from layer names or globs to layouts")
    for one in (layouts or {}).values():
        if isinstance(one, str):
            _parse(one)
        elif not isinstance(one, Layout):
            raise ValueError(f"{one!r} is no layout: {EXPECTED}")
    return dict(layouts or {})


def parse_layout(text: str | Layout, shape: tuple[int, ...], name: str) -> Layout:
    """The layout that a caller gave for a weight of this shape.

    ``"linear"``, ``"transposed"``, ``"conv"``, ``"conv-last"``, ``"conv-transposed"``, ``"experts"``, ``"experts-transposed"``;
    ``"groups:32"`` is a convolution of 32 groups; ``"parts:3"`` and ``"parts:q,k,v"`` are 3 equal projections stacked along the
    outputs, ``"parts:4096,1024,1024"`` projections of these outputs.

    Raises:
        ValueError: no layout, or one that the shape does not have; names the layer.
    """
    layout, outputs = (text, None) if isinstance(text, Layout) else _parse(text)
    if len(shape) not in DIMENSIONS[layout.kind]:
        raise ValueError(
            f"{name}: a weight of shape {shape} cannot have the layout {str(text)!r}, which needs "
            f"{' or '.join(map(str, DIMENSIONS[layout.kind]))} dimensions"
        )
    if outputs is not None and outputs != shape[0]:
        raise ValueError(
            f"{name}: the parts of {str(text)!r} have {outputs} outputs together, its weight of shape {shape} has others"
        )
    if shape[0] % (layout.groups if layout.is_convolution else layout.parts):
        raise ValueError(f"{name}: {str(text)!r} does not divide the first side of its weight of shape {shape}")
    return layout


def _parse(text: str) -> tuple[Layout, int | None]:
    """A layout, and the outputs of all parts together where the text says them."""
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
            # Equal parts as large as all of them allow: no tile of one projection reaches into the next.
            return Layout(LayoutKind.PACKED, parts=sum(numbers) // math.gcd(*numbers)), sum(numbers)
        if not numbers and all(parts) and len(parts) > 1:
            return Layout(LayoutKind.PACKED, parts=len(parts)), None
    raise ValueError(f"{text!r} is no layout: {EXPECTED}")


def computed_reason(module: nn.Module, parameter: str) -> str | None:
    """Why what is written to a module's weight would be lost; None where the weight is the parameter itself."""
    if not hasattr(module, parameter):
        raise ValueError(f"{type(module).__name__} has no parameter {parameter!r:.60}")
    if getattr(module, parameter) is module._parameters.get(parameter):
        return None
    return f"its {parameter} is computed by {type(module).__name__} at each access, so that what is written to it is lost"


def held_reason(module: nn.Module, parameter: str) -> str | None:
    """Why no other mask may be written to a weight: sparse training or an accelerated layer holds its present one.

    None where nothing holds a mask apart from the weight itself.
    """
    for name, held in static_masks(module):
        if name == parameter:
            return (
                f"it is in sparse training with the fixed mask of {held.pattern} (sparsify_, mode='static'), which would undo "
                "any other mask: call finalize_(model) first"
            )
    if hasattr(module, "dense_weight") and hasattr(module, "mask_changed"):
        return (
            "it is accelerated, and the positions of its kept weights are stored apart: call finalize_(model) first, and "
            "accelerate_ afterwards"
        )
    if parametrize.is_parametrized(module, parameter):
        chain = module.parametrizations[parameter]  # type: ignore[index]
        if isinstance(chain, nn.ModuleList) and any(hasattr(one, "pattern") for one in chain):
            return "it is in dynamic sparse training: call finalize_(model) first"
    return None


def check_unheld(model: nn.Module, doing: str) -> None:
    """Raise ValueError if a layer's mask is held apart from its weight, where something else would rewrite the weights."""
    check_module(model)
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in static_masks(module)] or ["weight"]
        for parameter in [*own, *(module.parametrizations if parametrize.is_parametrized(module) else ())]:
            if (reason := held_reason(module, parameter)) is not None:
                raise ValueError(f"{doing} would change {name or 'the layer'}, but {reason}")


def dtype_reason(weight: Tensor) -> str | None:
    """Why a weight of this dtype cannot be made sparse in place; None where it can."""
    if weight.dtype in CHANGEABLE:
        return None
    name = str(weight.dtype).removeprefix("torch.")
    return f"its weight is {name}, which cannot be made sparse in place: convert the model to bfloat16, or exclude the layer"
