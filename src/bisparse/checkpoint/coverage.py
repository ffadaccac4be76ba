"""Selects the layers that a check of a checkpoint examines, and reasons for those it cannot examine or leaves out.

A check only reads zeros, so dtypes that cannot be pruned are allowed: a stored zero is a zero weight in every float format and in
signed integers without a zero point. Unsigned integers always have a zero point or contain packed values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from bisparse.checkpoint.layer_selection import NameFilter, StoredLayer, choose_layers, layer_name
from bisparse.checkpoint.sidecar import Sidecar
from bisparse.checkpoint.stored_tensor import StoredTensor
from bisparse.layers import QUANTISED, Skipped, first_match, parse_layout, quantisation_state, sides
from bisparse.layers.packed_numbers import STATES
from bisparse.pattern import Pattern, Structure, Unstructured, parse_pattern
from bisparse.results import LayerResult
from bisparse.tiles import Layout

__all__ = ["Coverage", "cover", "cover_by_sidecar", "nonzero"]

UNSIGNED = ("U8", "U16", "U32", "U64")
ZERO_POINTS = (".weight_zero_point", ".zero_point", ".weight_zp", ".weight.zero_point", ".zeros", ".qzeros")
"""Suffixes of zero points, after the layer's name."""
ZERO_POINT_ENTRIES = 1 << 24
"""Maximum number of zero points that are read; a larger tensor counts as not zero."""

PACKED = {
    r"\.(qweight|weight_packed|weight_q|W_q|weight_qdata|weight\.compressed)$": "contains packed or compressed values",
    r"_blocks$": "contains packed values",
}
ENCODED = {
    **PACKED,
    r"\.(weight_orig|parametrizations\.weight\.original)$": "the weight is made from this and a mask when the model runs",
    r"\.(weight_v|parametrizations\.weight\.original1)$": "the weight is made from this and its norm when the model runs",
}
"""Suffixes of tensors from which a weight is computed, so that they do not show its zeros."""

NO_WEIGHTS = r"(_blocks|scales?|scale_inv|zero_points?|zeros|bias(es)?|absmax|quant_map|g_idx|ind(ex|ices)|shape)$"
"""Suffixes of the other tensors of experts."""


@dataclass(frozen=True)
class Coverage:
    """The layers of a checkpoint that are checked, cannot be checked, or are left out."""

    checked: tuple[StoredLayer, ...]
    unchecked: tuple[Skipped, ...]
    """Layers to which the pattern applies, but whose zeros cannot be read or are not constrained."""
    left_out: tuple[Skipped, ...]
    """Heads, embeddings and other tensors that are not pruned by default, and those that the caller excluded."""


