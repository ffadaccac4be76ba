"""`save`: writes a pruned or sparse-trained model to a folder: plain dense weights with zeros, the sidecar and the masks."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bisparse.apart import check_apart, origin_of
from bisparse.arguments import check_json
from bisparse.checkpoint.atomic_folder import check_room, output_folder
from bisparse.checkpoint.bands import BitPacker
from bisparse.checkpoint.layer_selection import StoredLayer
from bisparse.checkpoint.model_card import CARD, write_card
from bisparse.checkpoint.names import named_as_in, unsaved_buffers
from bisparse.checkpoint.prune import SAMPLES, copy_others, limit_permissions, read_back
from bisparse.checkpoint.reader import open_source
from bisparse.checkpoint.sidecar import MASKS, SIDECAR, SampleTile, Sidecar, masks_header, packed_size
from bisparse.checkpoint.statements import same_sum
from bisparse.checkpoint.stored_tensor import (
    SafetensorsWriter,
    as_bytes,
    build_header,
    in_file_order,
    memory_tensor,
)
from bisparse.layers import Filter, Layer, Skipped, find_layers
from bisparse.pattern import Structure, parse_pattern
from bisparse.results import LayerResult, PruneReport, checksum_of
from bisparse.scores import magnitude
from bisparse.tiles import Layout, to_matrices
from bisparse.verification import verify
from bisparse.wrappers import is_wrapper, plain_names, unwrapped_model

__all__ = ["HasDenseWeight", "configs_of", "plain_weights", "save", "sidecar_of"]

WEIGHTS = "model.safetensors"


@runtime_checkable
class HasDenseWeight(Protocol):
    """A module with a packed weight that can be unpacked."""

    def dense_weight(self) -> Tensor:
        """The weight, dense, with zeros."""


@runtime_checkable
class HasPattern(Protocol):
    """A parametrization whose weight obeys a pattern."""

    pattern: Structure


@runtime_checkable
class HasJson(Protocol):
    """A transformers configuration of a model or of generation."""

    def to_json_string(self) -> str:
        """The configuration as JSON."""


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model without parametrizations and packed layers: every weight dense, with zeros."""
    model = unwrapped_model(model)
    plain = plain_names(model)
    state = {plain(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, module in _named(model):
        prefix = f"{plain(name)}." if plain(name) else ""
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for parameter in module.parametrizations:
                inner = f"{prefix}parametrizations.{parameter}."
                state = {name: value for name, value in state.items() if not name.startswith(inner)}
                state[prefix + parameter] = getattr(module, parameter)
        elif isinstance(module, HasDenseWeight):
            state = {name: value for name, value in state.items() if not name.startswith(prefix) or name == f"{prefix}bias"}
            state[f"{prefix}weight"] = module.dense_weight()
    return {name: value.detach() for name, value in state.items()}


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):  # like state_dict, with every name of a shared module
        if ".parametrizations." not in f".{name}." and not is_wrapper(module):
            yield name, module


@torch.no_grad()
def save(
    model: nn.Module,
    folder: str | Path,
    pattern: str | Structure | None = None,
    *,
    report: PruneReport | None = None,
    state: Mapping[str, Tensor] | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    overwrite: bool = False,
    source: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Sidecar:
    """Save a model whose layers obey a pattern: a plain `model.safetensors` that loads anywhere, the sidecar and the masks.

    Every name of the model's state_dict is written, tied weights under each of their names. Parametrized weights are written
    as used by the forward pass, packed ones as their `dense_weight()`. Masks are the non-zero weights. The configuration of a
    transformers model is written to config.json, and that of generation to generation_config.json. The tokenizer is not part
    of the model: pass `source`, or ``beside=tokenizer.save_pretrained``. The folder only appears once it is complete.

    Args:
        pattern: the pattern of the layers, which is checked and written. By default that of `report` or, for a model in sparse
            training, of its masks. Another pattern than the report's replaces it, and the figures that depend on it, such as the
            gap, are omitted.
        report: the report of `prune_` or `Sparsity.report`; its figures go into the sidecar, except those that were computed for
            different weights.
        state: the weights, for a model whose weights are sharded over ranks.
        include, exclude, layouts: the layers to which `pattern` applies, and how they store their matrices; see `find_layers`.
        overwrite: replace a folder that bisparse wrote.
        source: the checkpoint from which the model was loaded. All its other files (configurations, tokenizer, README, licence)
            are copied as by `prune_checkpoint`, and tensors get its names, tied weights only those that it has.
        provenance: how the job was called and on what data; stored in the sidecar.
        beside: called with the folder before it appears, to write more files, such as a tokenizer's ``save_pretrained``.

    Raises:
        PatternError: a layer breaks its pattern, and is named. Nothing is written.
        CheckpointError: the folder exists, cannot be written, or overlaps the source or the files of the model; names or shapes
            differ from the source's.
        ValueError: the pattern of the layers is not known, the report has no layers, or JSON cannot hold `provenance`.
    """
    model = unwrapped_model(model)
    if report is not None and not isinstance(report, PruneReport):
        raise ValueError(f"report={report!r:.60}: expected what prune_ or Sparsity.report returned")
    if state is not None and not (isinstance(state, Mapping) and all(isinstance(one, Tensor) for one in state.values())):
        raise ValueError(f"state={state!r:.60}: expected a mapping from names to tensors")
    check_json("provenance", dict(provenance or {}))
    if report is not None and not report.layers:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in report.left_dense[:4])
        raise ValueError(
            f"no layer of the model {type(model).__name__} was pruned, so that nothing is written "
            f"({reasons or 'it has none that a pattern applies to'}); include layers by name"
        )
    opened = None if source is None else open_source(source)
    check_apart(folder, {"source": None if opened is None else opened.path, "model's own files": origin_of(model)})
    if opened is not None:
        opened.check_writable()
    weights = dict(state) if state is not None else plain_weights(model)
    if absent := [name for name, value in weights.items() if value.is_meta]:
        raise ValueError(f"{absent[0]} is on the meta device and holds no numbers to save; load the model first")
    report = report or _report(model, weights, None if pattern is None else parse_pattern(pattern), include, exclude, layouts)
    if others := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        report = replace(
            report, notes=(*report.notes, f"entries of the state_dict that are no tensors are not kept: {others[:8]}")
        )
    if opened is not None:
        weights = named_as_in(opened, weights, {one.parameter for one in report}, unsaved_buffers(model))
    folder = Path(folder)
    report = _about(report, weights)
    if pattern is not None:
        report = _at(report, str(parse_pattern(pattern)))
    stored = {name: memory_tensor(name, weight, folder / WEIGHTS) for name, weight in weights.items()}
    layers = {}
    for result in report:
        own = parse_pattern(result.pattern)
        verify(weights[result.parameter], own, layout=result.layout, name=result.name).check()
        layers[result.parameter] = StoredLayer(result.name, stored[result.parameter], result.layout, own)
    ordered = in_file_order(stored.values())
    header = build_header(((one.name, one.dtype, one.shape, one.nbytes) for one in ordered), {"format": "pt"})
    checksums = {}
    with output_folder(folder, overwrite=overwrite) as temporary:
        check_room(temporary, sum(one.nbytes for one in ordered) + sum(packed_size(one.tensor.shape) for one in layers.values()))
        with SafetensorsWriter(temporary / WEIGHTS, header) as writer:
            for tensor in ordered:
                data = as_bytes(tensor.tensor)  # type: ignore[attr-defined]
                checksums[tensor.name] = zlib.crc32(data)
                writer.write(data)
        with SafetensorsWriter(
            temporary / MASKS, masks_header({name: one.tensor.shape for name, one in layers.items()})
        ) as writer:
            for name in layers:
                packer = BitPacker(writer.write)
                packer.add((weights[name] != 0).cpu())
                packer.finish()
        if opened is not None:
            report = replace(report, notes=(*report.notes, *opened.notes, *copy_others(opened, temporary)))
            opened.check_unchanged()
        if not (temporary / "config.json").exists():
            for name, text in configs_of(model).items():
                (temporary / name).write_text(text, encoding="utf-8")
        named = type(model).__name__ if opened is None else opened.name
        sidecar = replace(sidecar_of(report, weights, named), provenance=dict(provenance or {}))
        sidecar = write_card(temporary, sidecar, folder)
        (temporary / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
        read_back(temporary / WEIGHTS, ordered, checksums, layers, lambda tensor: None)
        if opened is not None:
            card = [CARD] if CARD not in opened.others else []
            limit_permissions(temporary, opened, (WEIGHTS, MASKS, SIDECAR, *card))
        if beside is not None:
            beside(temporary)
    return sidecar


def _report(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    pattern: Structure | None,
    include: Filter | None,
    exclude: Filter | None,
    layouts: Mapping[str, str | Layout] | None,
) -> PruneReport:
    """What can be said of a model that was not pruned here: which layers obey which pattern, and how dense they are."""
    found, left = find_layers(model, include, exclude, layouts=layouts)
    plain = plain_names(model)
    results = []
    for layer in found:
        own = pattern or _pattern_of(layer)
        if own is None:
            left.append(Skipped(layer.name, "no pattern was given for it"))
            continue
        key = plain(layer.parameter_name)
        weight = weights[key]
        density = float((weight != 0).double().mean())
        dtype = str(weight.dtype).removeprefix("torch.")
        figures = (density, None, None, None, 0.0)
        results.append(LayerResult(plain(layer.name), key, tuple(weight.shape), dtype, layer.layout, str(own), *figures))
    if not results:
        raise ValueError("nothing says which pattern the layers obey: pass pattern, such as '4:8-T', or the report of prune_")
    buffers = {plain(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    return PruneReport(
        results[0].pattern,
        "as given",
        "not recorded",
        tuple(results),
        tuple(left),
        parameters=_count({name: value for name, value in weights.items() if name not in buffers}),
    )


def _count(weights: Mapping[str, Tensor]) -> int:
    """Number of weights, tied ones once."""
    return sum({(one.data_ptr(), one.shape): one.numel() for one in weights.values()}.values())


def _about(report: PruneReport, weights: Mapping[str, Tensor]) -> PruneReport:
    """A report without the figures that were computed for different weights."""
    results, changed = [], 0
    for result in report:
        if result.parameter not in weights:
            raise ValueError(f"{result.name}: the report is about {result.parameter}, which is not among the model's weights")
        weight = weights[result.parameter]
        own = replace(
            result,
            density=int(weight.count_nonzero()) / weight.numel() if weight.numel() else result.density,
            dtype=str(weight.dtype).removeprefix("torch."),
        )
        if not _is_of(result, weight, report.method):
            own, changed = own.without_figures(), changed + 1
        elif result.checksum is not None and own.dtype != result.dtype:
            own = replace(own, checksum=checksum_of(weight))
        results.append(own)
    notes = report.notes
    if changed:
        notes += (f"{changed} layers were changed after the report was made: their score kept, gap and errors are not known",)
    return replace(report, layers=tuple(results), notes=notes)


def _at(report: PruneReport, pattern: str) -> PruneReport:
    """A report of the same weights at another pattern."""
    others = {result.pattern for result in report if result.pattern != pattern}
    notes = report.notes
    if others:
        notes += (f"the report is about {', '.join(sorted(others))}; {pattern} was given when the model was saved",)
    layers = (result if result.pattern == pattern else result.at(pattern) for result in report)
    return replace(report, pattern=pattern, patterns={}, layers=tuple(layers), notes=notes)


def _is_of(result: LayerResult, weight: Tensor, method: str) -> bool:
    """Whether the figures of a layer belong to this weight, as far as that can be checked."""
    if result.checksum is not None:
        then = weight.to(getattr(torch, result.dtype))  # a weight in a wider dtype can have the same numbers
        return checksum_of(then) == result.checksum and torch.equal(then.to(weight.dtype), weight)
    if method != "magnitude" or result.value is None:
        return True
    # Magnitude pruning does not change kept weights, so the kept score is the sum of their magnitudes.
    return same_sum(float(magnitude(weight).sum(dtype=torch.float64)), result.value)


def _pattern_of(layer: Layer) -> Structure | None:
    if not parametrize.is_parametrized(layer.module, layer.parameter):
        return None
    assert isinstance(layer.module.parametrizations, nn.ModuleDict)
    steps = layer.module.parametrizations[layer.parameter]
    assert isinstance(steps, nn.ModuleList)
    return next((step.pattern for step in steps if isinstance(step, HasPattern)), None)


def sidecar_of(report: PruneReport, weights: Mapping[str, Tensor], source: str) -> Sidecar:
    """A sidecar for weights that obey the patterns of a report, with sample tiles."""
    step = max(1, -(-len(report) // SAMPLES))
    samples = []
    for result in report.layers[::step]:
        matrix = to_matrices(weights[result.parameter], result.layout)[0]
        samples.append(SampleTile.middle(result.name, matrix, matrix != 0, parse_pattern(result.pattern)))
    return Sidecar(report, source=source, samples=tuple(samples))


def configs_of(model: nn.Module) -> dict[str, str]:
    """The configurations of a transformers model, as JSON by file name."""
    found = {}
    if isinstance(config := getattr(model, "config", None), HasJson):
        content: dict[str, Any] = json.loads(config.to_json_string())
        content.pop("sparsity_config", None)
        content["architectures"] = content.get("architectures") or [type(model).__name__]
        found["config.json"] = json.dumps(content, indent=2) + "\n"
    if isinstance(generation := getattr(model, "generation_config", None), HasJson):
        found["generation_config.json"] = generation.to_json_string().rstrip() + "\n"
    return found
