"""Checks whether the weights of any checkpoint obey a pattern, on W and on W^T, or which patterns they obey, band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bisparse.checkpoint.bands import Band, bands
from bisparse.checkpoint.coverage import Coverage, cover, cover_by_sidecar, nonzero
from bisparse.checkpoint.layer_selection import NameFilter, StoredLayer
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.reader import Source, open_source
from bisparse.checkpoint.sidecar import Sidecar, read_own_sidecar
from bisparse.checkpoint.statements import wrong_statements
from bisparse.errors import CheckpointError
from bisparse.layers import FileEvidence, first_match
from bisparse.pattern import Pattern, Structure, Unstructured, parse_pattern
from bisparse.tiles import Layout, LayoutKind
from bisparse.verification import Verification, Violation, verify

__all__ = ["verify_checkpoint", "verify_stored"]

ANY_PATTERN = Pattern(1, 2)
COUNTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that `verify` compares with zero without a conversion."""


def verify_checkpoint(
    path: str | Path,
    pattern: str | Structure | None = None,
    *,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    key: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Check every layer of any checkpoint: a folder, a safetensors file, or a torch state dict.

    Args:
        path: a folder, a file, or a model in the local Hugging Face cache, ``org/name``.
        pattern: by default, each layer's own from the sidecar. Without a sidecar, or if `include` names layers, the layers are
            those that `prune_checkpoint` would prune, in any dtype. For a single file, only the sidecar's entries about this
            file's tensors are used.
        include, exclude: layers, by name, glob or ``re:`` pattern.
        layouts: layouts of single layers, by filter, as for `prune_checkpoint`; they override the sidecar's.
        key: key of the state dict in a torch file, such as ``"model.state_dict"``; by default it is found.
        progress: called with the layer's name, the bytes read so far and their total.

    Returns:
        A verification with the checked layers in `layers`, a reason for each layer that could not be checked in `unchecked`,
        tensors that are not pruned by default or were excluded in `left_out`, and false statements of the sidecar about these
        weights in `contradicted`. It is true if at least one layer was checked and all checked layers obey.

    Raises:
        CheckpointError: the checkpoint cannot be read, has no layers, or lacks a layer of its sidecar.
        ValueError: neither a pattern nor a sidecar.
    """
    source = unpacked(open_source(path, key))
    structure = None if pattern is None else parse_pattern(pattern)
    found = _cover(source, structure, include, exclude, layouts)
    layers = found.checked
    total, done, results = sum(layer.tensor.nbytes for layer in layers), 0, []
    for layer in layers:
        if progress:
            progress(layer.name, done, total)
        results.append(verify_stored(layer))
        done += layer.tensor.nbytes
    sidecar = read_own_sidecar(source.path, source.tensors, needed=False)
    wrong = () if sidecar is None else wrong_statements(sidecar, source, results)
    if sidecar is not None and include is None:
        wrong += _wrong_layouts(source, layers, layouts)
    source.check_unchanged()
    if progress:
        progress("", total, total)
    weights = sum(layer.tensor.size for layer in layers)
    return Verification(
        structure or (layers[0].pattern if layers else _stated_pattern(source)),
        sum(result.groups for result in results),
        sum(result.violations for result in results),
        next((result.first for result in results if result.first), None),
        sum(result.density * layer.tensor.size for result, layer in zip(results, layers, strict=True)) / max(weights, 1),
        layers=tuple(results),
        unchecked=found.unchecked,
        left_out=found.left_out,
        contradicted=wrong,
    )


def _stated_pattern(source: Source) -> Structure:
    sidecar = read_own_sidecar(source.path, source.tensors)
    assert sidecar is not None
    return parse_pattern(sidecar.report.pattern)


def _cover(
    source: Source,
    pattern: Structure | None,
    include: NameFilter | None,
    exclude: NameFilter | None,
    layouts: Mapping[str, str | Layout] | None,
) -> Coverage:
    """The layers to check: those of the sidecar, those that `include` names or, without either, those found by name."""
    tensors = source.tensors
    sidecar = read_own_sidecar(source.path, tensors, needed=pattern is None)
    if sidecar is None and pattern is None:
        raise ValueError(f"{source.path} has no sidecar that states its pattern; pass one, such as --pattern 2:4")
    found = None
    if sidecar is not None and include is None:
        _check_fit(source, sidecar)
        found = cover_by_sidecar(sidecar, tensors, source.config, pattern, exclude, metadata=source.metadata, layouts=layouts)
    if found is None or not (found.checked or found.unchecked or pattern is None):
        stated = pattern or parse_pattern(sidecar.report.pattern if sidecar else "")
        found = cover(tensors, source.config, stated, include, exclude, metadata=source.metadata, layouts=layouts)
        if sidecar is not None and pattern is None:
            own = {result.parameter: parse_pattern(result.pattern) for result in sidecar.report}
            kept = tuple(replace(layer, pattern=own.get(layer.tensor.name, layer.pattern)) for layer in found.checked)
            found = replace(found, checked=kept)
    if not found.checked and not found.unchecked:
        raise CheckpointError(source.path, "has no layer that a pattern applies to", "name the tensors to verify with --include")
    return found


def _wrong_layouts(source: Source, layers: Iterable[StoredLayer], given: Mapping[str, str | Layout] | None) -> tuple[str, ...]:
    """Layers that obey their pattern in the sidecar's layout alone: the file's own evidence is another, in which they do not."""
    evidence = FileEvidence(source.tensors, source.config, source.metadata)
    found = []
    for layer in layers:
        if first_match(given, layer.name, layer.tensor.name)[0] is not None or len(layer.tensor.shape) < 2:
            continue
        own, used = evidence.kind(layer.tensor.name).layout, layer.layout
        # Parts only say where tiles may not reach across.
        parts = {LayoutKind.LINEAR, LayoutKind.PACKED}
        if own is None or {own.kind, used.kind} <= parts or (own.kind, own.groups) == (used.kind, used.groups):
            continue
        as_found = verify_stored(replace(layer, layout=own))
        if not as_found and verify_stored(layer):
            found.append(
                f"it reads {layer.name} as '{used}', and by its name and shape it is '{own}', in which {as_found.violations:,} "
                f"groups break {layer.pattern} (give the layout if '{used}' is right)"
            )
    return tuple(found)


def _check_fit(source: Source, sidecar: Sidecar) -> None:
    tensors = source.tensors
    for result in sidecar.report:
        if (tensor := tensors.get(result.parameter)) is None:
            raise CheckpointError(
                source.path,
                "is in the sidecar, but not in the weights",
                "prune or fetch the checkpoint again",
                tensor=result.parameter,
            )
        if tensor.shape != result.shape:
            raise CheckpointError(
                source.path,
                f"has shape {tensor.shape}, the sidecar says {result.shape}",
                "prune again",
                tensor=result.parameter,
            )


def verify_stored(layer: StoredLayer) -> Verification:
    """`verify` of one stored weight of any torch dtype, with the same result, in the memory of one band."""
    tensor, pattern = layer.tensor, layer.pattern
    if isinstance(pattern, Unstructured):
        return verify(nonzero(tensor.read()).view(tensor.shape), pattern, layout=layer.layout, name=layer.name)
    m = getattr(pattern, "m", 1)
    groups = violations = seen = 0
    kept = 0.0
    firsts: list[Violation] = []
    for band in bands(tensor, layer.layout, m):
        weight = band.weight if band.weight.dtype in COUNTED else nonzero(band.weight)
        result = verify(weight, pattern, layout=band.layout, name=layer.name)
        groups += result.groups
        violations += result.violations
        seen += band.weight.numel()
        kept += result.density * band.weight.numel()
        if result.first is not None:
            firsts.append(_moved(result.first, band, m))
    if seen != tensor.size:
        raise CheckpointError(
            tensor.path,
            f"has shape {tensor.shape}, which the layout {layer.layout} does not cover: {seen} of {tensor.size} weights",
            "correct the layout, or prune again",
            tensor=tensor.name,
        )
    first = min(firsts, key=lambda one: (one.side != "W", one.matrix, one.row, one.group), default=None)
    return Verification(pattern, groups, violations, first, kept / max(tensor.size, 1), layer=layer.name)


def _moved(violation: Violation, band: Band, m: int) -> Violation:
    """A band's violation, with its position in the whole weight."""
    along_rows = (violation.side == "W") != band.layout.inputs_first
    return replace(
        violation,
        matrix=violation.matrix + band.matrix,
        row=violation.row + (band.row if along_rows else 0),
        group=violation.group + (0 if along_rows else band.row // m),
    )