def cover(
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    pattern: Structure,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> Coverage:
    """Cover the layers by their names and shapes, in any dtype; arguments as for `choose_layers`.

    Raises:
        ValueError: a filter that matches nothing.
    """
    reasons: dict[str, str] = {}
    candidates: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        # The rules of names treat every weight as float32; whether its dtype can be read is checked afterwards.
        candidates.setdefault(name, _as_float(tensor) if _is_weight(name) or tensor.operand is not None else tensor)
        for ending, reason in ENCODED.items():
            if re.search(ending, name) and (tensor.dtype in UNSIGNED or not name.endswith("_blocks")):
                plain = re.sub(r"_blocks$", "", name) if name.endswith("_blocks") else re.sub(ending, ".weight", name)
                if plain not in tensors:
                    dimensions = 3 if name.endswith("_blocks") else 2
                    shape = (*tensor.shape, 2, 2, 2)[:dimensions]
                    candidates[plain] = replace(_as_float(tensor), name=plain, shape=shape)
                    reasons[plain] = f"{name} {reason}"
    # Tensors that show a weight to be quantised are ignored here; whether it can be read is checked below.
    encoded = {name for name in candidates if any(re.search(ending, name) for ending in ENCODED)}
    companions = {name for name in candidates if name.endswith(tuple(f".{ending}" for ending in (*QUANTISED, *STATES)))}
    seen = {name: tensor for name, tensor in candidates.items() if name in reasons or name not in encoded | companions}
    chosen, left = choose_layers(seen, config, pattern, metadata=metadata, include=include, exclude=exclude, layouts=layouts)
    checked: list[StoredLayer] = []
    unchecked: list[Skipped] = []
    for layer in chosen:
        name = layer.tensor.name
        if (problem := reasons.get(name) or unreadable(tensors, tensors[name])) is None:
            checked.append(replace(layer, tensor=tensors[name]))
        else:
            unchecked.append(Skipped(layer.name, problem))
    unchecked += [one for one in left if one.undecided]
    made = {reason.split(" ", 1)[0] for reason in reasons.values()}
    left = [one for one in left if not one.undecided and one.name not in made]
    return _constrained(checked, unchecked, left)


def cover_by_sidecar(
    sidecar: Sidecar,
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    pattern: Structure | None,
    exclude: NameFilter | None,
    *,
    metadata: Mapping[str, str] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> Coverage:
    """Cover the layers of a sidecar, each with its own pattern unless one is given; other possible layers are unchecked.

    The sidecar's tensors must exist.
    """
    named: dict[str, LayerResult] = {result.parameter: result for result in sidecar.report}
    stated = pattern or parse_pattern(sidecar.report.pattern)
    whole = cover(tensors, config, stated, exclude=exclude, metadata=metadata)
    reasons = {one.name: f"left dense by bisparse: {one.reason}" for one in sidecar.report.left_dense}
    excluded = {one.name for one in whole.left_out if one.reason == "excluded by the caller"}
    checked: list[StoredLayer] = []
    unchecked: list[Skipped] = []
    for parameter, result in named.items():
        if result.name in excluded or layer_name(parameter) in excluded:
            continue
        tensor = tensors[parameter]
        reason = unreadable(tensors, tensor)
        if reason is None:
            _, given = first_match(layouts, result.name, parameter)
            layout = result.layout if given is None else parse_layout(given, tensor.shape, result.name)
            checked.append(StoredLayer(result.name, tensor, layout, pattern or parse_pattern(result.pattern)))
        else:
            unchecked.append(Skipped(result.name, reason))
    names = {name for parameter, result in named.items() for name in (result.name, layer_name(parameter))}
    unchecked += [
        Skipped(one.name, reasons.get(one.name, "not among the layers that bisparse.json names"))
        for one in whole.checked
        if one.name not in names
    ]
    unchecked += [one for one in whole.unchecked if one.name not in names]
    return _constrained(checked, unchecked, [one for one in whole.left_out if one.name not in names or one.name in excluded])


def unreadable(tensors: Mapping[str, StoredTensor], tensor: StoredTensor) -> str | None:
    """Why the zeros of a stored weight cannot be read; None if they can."""
    if tensor.torch_dtype is None:
        return f"dtype {tensor.dtype}, which torch cannot read"
    if (state := quantisation_state(tensor.name, tensors)) is not None:
        return f"packed numbers of bitsandbytes, since {state} is next to it: a stored 0 need not be a weight of 0"
    if tensor.dtype in UNSIGNED:
        return (
            f"dtype {tensor.dtype}: packed values, or quantised with a zero point, so that a stored 0 need not be a weight of 0"
        )
    if not (tensor.torch_dtype.is_floating_point or tensor.torch_dtype.is_complex or tensor.torch_dtype == torch.bool):
        layer = layer_name(tensor.name)
        for ending in ZERO_POINTS:
            point = tensors.get(layer + ending)
            if point is not None and (
                point.torch_dtype is None or point.size > ZERO_POINT_ENTRIES or bool(nonzero(point.read()).any())
            ):
                return f"dtype {tensor.dtype}, quantised with a zero point ({point.name}): a stored 0 need not be a weight of 0"
    return None


def nonzero(weight: Shaped[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Where a weight of any torch dtype is not zero; NaN counts as non-zero, and -0.0 as zero."""
    if weight.is_floating_point() and weight.dtype.itemsize == 1:
        weight = weight.float()
    return weight != 0


def _is_weight(name: str) -> bool:
    return name == "weight" or name.endswith((".weight", "proj_weight")) or ("expert" in name and not re.search(NO_WEIGHTS, name))


def _as_float(tensor: StoredTensor) -> StoredTensor:
    return tensor if tensor.dtype in ("F64", "F32", "F16", "BF16") else replace(tensor, dtype="F32")


def _constrained(checked: Iterable[StoredLayer], unchecked: list[Skipped], left_out: list[Skipped]) -> Coverage:
    """Move layers that the pattern does not constrain, since their sides are shorter than M, to `unchecked`."""
    binding = []
    for layer in checked:
        matrix = matrix_sides(layer)
        if allows_everything(layer.pattern, matrix):
            m = getattr(layer.pattern, "m", None)
            short = f"side shorter than M = {m}" if m else "few weights"
            reason = f"{short}: {layer.pattern} allows every weight of a {matrix[0]} x {matrix[1]} matrix"
            unchecked.append(Skipped(layer.name, reason))
        elif (
            layer.layout.parts > 1
            and isinstance(layer.pattern, Pattern)
            and layer.pattern.transposable
            and matrix[0] <= layer.pattern.n
        ):
            # A sidecar or caller may state such a layout for any weight, and W^T would then hold trivially.
            reason = (
                f"its layout has parts of {matrix[0]} rows, of which {layer.pattern} constrains W alone; give its true layout"
            )
            unchecked.append(Skipped(layer.name, reason))
        else:
            binding.append(layer)
    return Coverage(tuple(binding), tuple(unchecked), tuple(left_out))


def allows_everything(pattern: Structure, sides: tuple[int, int]) -> bool:
    """Whether a pattern of density below 1 allows a dense (O, I) matrix, since its sides truncate every group."""
    if isinstance(pattern, Unstructured):
        return pattern.fraction < 1 and pattern.kept(sides[0] * sides[1]) == sides[0] * sides[1]
    m = getattr(pattern, "m", 1)
    along = sides if isinstance(pattern, Pattern) and pattern.transposable else sides[1:]
    dense = (torch.ones(1, 1, min(side, m), dtype=torch.bool, device="cpu") for side in along)
    return pattern.density < 1 and not any(bool(pattern.row_violations(group).any()) for group in dense)


def matrix_sides(layer: StoredLayer) -> tuple[int, int]:
    """Sides (O, I) of a stored weight's GEMM matrices."""
    return sides(layer.tensor.shape, layer.layout)
