"""Selects the tensors of a checkpoint to prune, with their patterns, and a reason for each one left dense.

`bisparse.layers` decides what a tensor is, as for models; this file handles the caller's choices and tensors that share storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bisparse.checkpoint.input_file import InputFile
from bisparse.checkpoint.stored_tensor import FileTensor, MemoryTensor, StoredTensor, StridedTensor
from bisparse.checkpoint.torch_archive import StorageRecord
from bisparse.layers import (
    NOT_NAMED,
    FileEvidence,
    Kind,
    NameFilter,
    Skipped,
    first_match,
    layer_name,
    matches_name,
    parse_layout,
    parse_layouts,
    remainder_reason,
    sides,
    why_dense,
)
from bisparse.pattern import Structure
from bisparse.tiles import Layout

__all__ = ["NameFilter", "StoredLayer", "choose_layers", "layer_name"]


@dataclass(frozen=True)
class StoredLayer:
    """A tensor to prune, with its layout and pattern."""

    name: str
    tensor: StoredTensor
    layout: Layout
    pattern: Structure


def choose_layers(
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    pattern: Structure,
    *,
    metadata: Mapping[str, str] | None = None,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, Structure] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> tuple[list[StoredLayer], list[Skipped]]:
    """The tensors to prune, and a reason for each matrix or larger tensor left dense.

    Args:
        config: the content of config.json; empty if there is none.
        metadata: metadata of the safetensors header, such as ``{"format": "mlx"}``.
        include, exclude: by the layer's or the parameter's name. `include` overrides the defaults for the layers that it
            matches and leaves out the others; `exclude` takes precedence.
        patterns: patterns of single layers, by filter; the first that matches counts.
        layouts: layouts of single layers, by filter, if they cannot be detected; see `bisparse.layers.parse_layout`.

    Raises:
        ValueError: a filter that matches nothing, a layout that a tensor cannot have, or ``remainder="error"`` and a layer that M
            does not divide.
    """
    if remainder not in ("pad", "dense", "error"):
        raise ValueError(f"remainder={remainder!r}: expected 'pad', 'dense' or 'error'")
    patterns, layouts = patterns or {}, parse_layouts(layouts)
    unused = {*patterns, *layouts}
    evidence = FileEvidence(tensors, config, metadata)
    chosen: list[StoredLayer] = []
    left: dict[str, str] = {}
    undecided: set[str] = set()
    included = False
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2:
            continue
        layer = layer_name(name)
        wanted = None if include is None else matches_name(include, layer, name)
        included |= bool(wanted)
        layout_key, given = first_match(layouts, layer, name)
        pattern_key, own = first_match(patterns, layer, name)
        unused -= {layout_key, pattern_key}
        kind = evidence.kind(name)
        if isinstance(tensor.operand, Layout):  # the file states its layout, but not that it is a head or an embedding
            kind = Kind(tensor.operand, kind.refused, "", kind.default)
        elif tensor.operand is not None:
            kind = Kind(None, kind.refused, tensor.operand, kind.default)
        if given is not None:
            kind = Kind(None, kind.refused, "", kind.default)
        reason = why_dense(kind, included=wanted, excluded=exclude is not None and matches_name(exclude, layer, name))
        by_default = kind.default and not wanted
        if reason is not None and reason == kind.uncertain != NOT_NAMED and not by_default:
            undecided.add(name)
        layout = kind.layout
        structure = own or pattern
        if reason is None:
            layout = layout if given is None else parse_layout(given, tensor.shape, layer)
            assert layout is not None
            reason = remainder_reason(sides(tensor.shape, layout), structure, remainder, layer)
        if reason is None:
            assert layout is not None
            chosen.append(StoredLayer(layer, tensor, layout, structure))
        else:
            left[name] = reason
    examples = [layer_name(name) for name, tensor in tensors.items() if len(tensor.shape) >= 2][:8]
    if include is not None and not included:
        raise ValueError(f"include={include!r} matches no tensor; those of two or more dimensions begin with {examples}")
    if (
        exclude
        and isinstance(exclude, str | Sequence)
        and not any(matches_name(exclude, layer_name(name), name) for name in tensors)
    ):
        raise ValueError(f"exclude={exclude!r} matches no tensor: a layer that should stay dense would be pruned")
    if unused:
        raise ValueError(f"{sorted(unused)} match no tensor; those of two or more dimensions begin with {examples}")
    apart = _reasons_of_sharing(tensors, chosen)
    left |= apart
    chosen = [layer for layer in chosen if layer.tensor.name not in apart]
    return chosen, [Skipped(layer_name(name), left[name], name in undecided) for name in tensors if name in left]


@dataclass(frozen=True)
class _Extent:
    """The location of a tensor's bytes: file or storage, first byte and end, and strides."""

    where: object
    start: int
    stop: int
    view: tuple[object, ...] = ()
    """Offset and strides, if the tensor is not contiguous."""


def _extent_of_file(tensor: FileTensor, view: tuple[object, ...] = ()) -> _Extent:
    content, start = tensor.content, tensor.offset
    where: object = str(tensor.path)
    if isinstance(content, StorageRecord):
        start += content.file.base + content.offset
    elif not isinstance(content, InputFile):  # bytes that were read already
        where = id(content)
    return _Extent(where, start, start + tensor.nbytes, view)


def _extent(tensor: StoredTensor) -> _Extent | None:
    match tensor:
        case FileTensor():
            return _extent_of_file(tensor)
        case StridedTensor():
            return _extent_of_file(tensor.span, tensor.stride)
        case MemoryTensor() if not tensor.tensor.is_meta:
            start = tensor.tensor.data_ptr()
            view = () if tensor.tensor.is_contiguous() else tensor.tensor.stride()
            return _Extent("memory", start, start + tensor.nbytes, view)
    return None


def _reasons_of_sharing(tensors: Mapping[str, StoredTensor], chosen: Iterable[StoredLayer]) -> dict[str, str]:
    """Why tensors that share storage stay dense, by name, unless all of them are pruned to the same weight.

    Tied tensors are one parameter of the model but are written separately; pruned in the same way, they stay equal.
    """
    planned = {layer.tensor.name: layer for layer in chosen}
    found: dict[str, str] = {}
    for group in _sharing(tensors):
        layers = [planned.get(name) for name in group]
        alike = {(one.tensor.shape, one.layout, one.pattern) for one in layers if one is not None}
        if len(alike) <= 1 and None not in layers and len({_extent(tensors[name]) for name in group}) == 1:
            continue
        dense = next((name for name in group if name not in planned), None)
        for name in group:
            if name in planned:
                other = dense or next(one for one in group if one != name)
                found[name] = f"shares its storage with {other}, " + (
                    "which stays dense: one parameter under two names; include both" if dense else "which is another view"
                )
    return found


def _sharing(tensors: Mapping[str, StoredTensor]) -> list[list[str]]:
    """Groups of at least two tensors whose bytes overlap."""
    places = [(extent, name) for name, tensor in tensors.items() if tensor.size and (extent := _extent(tensor)) is not None]
    groups: list[list[str]] = []
    where: object = None
    stop = 0
    for extent, name in sorted(places, key=lambda one: (str(one[0].where), one[0].start)):
        if extent.where == where and extent.start < stop:
            groups[-1].append(name)
        else:
            groups.append([name])
        where, stop = extent.where, max(extent.stop, stop) if extent.where == where else extent.stop
    return [group for group in groups if len(group) > 1]
