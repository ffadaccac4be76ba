"""Quantise and export folders, and print the results: shared by `quantize`, `export` and `prune --quantize --export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.console import command_line, print_json, print_written, to_stdout
from bisparse.cli.tables import grouped, print_left_dense, print_table

if TYPE_CHECKING:
    from bisparse.export import OnnxExport
    from bisparse.quantization import QuantizationReport

__all__ = ["Export", "Quantize", "check_deployment", "export_folder", "places", "quantize_folder", "show_export"]

Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Afterwards quantise TARGET into TARGET-SCHEME, as `bisparse quantize` does: int8, int4-g64, fp8, ... Uses gptq "
        "with --calibration, otherwise rtn.",
    ),
]
Export = Annotated[
    str | None,
    typer.Option("--export", metavar="FORMAT", help="Afterwards write TARGET.onnx, as `bisparse export` does: onnx."),
]


def places(target: Path, quantize: str | None, export: str | None) -> tuple[Path | None, Path | None]:
    """The quantised folder and the exported file of `prune`, next to its target; None for each that is not wanted."""
    folder = None if quantize is None else target.with_name(f"{target.name}-{quantize}")
    return folder, None if export is None else target.with_name(f"{target.name}.onnx")


def check_deployment(
    source: str,
    target: Path | None,
    quantize: str | None,
    export: str | None,
    *,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Refuse options that cannot work, before anything is pruned.

    Args:
        resume: outputs that exist may be this job's; they are checked when it reaches them.
    """
    if quantize is None and export is None:
        return
    hint = "--quantize" if quantize is not None else "--export"
    if dry_run or target is None:
        raise typer.BadParameter("does not work with --dry-run", param_hint=hint)
    if as_json:
        raise typer.BadParameter("does not work with --json: run `bisparse quantize` or `export` afterwards", param_hint=hint)
    if not Path(source).is_dir() or not (Path(source) / "config.json").is_file():
        raise typer.BadParameter(f"requires a transformers folder with a config.json, which {source} is not", param_hint=hint)
    if quantize is not None:
        _check_scheme(quantize)
        import_for("compressed_tensors", "--quantize")
    if export is not None:
        _check_format(export)
        import_for("onnxscript", "--export")
    if resume:
        return
    from bisparse.checkpoint.atomic_folder import check_target
    from bisparse.errors import CheckpointError

    folder, file = places(target, quantize, export)
    if folder is not None:
        check_target(folder, overwrite)
    if file is not None and file.exists() and not overwrite:
        raise CheckpointError(file, "exists already", "choose another name, or pass overwrite (--overwrite)")


def quantize_folder(
    source: str,
    target: Path,
    scheme: str,
    *,
    method: str = "rtn",
    activations: str = "none",
    calibration: list[Path] | None = None,
    sequences: int = 128,
    length: int = 512,
    overwrite: bool = False,
    progress: bool = True,
    step: str | None = None,
    **options: Any,
) -> QuantizationReport:
    """Load a model, quantise its Linear layers and write the folder; options are those of `quantize_`.

    Args:
        step: the name of a step of `prune`, from which a resumed job recognises the folder.
    """
    from dataclasses import replace

    from bisparse.apart import check_apart
    from bisparse.checkpoint import atomic_folder as output
    from bisparse.cli.model_source import open_source, place_of
    from bisparse.export import can_be_stored, save_quantized
    from bisparse.layers import Skipped, find_layers
    from bisparse.quantization import quantize_

    _check_scheme(scheme)
    import_for("compressed_tensors", "quantize")
    check_apart(target, {"source": place_of(source), **{f"calibration text {one}": one for one in calibration or ()}})
    output.check_target(target, overwrite)
    output.check_writable(target)
    _check_plain(source)
    opened = open_source(source, tokenizer=calibration is not None)
    batches = _batches(opened, calibration, sequences, length)
    if method == "gptq" and batches is None:
        raise typer.BadParameter("missing; gptq needs calibration data", param_hint="--calibration")
    include, exclude = options.pop("include", None), options.pop("exclude", None)
    chosen, dense = find_layers(opened.model, include, exclude)
    linear = [one.name for one in chosen if can_be_stored(one.name, one.module)]
    others = [
        Skipped(one.name, f"{type(one.module).__name__}: compressed-tensors stores only Linear layers")
        for one in chosen
        if one.name not in linear
    ]
    if not linear:
        raise ValueError(f"{source}: none of its layers is a Linear, the only kind that compressed-tensors stores quantised")
    report = quantize_(opened.model, scheme, data=batches, method=method, include=linear, progress=progress, **options)
    refused = [one for one in report.left if one.name in linear]
    report = replace(report, left=(*dense, *others, *refused))
    said = {
        "command": shlex.join(["bisparse", *command_line()]),
        "source": source,
        "calibration": [str(one) for one in calibration or ()],
        **({} if step is None else {"step": step}),
    }
    beside = getattr(opened.tokenizer, "save_pretrained", None) if opened.folder is None else None
    save_quantized(
        opened.model,
        target,
        report,
        activations=activations,
        source=opened.folder,
        overwrite=overwrite,
        provenance=said,
        beside=beside,
    )
    return report


