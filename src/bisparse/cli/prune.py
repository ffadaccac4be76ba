"""`bisparse prune`: a checkpoint in, a checkpoint with provably best masks out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.calibrated import (
    BlockEpochs,
    Calibration,
    Damping,
    Device,
    Length,
    Order,
    Resume,
    Sequences,
    TextField,
    TextFiles,
    on_first_rank,
    parse_device,
    parse_method,
    parse_order,
    parse_reconstruction,
    plan_with_data,
    prune_with_data,
)
from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Key,
    Layouts,
    Threads,
    command,
    grouped,
    parse_layout_options,
    parse_pattern_option,
    parse_solver_option,
    parse_source,
    print_coverage,
    print_json,
    print_left_dense,
    progress_bar,
    set_threads,
    table,
    to_stdout,
)
from bisparse.cli.plan import Plan, PlannedLayer, show_plan

if TYPE_CHECKING:
    from bisparse.checkpoint import CheckpointPlan
    from bisparse.pattern import Structure
    from bisparse.results import LayerResult, PruneReport

__all__ = ["prune"]


@command
def prune(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of weights (sharded or not), a file of safetensors or torch, whatever its name, or a model in the "
            "local Hugging Face cache, org/name. With --method also .gguf, or module:function returning (model, batches)."
        ),
    ],
    target: Annotated[
        Path | None, typer.Argument(help="The folder to write; it must not exist. Not needed with --dry-run.")
    ] = None,
    pattern: Annotated[
        str, typer.Option("--pattern", "-p", help="2:4, 4:8-T, 16:32-T, 4:8-seq, 50%, ... N is the number KEPT.")
    ] = "4:8-T",
    include: Included = None,
    exclude: Excluded = None,
    key: Key = None,
    layer_pattern: Annotated[
        list[str] | None,
        typer.Option("--layer-pattern", metavar="GLOB=PATTERN", help="Another pattern for some layers. May be repeated."),
    ] = None,
    layout: Layouts = None,
    remainder: Annotated[str, typer.Option(help="Where M does not divide a layer's sides: pad, dense or error.")] = "pad",
    solver: Annotated[
        str | None,
        typer.Option(help="For transposable patterns: a name in bisparse.solvers.SOLVERS, such as greedy. Default: exact."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="magnitude, wanda, sparsegpt, adaprune, alps or another of bisparse.pruning.METHODS. With all but magnitude "
            "the model is built and needs calibration data."
        ),
    ] = "magnitude",
    calibration: Calibration = None,
    text_field: TextField = None,
    sequences: Sequences = 256,
    length: Length = 512,
    order: Order = "sequential",
    block_epochs: BlockEpochs = 0,
    damping: Damping = None,
    device: Device = None,
    resume: Resume = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be pruned and what not, and why; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that bisparse wrote.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint: the best mask there is for every layer, with the proof.

    By magnitude the model is not built and memory stays small. With --method and --calibration a transformers model, or
    what your module:function returns, is pruned by what its layers see, block by block.

    The target holds plain dense weights with zeros, so it loads anywhere, bisparse.json (what was done to which layer) and
    the masks. It is absent or whole, whenever the job is killed.
    """
    from bisparse.checkpoint import plan_checkpoint, prune_checkpoint

    structure = parse_pattern_option(pattern)
    patterns = dict(_layer_pattern(text) for text in layer_pattern or ())
    layouts = parse_layout_options(layout)
    if remainder not in ("pad", "dense", "error"):
        raise typer.BadParameter(f"{remainder!r} is not one of pad, dense, error", param_hint="--remainder")
    if target is None and not dry_run:
        raise typer.BadParameter("missing; name the folder to write, or pass --dry-run", param_hint="TARGET")
    chosen_order = parse_order(order)
    set_threads(threads)
    if method != "magnitude" or block_epochs or ":" in str(source):
        if key is not None:
            raise typer.BadParameter(
                "chooses a state dict in a torch file, which only magnitude pruning reads", param_hint="--key"
            )
        options = {"include": include, "exclude": exclude, "patterns": patterns, "remainder": remainder, "layouts": layouts}
        arguments: dict[str, Any] = dict(
            texts=TextFiles(calibration, text_field, sequences, length),
            overwrite=overwrite,
            as_json=as_json,
            **options,
            solver=parse_solver_option(solver),
            order=chosen_order,
            reconstruction=parse_reconstruction(block_epochs, order),
            device=parse_device(device),
            resume=resume,
        )
        chosen = parse_method(method, damping)
        if dry_run:
            on_first_rank(lambda: plan_with_data(str(source), target, structure, chosen, **arguments))
        else:
            assert target is not None
            prune_with_data(str(source), target, structure, chosen, **arguments)
        return
    unused = {
        "--calibration": calibration,
        "--text-field": text_field,
        "--damping": damping,
        "--device": device,
        "--resume": resume,
    }
    if given := [name for name, value in unused.items() if value is not None]:
        raise typer.BadParameter("has no use at --method magnitude; name another, such as adaprune", param_hint=given[0])
    source = parse_source(source, "SOURCE")
    if dry_run:
        plan = plan_checkpoint(
            source, structure, include=include, exclude=exclude, remainder=remainder, patterns=patterns, layouts=layouts, key=key
        )
        plan.source.check_writable()
        show_plan(_plan(plan, structure), as_json)
        return
    destination = target
    assert destination is not None

    def job() -> None:
        start = time.perf_counter()
        with progress_bar(show=not as_json) as progress:
            report = prune_checkpoint(
                source,
                destination,
                structure,
                include=include,
                exclude=exclude,
                solver=parse_solver_option(solver),
                remainder=remainder,
                patterns=patterns,
                layouts=layouts,
                key=key,
                overwrite=overwrite,
                progress=progress,
            )
        _print_report(report, destination, time.perf_counter() - start, as_json)

    on_first_rank(job)


