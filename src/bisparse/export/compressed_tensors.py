"""`save_quantized`: writes a quantised model as a compressed-tensors folder, which transformers and vLLM load.

The compressed-tensors package packs the weights. The configuration has no ``sparsity_config``, since vLLM refuses that.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.apart import check_apart, origin_of
from bisparse.arguments import check_json
from bisparse.checkpoint.atomic_folder import check_room, output_folder
from bisparse.checkpoint.bands import BitPacker
from bisparse.checkpoint.layer_selection import StoredLayer
from bisparse.checkpoint.model_card import CARD, write_card
from bisparse.checkpoint.names import named_as_in, unsaved_buffers
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.prune import copy_others, limit_permissions, read_back
from bisparse.checkpoint.reader import Source, open_source
from bisparse.checkpoint.save_load import configs_of, plain_weights, sidecar_of
from bisparse.checkpoint.sidecar import MASKS, QUANTIZATION, SIDECAR, Sidecar, masks_header, read_own_sidecar
from bisparse.checkpoint.stored_tensor import SafetensorsWriter, as_bytes, build_header, in_file_order, memory_tensor
from bisparse.checkpoint.verify import verify_stored
from bisparse.errors import CheckpointError, install_extra
from bisparse.pattern import parse_pattern
from bisparse.quantization import QuantizationReport, QuantizedLayer, parse_scheme, stored_values
from bisparse.results import PruneReport
from bisparse.tiles import LayoutKind
from bisparse.verification import PatternError, verify

__all__ = ["QUANTIZATION", "can_be_stored", "save_quantized"]

WEIGHTS = "model.safetensors"
ACTIVATIONS = ("none", "dynamic")


@dataclass(frozen=True)
class _Format:
    """The storage format of a scheme in compressed-tensors."""

    name: str
    weights: Mapping[str, Any]
    """Fields of its QuantizationArgs."""
    activations: Mapping[str, Any] | None


def _format(scheme_name: str, activations: str) -> _Format:
    scheme = parse_scheme(scheme_name)
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r:.60}: expected 'none' or 'dynamic'")
    if activations == "dynamic" and scheme.bits < 8:
        raise ValueError(f"activations='dynamic': engines multiply {scheme.name} weights by unquantised inputs; use int8 or fp8")
    kind = "float" if scheme.floating else "int"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": kind, "symmetric": True, "strategy": "channel"}
    if scheme.group is not None:
        weights |= {"strategy": "group", "group_size": scheme.group}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    # For integers, the package's own choice: plain ones for integer products, packed ones for weights only.
    integers = "int-quantized" if activations == "dynamic" else "pack-quantized"
    name = "float-quantized" if scheme.floating else integers
    if scheme.scaled_scales:
        name = "nvfp4-pack-quantized"
        weights |= {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
    return _Format(name, weights, inputs if activations == "dynamic" else None)


def can_be_stored(name: str, module: nn.Module) -> bool:
    """Whether compressed-tensors can store a module's weight; a filter for the layers that `quantize_` quantises."""
    return isinstance(module, nn.Linear)


