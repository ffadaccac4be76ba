"""`bisparse prune`: a checkpoint in, a checkpoint with the best masks and their proofs out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bisparse.cli.before_after import EvalText, EvalTokens, parse_measurement
from bisparse.cli.budget import BudgetOption, parse_patterns
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
    parse_order,
)
from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Key,
    Layouts,
    Threads,
    command,
    is_function,
    parse_layout_options,
    parse_pattern_option,
    refuse_given,
    set_threads,
)
from bisparse.cli.deploy import Export, Quantize, check_deployment
from bisparse.cli.prune_job import CalibrationSettings, PruneJob, prune_by_magnitude, prune_calibrated
from bisparse.cli.steps import Steps

if TYPE_CHECKING:
    from bisparse.pattern import Structure

__all__ = ["prune"]


@command
def prune(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of weights (sharded or not), a safetensors or torch file under any name, or a model in the local "
            "Hugging Face cache, org/name. With --method also .gguf, or module:function returning (model, batches)."
        ),
    ],
    target: Annotated[
        Path | None, typer.Argument(help="The folder to write; it must not exist. Not needed with --dry-run.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            "-p",
            metavar="PATTERN",
            help="2:4, 4:8-T, 16:32-T, 4:8-seq, 50%, ... N is the number KEPT. By default 4:8-T. With --budget, repeat it: one "
            "choice each, which may be dense.",
        ),
    ] = None,
    budget: BudgetOption = None,
    include: Included = None,
    exclude: Excluded = None,
    key: Key = None,
    layer_pattern: Annotated[
        list[str] | None,
        typer.Option("--layer-pattern", metavar="GLOB=PATTERN", help="A different pattern for some layers. May be repeated."),
    ] = None,
    layout: Layouts = None,
    remainder: Annotated[str, typer.Option(help="What to do if M does not divide a layer's sides: pad, dense or error.")] = "pad",
    solver: Annotated[
        str | None,
        typer.Option(help="For transposable patterns: a name in bisparse.solvers.SOLVERS, such as greedy. Default: exact."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="magnitude, wanda, sparsegpt, adaprune, alps or another of bisparse.pruning.METHODS. All but magnitude "
            "build the model and need calibration data."
        ),
    ] = "magnitude",
    calibration: Calibration = None,
    text_field: TextField = None,
    sequences: Sequences = 256,
    length: Length = 512,
    order: Order = "sequential",
    block_epochs: BlockEpochs = 0,
    network_epochs: NetworkEpochs = 0,
    network_sequences: NetworkSequences = None,
    expert_floor: ExpertFloor = None,
    damping: Damping = None,
    device: Device = None,
    resume: Resume = None,
    quantize: Quantize = None,
    export: Export = None,
    evaluate: EvalText = None,
    eval_tokens: EvalTokens = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which layers would be pruned and which not, and why; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that bisparse wrote.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint: by magnitude, every layer gets the best possible mask, with a proof.

    Pruning by magnitude does not build the model and needs little memory. With --method and --calibration, a transformers
    model, or the one that your module:function returns, is pruned block by block, using the inputs of its layers.

    The target has plain dense weights with zeros, which load anywhere, bisparse.json (what was done to each layer) and the
    masks. It only appears once it is complete, even if the job is killed.
    """
    structure, choices = parse_patterns(pattern, budget, layer_pattern)
    patterns = dict(_layer_pattern(text) for text in layer_pattern or ())
    layers = dict(include=include, exclude=exclude, patterns=patterns, remainder=remainder, layouts=parse_layout_options(layout))
    if remainder not in ("pad", "dense", "error"):
        raise typer.BadParameter(f"{remainder!r} is not one of pad, dense, error", param_hint="--remainder")
    if target is None and not dry_run:
        raise typer.BadParameter("missing; name the folder to write, or pass --dry-run", param_hint="TARGET")
    chosen_order = parse_order(order)
    check_deployment(
        str(source),
        target,
        quantize,
        export,
        dry_run=dry_run,
        overwrite=overwrite,
        resume=resume is not None,
        as_json=as_json,
    )
    measurement = parse_measurement(source, None if dry_run else target, evaluate, eval_tokens, as_json=as_json)
    set_threads(threads)
    texts = TextFiles(calibration, text_field, sequences, length, network_sequences)
    job = PruneJob(source, target, structure, {**layers, **choices}, solver, key, overwrite, as_json, texts)
    on_files = method == "magnitude" and not (block_epochs or network_epochs) and not choices and not is_function(source)
    if on_files:
        refuse_given("needs a --method other than magnitude, such as adaprune", *NEED_DATA)
        if not (quantize or export or evaluate):
            refuse_given("needs a --method other than magnitude, such as adaprune, or a step after the pruning", "--resume")
    elif calibration is None:
        refuse_given("requires --calibration", *NEED_TEXT)

    def run(step: str | None) -> None:
        if on_files:
            prune_by_magnitude(job, step)
        else:
            settings = CalibrationSettings(
                method, damping, chosen_order, block_epochs, network_epochs, expert_floor, device, resume
            )
            prune_calibrated(job, settings, step)

    if dry_run or target is None:
        run(None)
        return
    made_by = {"pattern": structure, **job.layers, "solver": solver, "key": key, "method": method, "damping": damping}
    made_by |= {"order": order, "block_epochs": block_epochs, "network_epochs": network_epochs, "expert_floor": expert_floor}
    made_by["network_sequences"] = network_sequences
    Steps(source, target, texts, quantize, export, measurement, overwrite, resume, made_by).run(run)


def _layer_pattern(text: str) -> tuple[str, Structure]:
    name, _, pattern = text.rpartition("=")
    if not name:
        raise typer.BadParameter(f"{text!r}: expected GLOB=PATTERN, such as '*.k_proj=2:4'", param_hint="--layer-pattern")
    return name, parse_pattern_option(pattern, "--layer-pattern")