def export_folder(
    source: str,
    target: Path,
    *,
    length: int = 16,
    quantize: str | None = None,
    int8_inputs: bool = False,
    method: str = "rtn",
    calibration: list[Path] | None = None,
    sequences: int = 128,
    calibration_length: int | None = None,
    overwrite: bool = False,
    step: str | None = None,
) -> OnnxExport:
    """Load a model, quantise it if requested, and write it as an ONNX file in float32; `step` is as for `quantize_folder`."""
    import torch

    from bisparse.apart import check_apart
    from bisparse.checkpoint import read_sidecar
    from bisparse.cli.model_source import open_source, place_of
    from bisparse.export import export_onnx
    from bisparse.quantization import quantize_

    if quantize not in (None, "int8"):
        raise typer.BadParameter(f"{quantize!r}: ONNX files are written with int8 weights only", param_hint="--quantize")
    import_for("onnxscript", "export")
    check_apart(target, {"source": place_of(source), **{f"calibration text {one}": one for one in calibration or ()}})
    _check_plain(source)
    opened = open_source(source)
    model = opened.model.float()
    report = batches = None
    if quantize is not None:
        batches = _batches(opened, calibration, sequences, calibration_length)
        if int8_inputs and not batches:
            raise typer.BadParameter("needs typical inputs: pass --calibration TEXT", param_hint="--int8-inputs")
        report = quantize_(model, quantize, method=method, data=batches, progress=True)
    sidecar = None if opened.folder is None else read_sidecar(opened.folder)
    patterns = None if sidecar is None or not sidecar.report.layers else {one.name: one.pattern for one in sidecar.report}
    said = {"bisparse.command": shlex.join(["bisparse", *command_line()]), "bisparse.source": source}
    return export_onnx(
        model,
        target,
        _example(opened, length, torch),
        pattern=patterns,
        quantized=report,
        overwrite=overwrite,
        metadata=said if step is None else {**said, "bisparse.step": step},
        int8_inputs=batches if int8_inputs else None,
    )


def show_quantization(report: QuantizationReport, target: Path, as_json: bool = False) -> None:
    """Print a quantisation report."""
    if as_json:
        print_json({"ok": True, "target": str(target), **report.as_dict()})
        return
    console = to_stdout()

    def mean(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.4f}" if known else "-"

    rows = [
        (
            name,
            str(len(group)),
            " x ".join(map(str, group[0].shape)),
            mean([one.density_before for one in group]),
            mean([one.density for one in group]),
            mean([one.weight_error for one in group]),
            mean([one.error_rounded for one in group]),
            mean([one.error for one in group]),
        )
        for name, group in grouped(report, lambda one: one.name, lambda one: one.shape)
    ]
    heads = ("layer", " n", " shape", " density", " after", " weight error", " output error rounded", " now")
    print_table(console, heads, rows)
    print_left_dense(console, report.left, "not quantised")
    console.print()
    console.print(f"[bold green]{report}[/]; {report.time_s:.1f} s.", highlight=False)
    from bisparse.checkpoint.atomic_folder import SIDECAR

    print_written(target, dense=not (target / SIDECAR).exists())


