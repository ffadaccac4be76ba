"""`bisparse convert`: converts masks to another pattern, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bisparse.cli.calibrated import batches_of, finish, group_of_ranks, on_first_rank, open_job, provenance, with_samples
from bisparse.cli.calibration_options import (
    NEED_DATA,
    NEED_TEXT,
    BlockEpochs,
    Calibration,
    Damping,
    Device,
    ExpertFloor,
    Length,
    NetworkEpochs,
    NetworkSequences,
    Order,
    Resume,
    Sequences,
    TextField,
    TextFiles,
    parse_device,
    parse_expert_floor,
    parse_method,
    parse_order,
    parse_reconstruction,
)
from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Key,
    Layouts,
    Threads,
    command,
    parse_layout_options,
    parse_pattern_option,
    parse_solver_option,
    print_json,
    progress_bar,
    refuse_given,
    set_threads,
    shows_progress,
    to_stdout,
)

__all__ = ["convert"]


@command
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A transformers folder, a model in the local Hugging Face cache (org/name), or module:function returning "
            "(model, batches); with --to-dense, any checkpoint."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[
        str | None, typer.Option("--to", "-t", help="The new pattern: 2:4, 4:8-T, 4:8-paired, ... N is the number KEPT.")
    ] = None,
    to_dense: Annotated[
        bool,
        typer.Option(
            "--to-dense",
            help="Write a checkpoint that is stored packed or masked as plain weights, unchanged, which load anywhere.",
        ),
    ] = False,
    key: Key = None,
    method: Annotated[str | None, typer.Option(help="By default adaprune with calibration data, otherwise magnitude.")] = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    sequences: Sequences = 256,
    length: Length = 512,
    regrow: Annotated[
        bool, typer.Option("--regrow", help="Use free places of the new pattern for weights that were pruned.")
    ] = False,
    order: Order = "sequential",
    block_epochs: BlockEpochs = 0,
    network_epochs: NetworkEpochs = 0,
    network_sequences: NetworkSequences = None,
    expert_floor: ExpertFloor = None,
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
    """Convert a model's masks (the non-zeros of its weights) to another pattern, and fit the weights to calibration data.

    Pruned weights stay pruned without --regrow. Reports each layer's pattern violation and output error.

    With --to-dense, only the storage changes: compressed-tensors' bit masks, torch's semi-structured tensors, weight_orig
    and weight_mask, and training checkpoints become plain weights with zeros.
    """
    if to_dense:
        fits = ("--block-epochs", "--network-epochs", "--regrow", "--resume", "--solver", "--threads")
        others = ("--to", "--method", "--include", "--exclude", "--layout", *NEED_DATA, *fits)
        refuse_given("does not work with --to-dense, which changes no weight", *others)
        on_first_rank(lambda: _write_dense(source, target, key, overwrite, as_json))
        return
    if to is None:
        raise typer.BadParameter("missing; pass a pattern, or --to-dense", param_hint="--to")
    if key is not None:
        raise typer.BadParameter("requires --to-dense", param_hint="--key")
    if calibration is None:
        refuse_given("requires --calibration", *NEED_TEXT)
    structure = parse_pattern_option(to, "--to")
    layouts = parse_layout_options(layout)
    set_threads(threads)
    from bisparse.pruning import convert_

    chosen_order = parse_order(order)
    chosen = None if method is None and damping is None else parse_method(method or "adaprune", damping)
    asked = {"--regrow": regrow, "--block-epochs": block_epochs > 0, "--network-epochs": network_epochs > 0}
    if chosen is not None:
        asked[chosen.name] = bool(chosen.needs)
    texts = TextFiles(calibration, text_field, sequences, length, network_sequences)
    reconstruction = parse_reconstruction(block_epochs, network_epochs, order, texts)
    opened, data = open_job(source, target, texts, overwrite=overwrite, resume=resume, asked=asked)
    made_from = provenance(source, opened, texts, data, chosen_order)
    started = time.perf_counter()
    with group_of_ranks() as group:
        report = convert_(
            opened.model,
            structure,
            chosen,
            batches_of(data),
            regrow=regrow,
            include=include,
            exclude=exclude,
            layouts=layouts,
            solver=parse_solver_option(solver),
            order=chosen_order,
            reconstruction=with_samples(reconstruction, opened, texts),
            expert_floor=parse_expert_floor(expert_floor),
            device=parse_device(device),
            resume=resume,
            keep_journal=True,
            progress=shows_progress(as_json=as_json),
            group=group,
        )
        finish(opened, target, report, made_from, overwrite, time.perf_counter() - started, as_json, resume, group)


def _write_dense(source: str, target: Path, key: str | None, overwrite: bool, as_json: bool) -> None:
    from bisparse.checkpoint import to_dense

    with progress_bar(show=not as_json) as progress:
        read = to_dense(source, target, key=key, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"ok": True, "target": str(target), "files": read.files, "tensors": len(read.tensors), "notes": read.notes})
        return
    console = to_stdout()
    for note in read.notes:
        console.print(f"Note: {note}", markup=False)
    names = [target / name for name in read.files]
    places = str(names[0]) if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"
    console.print(
        f"{len(read.tensors)} tensors, {read.nbytes / 1e6:,.1f} MB, written as plain weights to {places}.",
        markup=False,
        soft_wrap=True,
    )