@torch.no_grad()
def save_quantized(
    model: nn.Module,
    folder: str | Path,
    report: QuantizationReport,
    *,
    activations: str = "none",
    pruned: PruneReport | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model that `quantize_` has quantised as a compressed-tensors folder, for transformers and vLLM.

    The folder has stored numbers and scales, the configuration, `bisparse-quantization.json` with errors per layer and, for a
    pruned model, `bisparse.json` and masks. It only appears once it is complete, and its numbers are read back and compared.

    Args:
        report: the report of `quantize_`.
        activations: "none": only weights are quantised (``pack-quantized``, ``float-quantized``). "dynamic": engines round each
            token's inputs to int8 or fp8 too and multiply in that type (``int-quantized``, ``float-quantized``); outputs then
            differ from this model's.
        pruned: the report of the pruning; by default the one in the sidecar of `source`.
        source: the folder from which the model was loaded; its other files are copied, and its tensor names are used.
        overwrite: replace a folder that this function wrote.
        provenance: how the job was called; stored in `bisparse-quantization.json`.
        beside: called with the folder before it appears, to write more files, such as a tokenizer's ``save_pretrained``.

    Raises:
        CheckpointError: the folder exists, cannot be written, or overlaps the source.
        ImportError: compressed-tensors is not installed.
        PatternError: a layer breaks the pattern that it was pruned to. Nothing is written.
        ValueError: a quantised layer that is not a Linear, or whose weight was changed afterwards.
    """
    if not isinstance(report, QuantizationReport):
        raise TypeError(f"report must be what quantize_ returned, not {type(report).__name__}")
    form = _format(report.scheme, activations)
    check_json("provenance", dict(provenance or {}))
    check_apart(folder, {"source": source, "model's own files": origin_of(model)})
    opened = None if source is None else open_source(source)
    weights = plain_weights(model)
    _check_layers(model, weights, report)
    if opened is not None:
        _check_plain(opened)
        weights = named_as_in(opened, weights, {one.parameter for one in report}, unsaved_buffers(model))
    before = None if opened is None else read_own_sidecar(opened.path, opened.tensors)
    if pruned is None and before is not None:
        pruned = before.report
    pruned = None if pruned is None else _after(pruned, weights, report)
    state = dict(weights)
    for layer in report:
        del state[layer.parameter]
        state |= _packed(layer, weights[layer.parameter], form)
    folder = Path(folder)
    tensors = in_file_order(memory_tensor(name, one.contiguous(), folder / WEIGHTS) for name, one in state.items())
    header = build_header(((one.name, one.dtype, one.shape, one.nbytes) for one in tensors), {"format": "pt"})
    checksums = {}
    with output_folder(folder, overwrite=overwrite) as temporary:
        check_room(temporary, sum(one.nbytes for one in tensors))
        with SafetensorsWriter(temporary / WEIGHTS, header) as writer:
            for tensor in tensors:
                data = as_bytes(tensor.tensor)  # type: ignore[attr-defined]
                checksums[tensor.name] = zlib.crc32(data)
                writer.write(data)
        if opened is not None:
            copy_others(opened, temporary)
            opened.check_unchanged()
        _write_configs(model, temporary, report, form)
        document = {"schema_version": 1, "format": form.name, "activations": activations, "provenance": dict(provenance or {})}
        text = json.dumps({**document, **report.as_dict()}, indent=1) + "\n"
        (temporary / QUANTIZATION).write_text(text, encoding="utf-8")
        if pruned is not None:
            named = type(model).__name__ if opened is None else opened.path.resolve().name
            sidecar = sidecar_of(pruned, weights, named)
            if before is not None:
                sidecar = replace(sidecar, source=before.source, provenance=before.provenance)
            _write_sidecar(temporary, sidecar, weights)
        read_back(temporary / WEIGHTS, tensors, checksums, {}, lambda tensor: None)
        _check_files(temporary, weights, report, pruned)
        if opened is not None:
            card = [CARD] if CARD not in opened.others else []
            limit_permissions(temporary, opened, (WEIGHTS, MASKS, SIDECAR, *card))
        if beside is not None:
            beside(temporary)


def _check_layers(model: nn.Module, weights: Mapping[str, Tensor], report: QuantizationReport) -> None:
    for layer in report:
        if not layer.name:
            raise ValueError(
                f"the model is a single {type(model).__name__}, and compressed-tensors stores layers by their names in a model: "
                "quantise torch.nn.Sequential(model)"
            )
        module = dict(model.named_modules()).get(layer.name)
        if layer.layout.kind is not LayoutKind.LINEAR or not isinstance(module, nn.Linear) or layer.parameter not in weights:
            raise ValueError(
                f"{layer.name} is {type(module).__name__}: compressed-tensors only stores quantised Linear layers; pass "
                "include=bisparse.export.can_be_stored to quantize_, or export to ONNX"
            )
        if layer.unit is not None and weights[layer.parameter].dtype != torch.bfloat16:
            raise ValueError(
                f"{layer.name} is {layer.dtype}: compressed-tensors unpacks {layer.scheme} to bfloat16 only, so that the "
                "rest of the model could not run; convert the model to bfloat16 and quantise it again"
            )
        place = weights[layer.parameter].data_ptr()
        tied = [name for name, one in weights.items() if name != layer.parameter and one.numel() and one.data_ptr() == place]
        if tied:
            raise ValueError(f"{layer.name}: its weight is tied to {tied[0]}, which would not be quantised; exclude the layer")


def _check_plain(source: Source) -> None:
    if source.config.get("quantization_config"):
        raise CheckpointError(source.path, "is already quantised, by its config.json", "start from the unquantised model")


def _after(pruned: PruneReport, weights: Mapping[str, Tensor], report: QuantizationReport) -> PruneReport:
    """The report of the pruning, with the densities after quantisation; checks that each layer still obeys its pattern."""
    layers = []
    for one in pruned:
        weight = weights[one.parameter]
        verify(weight, parse_pattern(one.pattern), layout=one.layout, name=one.name).check()
        layers.append(replace(one, density=float((weight != 0).double().mean()), checksum=None))
    note = f"figures are of the pruning; the model was then quantised to {report.scheme} by {report.method} (see {QUANTIZATION})"
    return replace(pruned, layers=tuple(layers), notes=(*pruned.notes, note))


def _package() -> Any:
    try:
        import compressed_tensors
    except ImportError as error:
        raise ImportError(f"writing quantised folders needs compressed-tensors; {install_extra('serve')}") from error
    return compressed_tensors


def _scheme(form: _Format) -> Any:
    _package()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    inputs = None if form.activations is None else QuantizationArgs(**form.activations)
    weights = QuantizationArgs(**form.weights)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form.name)


def _packed(layer: QuantizedLayer, weight: Tensor, form: _Format) -> dict[str, Tensor]:
    """A layer's tensors, packed by the package and checked by unpacking."""
    scheme = _scheme(form)
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(form.name)
    stored, scale = stored_values(weight, layer), layer.scale[0].cpu()
    # In float32, since the package divides by the scale again, which could round differently in the weight's dtype.
    wide = stored.cpu().float() * parse_scheme(layer.scheme).spread(scale.float(), weight.shape[-1])
    if layer.unit is None:
        parts = {**compressor.compress({"weight": wide, "weight_scale": scale.float()}, scheme), "weight_scale": scale}
    else:
        parts = _packed_fp4(stored.cpu().float(), scale.float(), layer)
    if not torch.equal(compressor.decompress(dict(parts), scheme)["weight"].to(weight.dtype), weight.cpu()):
        raise ValueError(f"{layer.name}: compressed-tensors does not unpack to the weights that it packed; report this")
    return {f"{layer.name}.{name}": tensor for name, tensor in parts.items()}


def _packed_fp4(stored: Tensor, scale: Tensor, layer: QuantizedLayer) -> dict[str, Tensor]:
    """Two e2m1 numbers per byte, float8 scales and the factor that divides them; all exact."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    assert layer.unit is not None
    # Exact in bfloat16, which scales of all sizes fit.
    steps = (scale / layer.unit).to(torch.float8_e4m3fn)
    factor = torch.tensor([1 / layer.unit], dtype=torch.float32, device="cpu")
    return {"weight_packed": pack_fp4_to_uint8(stored), "weight_scale": steps, "weight_global_scale": factor}


def _write_configs(model: nn.Module, folder: Path, report: QuantizationReport, form: _Format) -> None:
    for name, text in configs_of(model).items():
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["quantization_config"] = _configuration(model, report, form)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _configuration(model: nn.Module, report: QuantizationReport, form: _Format) -> dict[str, Any]:
    """The ``quantization_config``: every Linear but those named in ``ignore``."""
    package = _package()
    from compressed_tensors.quantization import QuantizationConfig

    quantised = {layer.name for layer in report}
    ignored = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in quantised]
    whole = QuantizationConfig(
        config_groups={"group_0": _scheme(form)}, format=form.name, quantization_status="compressed", ignore=ignored
    )
    content: dict[str, Any] = json.loads(whole.model_dump_json(exclude_none=True))
    return {"version": package.__version__, **content}


def _write_sidecar(folder: Path, sidecar: Sidecar, weights: Mapping[str, Tensor]) -> None:
    # The card that was copied from the source describes its weights and figures.
    sidecar = write_card(folder, sidecar)
    (folder / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
    shapes = {one.parameter: one.shape for one in sidecar.report}
    with SafetensorsWriter(folder / MASKS, masks_header(shapes)) as writer:
        for name in shapes:
            packer = BitPacker(writer.write)
            packer.add((weights[name] != 0).cpu())
            packer.finish()


def _check_files(folder: Path, weights: Mapping[str, Tensor], report: QuantizationReport, pruned: PruneReport | None) -> None:
    """Read the file back, and check its numbers, its zeros and the patterns."""
    tensors = unpacked(open_source(folder)).tensors
    for layer in report:
        stored = stored_values(weights[layer.parameter], layer).cpu()
        read = tensors[layer.parameter].read().view(stored.shape)
        if not torch.equal(read.view(torch.uint8), stored.view(torch.uint8)):
            raise CheckpointError(folder / WEIGHTS, "differs from what was written", "check the disk", tensor=layer.parameter)
        if bool(((read.float() != 0) & (weights[layer.parameter].cpu() == 0)).any()):
            raise PatternError(f"{layer.name}: zero weights were stored as non-zero")
    for one in pruned or ():
        verify_stored(StoredLayer(one.name, tensors[one.parameter], one.layout, parse_pattern(one.pattern))).check()
