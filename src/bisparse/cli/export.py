"""`bisparse export`: writes a model as an ONNX file, verifies it and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bisparse.cli.calibration_options import Calibration, Sequences
from bisparse.cli.console import AsJson, Threads, command, refuse_given, set_threads
from bisparse.cli.deploy import export_folder, show_export

__all__ = ["export"]


@command
def export(
    source: Annotated[
        str, typer.Argument(help="A transformers folder, a .gguf file, or module:function returning (model, batches).")
    ],
    target: Annotated[Path, typer.Argument(help="The file to write, such as model.onnx; it must not exist.")],
    to: Annotated[str, typer.Option("--to", help="The format: onnx.")] = "onnx",
    length: Annotated[int, typer.Option(min=2, help="Tokens of the traced example; the exported model takes any number.")] = 16,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="int8: weights as int8 behind DequantizeLinear nodes.")
    ] = None,
    int8_inputs: Annotated[
        bool,
        typer.Option(
            "--int8-inputs", help="Round the inputs of quantised layers to int8, too; needs --quantize and --calibration."
        ),
    ] = False,
    method: Annotated[str, typer.Option(help="Method of --quantize: rtn, or gptq with calibration data.")] = "rtn",
    calibration: Calibration = None,
    sequences: Sequences = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as an ONNX file in float32, with any batch size and length; weights keep their zeros.

    The file's weights are compared with the model's, the pattern of a pruned model is verified along the axis that TensorRT's
    2:4 kernels need, and outputs are compared in onnxruntime.
    """
    if to != "onnx":
        raise typer.BadParameter(f"{to!r} is not one of: onnx", param_hint="--to")
    if method not in ("rtn", "gptq"):
        raise typer.BadParameter(f"{method!r} is not one of rtn, gptq", param_hint="--method")
    if quantize is None and (method != "rtn" or calibration is not None):
        raise typer.BadParameter("requires --quantize int8", param_hint="--method" if method != "rtn" else "--calibration")
    if int8_inputs and quantize is None:
        raise typer.BadParameter("requires --quantize int8", param_hint="--int8-inputs")
    if calibration is None:
        refuse_given("requires --calibration", "--sequences")
    set_threads(threads)
    made = export_folder(
        source,
        target,
        length=length,
        quantize=quantize,
        int8_inputs=int8_inputs,
        method=method,
        calibration=calibration,
        sequences=sequences,
        overwrite=overwrite,
    )
    show_export(made, as_json)