def _layer_pattern(text: str) -> tuple[str, Structure]:
    name, _, pattern = text.rpartition("=")
    if not name:
        raise typer.BadParameter(f"{text!r}: expected GLOB=PATTERN, such as '*.k_proj=2:4'", param_hint="--layer-pattern")
    return name, parse_pattern_option(pattern, "--layer-pattern")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _plan(plan: CheckpointPlan, pattern: Structure) -> Plan:
    from bisparse.checkpoint.sidecar import MASKS, SIDECAR

    layers = [
        PlannedLayer(one.name, one.tensor.name, one.tensor.shape, one.tensor.dtype, one.layout, one.pattern)
        for one in plan.layers
    ]
    files = (*plan.source.files, SIDECAR, MASKS, *plan.source.others)
    total = sum(one.size for one in plan.source.tensors.values())
    return Plan(pattern, "magnitude", layers, plan.left_dense, plan.notes, total, plan.output_bytes, files)


def _print_report(report: PruneReport, target: Path, time_s: float, as_json: bool) -> None:
    if as_json:
        figures = {"density": report.density, "retained": report.retained, "gap": report.gap, "time_s": time_s}
        print_json({"ok": True, "target": str(target), **figures, **report.as_dict()})
        return
    console = to_stdout()
    groups = grouped(report, lambda one: one.name, lambda one: (one.shape, one.dtype, one.pattern))
    console.print(
        table(("layer", " n", " shape", "to", " density", " |w| kept", " gap at most"), [_row(*group) for group in groups])
    )
    print_left_dense(console, report.left_dense)
    console.print()
    for note in report.notes:
        console.print(f"Note: {note}", markup=False)
    retained = "" if report.retained is None else f"{report.retained:.2%} of |w| kept, "
    if report.gap is None:
        proof = "no proof of optimality with this solver"
    else:
        proof = "proved optimal" if _gap(report.gap) == "0" else f"proved within {_gap(report.gap)} of the optimum"
    console.print(
        f"[bold green]{len(report)} layers[/], {report.weights:,} weights: density {report.density:.4f}, {retained}{proof}; "
        f"{time_s:.1f} s, {report.time_s:.1f} s of it mask search and proof."
    )
    print_coverage(console, report.coverage)
    console.print(f"Written to {target}. Check it: bisparse verify {target}", markup=False, soft_wrap=True)


def _row(name: str, group: list[LayerResult]) -> tuple[str, ...]:
    first = group[0]
    weights = sum(one.size for one in group)

    def mean(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return "-"
        return f"{sum(value * one.size for value, one in zip(known, group, strict=True)) / weights:.4f}"

    gaps = [one.gap for one in group]
    worst = "-" if None in gaps else _gap(max(gap for gap in gaps if gap is not None))
    densities: list[float | None] = [one.density for one in group]
    return (
        name,
        str(len(group)),
        _shape(first.shape),
        first.pattern,
        mean(densities),
        mean([one.retained for one in group]),
        worst,
    )


def _gap(gap: float) -> str:
    # Below this there is only the rounding of two sums in double precision.
    return f"{gap:.0e}" if gap > 1e-13 else "0"
