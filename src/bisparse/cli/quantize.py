"""`bisparse quantize`: writes a model as a quantised compressed-tensors folder; zeros stay zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bisparse.cli.calibration_options import Calibration, Device, Length, Sequences, parse_device
from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Layouts,
    Threads,
    command,
    parse_layout_options,
    refuse_given,
    set_threads,
)
from bisparse.cli.deploy import quantize_folder, show_quantization

__all__ = ["quantize"]


@command
def quantize(
    source: Annotated[str, typer.Argument(help="A transformers folder, a .gguf file, or module:function.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme", "-s", help="int8, fp8 (a scale per output channel), int4-g32, int4-g64, int4-g128 or fp4 (NVFP4)."
        ),
    ] = "int8",
    method: Annotated[
        str, typer.Option(help="rtn: round to nearest; gptq: later columns compensate for the error, with calibration data.")
    ] = "rtn",
    activations: Annotated[
        str, typer.Option(help="none: weights only; dynamic: engines also round inputs, per token (int8 and fp8).")
    ] = "none",
    calibration: Calibration = None,
    sequences: Sequences = 128,
    length: Length = 512,
    damping: Annotated[
        float, typer.Option(min=0, help="Ridge parameter of gptq, in units of the mean square of an input.")
    ] = 0.01,
    include: Included = None,
    exclude: Excluded = None,
    layout: Layouts = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that this command wrote.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Quantise the Linear layers of a model; zero weights stay exactly zero.

    The target is a compressed-tensors folder, which transformers and vLLM load. The file is read back and compared, and the
    patterns of a pruned model are verified on it.
    """
    if method not in ("rtn", "gptq"):
        raise typer.BadParameter(f"{method!r} is not one of rtn, gptq", param_hint="--method")
    if activations not in ("none", "dynamic"):
        raise typer.BadParameter(f"{activations!r} is not one of none, dynamic", param_hint="--activations")
    if method == "rtn":
        refuse_given("requires --method gptq", "--damping")
    if calibration is None:
        refuse_given("requires --calibration", "--sequences", "--length")
    set_threads(threads)
    report = quantize_folder(
        source,
        target,
        scheme,
        method=method,
        activations=activations,
        calibration=calibration,
        sequences=sequences,
        length=length,
        overwrite=overwrite,
        progress=not as_json,
        include=include,
        exclude=exclude,
        layouts=parse_layout_options(layout),
        damping=damping,
        device=parse_device(device),
    )
    show_quantization(report, target, as_json)
