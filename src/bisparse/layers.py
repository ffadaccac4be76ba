"""Which layers are prunable, which are chosen, and a reason for each one left dense."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bisparse.pattern import Pattern, Structure
from bisparse.tiles import Layout, LayoutKind, to_matrices

__all__ = [
    "Filter",
    "Layer",
    "Skipped",
    "computed_reason",
    "dtype_reason",
    "find_layers",
    "head_reason",
    "matches",
    "matrix_sides",
    "remainder_reason",
]

Filter = str | Callable[[str, nn.Module], bool] | Iterable[str]
"""A layer name, a glob, ``"re:..."``, a list of these, or a function of (name, module)."""

HEAD_NAMES = ("lm_head", "classifier", "head", "fc", "score", "embed_out", "output_layer", "logits")
"""A layer whose last name is one of these is an output head, in the naming habits of torch, timm and transformers."""

CHANGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be scored, masked and fitted; of others, such as float8, torch lacks some of the operations."""


@dataclass(frozen=True)
class Layer:
    """One prunable parameter of a model."""

    name: str
    """The parameter's full name without ``.weight``: ``encoder.0.linear``, ``attention.in_proj_weight``."""
    module: nn.Module
    parameter: str
    """The parameter's name inside its module."""
    layout: Layout

    @property
    def weight(self) -> Tensor:
        """The weight as the module uses it now."""
        weight = getattr(self.module, self.parameter)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def parameter_name(self) -> str:
        """The key of the parameter in the model's state_dict."""
        if self.parameter == "weight":
            return f"{self.name}.weight" if self.name else "weight"
        return self.name


@dataclass(frozen=True)
class Skipped:
    """A layer left dense, and why."""

    name: str
    reason: str


def matches(chosen: Filter, name: str, module: nn.Module) -> bool:
    """Whether a layer is meant by a filter: exact name, glob, ``re:`` pattern (searched from the start), or function."""
    if isinstance(chosen, str):
        if chosen.startswith("re:"):
            try:
                return re.match(chosen[3:], name) is not None
            except re.error as error:
                raise ValueError(f"{chosen!r} is no regular expression: {error}") from error
        return name == chosen or fnmatch.fnmatchcase(name, chosen)
    if callable(chosen):
        return bool(chosen(name, module))
    return any(matches(one, name, module) for one in chosen)


