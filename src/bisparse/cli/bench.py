"""`bisparse bench`: which layers of a model are faster sparse on this device, and why the others are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    command,
    parse_pattern_option,
    parse_source,
    print_json,
    progress_bar,
    refuse_given,
    to_stdout,
)
from bisparse.cli.tables import grouped, print_left_dense, print_table

if TYPE_CHECKING:
    from bisparse.accelerate import Advice, DevicePrediction, LayerAdvice, LayerShape, Pass
    from bisparse.layers import Skipped
    from bisparse.pattern import Structure

__all__ = ["bench"]

DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("auto", "cusparselt", "cutlass", "cpu", "reference")


@command
def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="CHECKPOINT|OxI",
            help="A checkpoint, module:function returning a model, or a layer's size such as 4096x14336.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Rows of a layer's input: batch times length.")] = 16384,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern", "-p", help="Assume that layers are pruned to this, such as 2:4-T. By default, the weights as they are."
        ),
    ] = None,
    inference: Annotated[bool, typer.Option("--inference", help="Measure the forward pass only.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or, on a CPU with --inference, float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option("--device", help="By default CUDA if available.")] = None,
    backend: Annotated[str, typer.Option("--backend", help=f"{', '.join(BACKENDS)}.")] = "auto",
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Predict from this file of times, measured on another machine.",
        ),
    ] = None,
    device_name: Annotated[
        str | None,
        typer.Option("--device-name", metavar="GPU", help="Predict layer by layer for this GPU: A100, H100, B200, RTX4090, ..."),
    ] = None,
    include: Included = None,
    exclude: Excluded = None,
    as_json: AsJson = False,
) -> None:
    """Measure every layer dense and sparse, forward and backward, on this device: which ones are faster sparse, and why.

    On a CPU with --inference, measures products of packed weights. If nothing can be measured, times are predicted from a grid;
    without one, only shapes, bytes and FLOPs are shown, which are exact. Finally, public measurements of forward products predict
    the times on A100, H100, B200, RTX 4090, RTX 5080 and GB10, at 2:4, 4:6 and 6:8, as if all layers were pruned to it.
    """
    for value, known, option in ((dtype, DTYPES, "--dtype"), (backend, BACKENDS, "--backend")):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    structure = None if pattern is None else parse_pattern_option(pattern)
    import torch

    from bisparse.accelerate import advise_shapes, predict_products

    predicts = dtype != "float32" or device_name is not None  # no GPU was measured in float32
    if predicts:
        predict_products([], tokens, dtype=dtype, device=device_name)  # refuses unknown names before anything is measured
    shapes, left = _shapes(model, structure, include, exclude)
    with progress_bar(show=not as_json) as progress:
        advice = advise_shapes(
            shapes,
            tokens,
            left=left,
            dtype=getattr(torch, dtype),
            device=device,
            backend=backend,  # type: ignore[arg-type]
            training=not inference,
            grid=grid,
            progress=progress,
        )
    predicted = predict_products(shapes, tokens, dtype=dtype, device=device_name) if predicts else ()
    if as_json:
        content = {"ok": True, "speedup": advice.speedup, **advice.as_dict()}
        print_json({**content, "predicted": [one.as_dict() for one in predicted]})
    else:
        _show(advice)
        if shapes and predicted:
            _show_predicted(predicted, layers=device_name is not None)


def _shapes(
    subject: str, pattern: Structure | None, include: list[str] | None, exclude: list[str] | None
) -> tuple[list[LayerShape], list[Skipped]]:
    from bisparse.accelerate.advisor import layer_shapes, shape_at

    if size := re.fullmatch(r"([1-9]\d{0,6})[x×]([1-9]\d{0,6})", subject):
        refuse_given("requires a model, not a size", "--include", "--exclude")
        return [shape_at(subject, (int(size[1]), int(size[2])), pattern or "2:4-T")], []
    if Path(subject).exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", subject):
        return _stored(parse_source(subject, "--model"), pattern, include, exclude)
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", subject):
        raise typer.BadParameter(
            f"{subject} is neither a checkpoint, nor module:function, nor a size such as 4096x14336", param_hint="--model"
        )
    from bisparse.cli.model_source import open_source

    return layer_shapes(open_source(subject).model, pattern, include, exclude)


def _stored(
    path: Path, pattern: Structure | None, include: list[str] | None, exclude: list[str] | None
) -> tuple[list[LayerShape], list[Skipped]]:
    from dataclasses import replace

    from bisparse.accelerate import LayerShape
    from bisparse.accelerate.advisor import shape_at
    from bisparse.checkpoint import plan_checkpoint
    from bisparse.checkpoint.verify import verify_stored
    from bisparse.layers import Skipped
    from bisparse.pattern import Pattern
    from bisparse.tiles import LayoutKind

    plan = plan_checkpoint(path, pattern or "2:4-T", include=include, exclude=exclude)
    shapes, left = [], list(plan.left_dense)
    for layer in plan.layers:
        if layer.layout.kind is not LayoutKind.LINEAR or layer.tensor.name.rpartition(".")[2] != "weight":
            left.append(Skipped(layer.name, f"not an nn.Linear ({layer.layout} layout): only nn.Linear runs sparse so far"))
            continue
        size = (layer.tensor.shape[0], layer.tensor.shape[1])
        if pattern is not None:
            shapes.append(shape_at(layer.name, size, pattern))
            continue
        plain = verify_stored(replace(layer, pattern=Pattern(2, 4)))
        reason = ""
        if plain.density == 1.0:
            reason = "its weight is dense: prune it first; --pattern 2:4-T shows what that would gain"
        elif plain.first is not None:
            reason = (
                f"its weight is not 2:4: row {plain.first.row}, columns {4 * plain.first.group} to {4 * plain.first.group + 3}"
            )
        shapes.append(LayerShape(layer.name, size, not reason and bool(verify_stored(layer)), reason, plain.density))
    return shapes, left


def _show(advice: Advice) -> None:
    from bisparse.accelerate.backends.base import token_count

    console = to_stdout()
    passes = "forward and backward, float32 weights under autocast" if advice.training else "forward"
    if advice.source == "exact":
        console.print(f"No times are known: {advice.note}. The figures below are exact.", markup=False, soft_wrap=True)
    else:
        console.print(
            f"{advice.source.capitalize()} on {advice.device}: {token_count(advice.tokens)}, {advice.dtype}, {passes}; medians.",
            markup=False,
            soft_wrap=True,
        )
    rows = []
    for name, group in grouped(advice.layers, lambda one: one.name, lambda one: (one.shape, one.convert, one.reason)):
        rows.append((name, str(len(group)), *_cells(group[0])))
    times = (" dense f + b ms", " sparse f + b ms", " peak MB")
    headings = ("layer", " n", " out x in", " GFLOP", *times, " weight MB", "advice")
    print_table(console, headings, rows)
    print_left_dense(console, advice.left_dense)
    console.print()
    console.print(f"{advice}.", markup=False, soft_wrap=True)


def _show_predicted(predicted: tuple[DevicePrediction, ...], *, layers: bool) -> None:
    from bisparse.accelerate.backends.base import token_count

    console, patterns = to_stdout(), ("2:4", "4:6", "6:8")
    console.print()
    console.print(
        f"Predicted from public measurements of products (forward only, no packing, no activation lifting; bcacdwk/vllmbench), "
        f"{token_count(predicted[0].tokens)}, {predicted[0].dtype}, as if all layers were pruned:",
        markup=False,
        soft_wrap=True,
    )
    rows = []
    for one in predicted:
        won = (f"{one.speedup[pattern]:.2f}x ({_wins(one.wins_from[pattern])})" for pattern in patterns)
        rows.append((one.device, f"{one.dense_us / 1e3:.3f}", *won, one.note))
    print_table(console, ("GPU", " dense ms", *(f" {one} (wins from tokens)" for one in patterns), "note"), rows)
    for one in predicted if layers else ():
        rows = []
        for name, group in grouped(one.layers, lambda layer: layer.name, lambda layer: layer.shape):
            times = (f"{group[0].sparse_us[pattern]:.1f}" for pattern in patterns)
            shape = " x ".join(map(str, group[0].shape))
            rows.append((name, str(len(group)), shape, f"{group[0].dense_us:.1f}", *times, group[0].note))
        console.print()
        print_table(
            console, ("layer", " n", " out x in", " dense us", *(f" {pattern} us" for pattern in patterns), "times of"), rows
        )


def _wins(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def _cells(layer: LayerAdvice) -> tuple[str, ...]:
    timing = layer.timing

    def shown(one: Pass) -> str:
        return f"{one.forward_ms:.3f} + {one.backward_ms:.3f}"

    peaks = (timing.dense.peak_bytes, timing.sparse.peak_bytes) if timing is not None else (None, None)

    what = {True: f"sparse, {layer.backend}: {layer.reason}", False: f"dense: {layer.reason}", None: "not known"}[layer.convert]
    return (
        " x ".join(map(str, layer.shape)),
        f"{layer.forward_flops / 1e9:,.2f}",
        "" if timing is None else shown(timing.dense),
        "" if timing is None else shown(timing.sparse),
        "" if peaks[0] is None or peaks[1] is None else f"{peaks[0] / 1e6:,.1f} -> {peaks[1] / 1e6:,.1f}",
        f"{layer.dense_bytes / 1e6:,.2f} -> {layer.sparse_bytes / 1e6:,.2f}",
        what,
    )
