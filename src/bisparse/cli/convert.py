"""`bisparse convert`: from one mask type to another, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

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
    finish,
    group_of_ranks,
    open_job,
    parse_device,
    parse_method,
    parse_order,
    parse_reconstruction,
    provenance,
)
from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Layouts,
    Threads,
    command,
    parse_layout_options,
    parse_pattern_option,
    parse_solver_option,
    set_threads,
)

__all__ = ["convert"]


@command
def convert(
    source: Annotated[str, typer.Argument(help="A transformers folder, or module:function returning (model, batches).")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[str, typer.Option("--to", "-t", help="The new pattern: 2:4, 4:8-T, 4:8-paired, ... N is the number KEPT.")],
    method: Annotated[str | None, typer.Option(help="By default adaprune with calibration data, else magnitude.")] = None,
    calibration: Calibration = None,
    sequences: Sequences = 256,
    length: Length = 512,
    regrow: Annotated[bool, typer.Option("--regrow", help="Fill places that are free in the new pattern.")] = False,
    order: Order = "sequential",
    block_epochs: BlockEpochs = 0,
    damping: Damping = None,
    include: Included = None,
    exclude: Excluded = None,
    layout: Layouts = None,
    solver: Annotated[str | None, typer.Option(help="For transposable patterns. Default: exact.")] = None,
    device: Device = None,
    resume: Resume = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that bisparse wrote.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model's masks, the non-zeros of its weights, to another pattern, and fit the weights to calibration data.

    What was pruned stays pruned unless it may re-grow. Reports each layer's pattern violation and output error.
    """
    structure = parse_pattern_option(to, "--to")
    layouts = parse_layout_options(layout)
    set_threads(threads)
    from bisparse.pruning import convert_

    chosen_order = parse_order(order)
    chosen = None if method is None and damping is None else parse_method(method or "adaprune", damping)
    asked = {"--regrow": regrow, "--block-epochs": block_epochs > 0}
    if chosen is not None:
        asked[chosen.name] = bool(chosen.needs)
    opened, batches = open_job(source, target, calibration, sequences, length, overwrite=overwrite, resume=resume, asked=asked)
    made_from = provenance(source, calibration, batches, length, chosen_order)
    started = time.perf_counter()
    with group_of_ranks() as group:
        report = convert_(
            opened.model,
            structure,
            chosen,
            batches,
            regrow=regrow,
            include=include,
            exclude=exclude,
            layouts=layouts,
            solver=parse_solver_option(solver),
            order=chosen_order,
            reconstruction=parse_reconstruction(block_epochs, order),
            device=parse_device(device),
            resume=resume,
            keep_journal=True,
            progress=False if as_json else None,
            group=group,
        )
        finish(opened, target, report, made_from, overwrite, time.perf_counter() - started, as_json, resume, group)