def show_export(export: OnnxExport, as_json: bool = False) -> None:
    """Print what was exported and how it was checked."""
    if as_json:
        from dataclasses import asdict

        print_json({"ok": True, **asdict(export)})
        return
    console = to_stdout()
    shapes = "; ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in export.inputs.items())
    console.print(f"Inputs: {shapes}. Output: {export.output}.", markup=False)
    console.print(f"{export.weights} matrices in the file are bit-identical to the model's.")
    if export.unmatched:
        console.print(
            f"Not compared, since the file has no weights of these names: {', '.join(export.unmatched[:8])}.", style="yellow"
        )
    if export.int8_inputs:
        console.print(f"{export.int8_inputs} layers round their inputs to int8.")
    for pattern, layers in export.verified.items():
        console.print(f"{pattern} holds on {layers} layers along the reduction axis of the graph.")
    if export.unverified:
        examples = "; ".join(f"{one.name} ({one.reason})" for one in export.unverified[:4])
        more = f"; and {len(export.unverified) - 4} more" if len(export.unverified) > 4 else ""
        console.print(f"Pattern not checked: {examples}{more}.", style="yellow", markup=False, soft_wrap=True)
    if export.difference is not None:
        console.print(f"onnxruntime: outputs differ by at most {export.difference:.2e} (largest output {export.largest:.3g}).")
    else:
        console.print(f"Outputs were not compared: {export.note}", style="yellow", markup=False)
    console.print(f"Written to {export.path}.", markup=False, soft_wrap=True)


def import_for(package: str, what: str) -> None:
    """Raise ImportError before a model is loaded if a package is not installed."""
    from importlib.util import find_spec

    from bisparse.errors import install_extra

    if find_spec(package) is None:
        raise ImportError(f"{what} needs {package}; {install_extra('serve')}")


def _check_scheme(name: str) -> None:
    from bisparse.quantization import parse_scheme

    try:
        parse_scheme(name)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("scheme="), param_hint="SCHEME") from error


def _check_format(name: str) -> None:
    if name != "onnx":
        raise typer.BadParameter(f"{name!r} is not one of: onnx", param_hint="--export")


def _check_plain(source: str) -> None:
    """Refuse a folder whose weights are quantised already."""
    from bisparse.checkpoint.reader import open_source
    from bisparse.errors import CheckpointError

    if Path(source).is_dir() and open_source(source).config.get("quantization_config"):
        raise CheckpointError(source, "is already quantised, by its config.json", "start from the unquantised model")


def _batches(opened: Any, calibration: list[Path] | None, sequences: int, length: int | None) -> list[Any] | None:
    from bisparse.cli.calibration_text import batches_for

    if calibration is None:
        batches: list[Any] | None = opened.batches
        return batches
    if opened.tokenizer is None:
        raise typer.BadParameter("text requires a transformers model", param_hint="--calibration")
    return batches_for(opened.model, opened.tokenizer, calibration, sequences=sequences, length=length).batches


def _example(opened: Any, length: int, torch: Any) -> Any:
    """An example input: token ids and a mask for a transformers model, or the function's first batch."""
    if opened.tokenizer is None:
        if not opened.batches:
            raise typer.BadParameter(
                "the function must return (model, batches): the first batch is the example", param_hint="SOURCE"
            )
        return opened.batches[0]
    vocabulary = getattr(opened.model.config, "vocab_size", None) or len(opened.tokenizer)
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