def head_reason(name: str) -> str | None:
    """Why a layer of this name stays dense by default, or None."""
    # Private attributes count as what they are: EfficientNet's head is `_fc`.
    last = name.removesuffix(".weight").rsplit(".", 1)[-1].lower().strip("_")
    if last in HEAD_NAMES:
        return f"output head (its name ends in '{last}'); include it by name to prune it"
    return None


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Layout | str]]:
    """Every weight that might be pruned, with its layout or the reason why its kind is not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield name, module, "weight", "embedding: looked up, not multiplied"
        elif isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            if module.in_proj_weight is not None:
                yield f"{prefix}in_proj_weight", module, "in_proj_weight", Layout(LayoutKind.PACKED, parts=3)
            else:
                for projection in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                    yield f"{prefix}{projection}", module, projection, Layout(LayoutKind.LINEAR)
        elif isinstance(module, nn.Linear):
            yield name, module, "weight", Layout(LayoutKind.LINEAR)
        elif isinstance(module, nn.RNNBase):
            yield name, module, "weight_ih_l0", f"recurrent layer ({type(module).__name__}): not supported"
        elif isinstance(module, nn.RNNCellBase):
            yield name, module, "weight_ih", f"recurrent layer ({type(module).__name__}): not supported"
        elif isinstance(module, nn.Bilinear):
            yield name, module, "weight", "bilinear layer: not supported"
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            yield name, module, "weight", "transposed convolution: not supported"
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if module.groups == module.in_channels and module.groups > 1:
                yield (
                    name,
                    module,
                    "weight",
                    "depthwise convolution: one input channel a filter, no reduction to make sparse",
                )
            else:
                yield name, module, "weight", Layout(LayoutKind.CONV, groups=module.groups)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight"):
            yield name, module, "weight", Layout(LayoutKind.TRANSPOSED)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and "expert" in name.rsplit(".", 1)[-1].lower():
                    yield f"{name}.{own}", module, own, Layout(LayoutKind.EXPERTS)


def find_layers(
    model: nn.Module,
    include: Filter | None = None,
    exclude: Filter | None = None,
    *,
    pattern: Structure | None = None,
    remainder: str = "pad",
) -> tuple[list[Layer], list[Skipped]]:
    """The layers of a model that a pattern applies to, and a reason for each one left dense.

    By default every Linear, convolution, Conv1D and packed attention projection, without embeddings, output heads
    (by name) and the first convolution. `include` overrides those defaults for the layers it matches and leaves out the
    others; `exclude` always wins. A parameter shared by several modules is listed once, under its first name.

    Args:
        include, exclude: names, globs, ``re:`` patterns, or functions ``(name, module) -> bool``.
        pattern: with ``remainder="dense"``, layers that its M does not divide are left out.
        remainder: "pad" (prune as if completed with zeros), "dense" (leave such a layer), "error".

    Raises:
        ValueError: a filter that matches nothing, or ``remainder="error"`` and a layer that M does not divide.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, not {type(model).__name__}")
    if remainder not in ("pad", "dense", "error"):
        raise ValueError(f"remainder={remainder!r}: expected 'pad', 'dense' or 'error'")
    everything = [*model.named_modules(), *((name, module) for name, module, *_ in _parameters(model))]
    if exclude and isinstance(exclude, str | Sequence) and not any(matches(exclude, *one) for one in everything):
        raise ValueError(f"exclude={exclude!r} matches nothing in the model: a layer that should stay dense would be pruned")
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    owners: dict[int, tuple[str, Tensor]] = {}  # the tensor is held so that its id stays its own
    tied = {
        id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    first_conv_seen = False
    included = False
    for name, module, parameter, layout in _parameters(model):
        is_first_conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not first_conv_seen
        first_conv_seen |= is_first_conv
        wanted = include is not None and matches(include, name, module)
        included |= wanted
        weight = getattr(module, parameter)
        if isinstance(layout, str):
            reason: str | None = layout
        elif exclude is not None and matches(exclude, name, module):
            reason = "excluded by the caller"
        elif include is not None and not wanted:
            reason = "not among the layers asked for"
        elif nn.parameter.is_lazy(weight):
            reason = "its weight has no shape yet; run the model once, then prune it"
        elif not isinstance(weight, Tensor) or not (weight.is_floating_point() and weight.ndim >= 2):
            reason = (
                f"weight of type {getattr(weight, 'dtype', type(weight).__name__)}: quantised or packed weights cannot be pruned"
            )
        elif weight.numel() == 0:
            reason = "empty weight"
        elif id(weight) in owners:
            reason = f"shares its weight with {owners[id(weight)][0]}"
        elif not wanted and id(weight) in tied:
            reason = f"shares its weight with the embedding {tied[id(weight)]}"
        elif not wanted and is_first_conv:
            reason = "first convolution; include it by name to prune it"
        elif not wanted:
            reason = head_reason(name)
        else:
            reason = None
        if reason is None and pattern is not None and not isinstance(layout, str):
            reason = remainder_reason(matrix_sides(weight, layout), pattern, remainder, name)
        if reason is None:
            assert not isinstance(layout, str)
            owners[id(weight)] = (name, weight)
            layers.append(Layer(name, module, parameter, layout))
        else:
            skipped.append(Skipped(name, reason))
    if include is not None and not included:
        raise ValueError(
            f"include={include!r} matches no layer of the model; its layers are {[name for name, *_ in _parameters(model)][:20]}"
        )
    return layers, skipped


def computed_reason(module: nn.Module, parameter: str) -> str | None:
    """Why what is written to a module's weight would be lost; None where the weight is the parameter itself."""
    if getattr(module, parameter) is module._parameters.get(parameter):
        return None
    return f"its {parameter} is computed by {type(module).__name__} at each access, so that what is written to it is lost"


def dtype_reason(weight: Tensor) -> str | None:
    """Why a weight of this dtype cannot be made sparse in place; None where it can."""
    if weight.dtype in CHANGEABLE:
        return None
    name = str(weight.dtype).removeprefix("torch.")
    return f"its weight is {name}, which cannot be made sparse in place: convert the model to bfloat16, or exclude the layer"


def matrix_sides(weight: Tensor, layout: Layout) -> tuple[int, int]:
    """Sides (O, I) of the GEMM matrices of a weight."""
    with torch.no_grad():
        _, rows, columns = to_matrices(weight, layout).shape
    return rows, columns


def remainder_reason(matrix: tuple[int, int], pattern: Structure, remainder: str, name: str) -> str | None:
    """Why a layer whose GEMM matrix has these sides (O, I) stays dense at a pattern; None where it is pruned.

    Raises:
        ValueError: ``remainder="error"`` and M does not divide the sides.
    """
    m = getattr(pattern, "m", None)
    if m is None or remainder == "pad":
        return None
    rows, columns = matrix
    transposable = isinstance(pattern, Pattern) and pattern.transposable
    if columns % m == 0 and (not transposable or rows % m == 0):
        return None
    problem = f"{m} does not divide the sides of its {rows} x {columns} matrix"
    if remainder == "error":
        raise ValueError(f"{name}: {problem}; pass remainder='pad' or 'dense', or exclude the layer")
    return problem
