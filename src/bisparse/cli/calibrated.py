"""Build a model, prune it with calibration data and save it: the steps that `prune --method` and `convert` share."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from bisparse.cli.calibration_options import TextFiles, fits_asked
from bisparse.cli.console import command_line, print_coverage, print_json, print_written, shows_progress, to_stdout
from bisparse.cli.tables import grouped, print_left_dense, print_table

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from bisparse.cli.calibration_text import TextBatches
    from bisparse.cli.model_source import Source
    from bisparse.pattern import Structure
    from bisparse.pruning import BlockReconstruction, Method, NetworkReconstruction
    from bisparse.results import LayerResult, PruneReport

__all__ = [
    "batches_of",
    "finish",
    "group_of_ranks",
    "on_first_rank",
    "open_job",
    "plan_with_data",
    "provenance",
    "prune_with_data",
    "with_samples",
]

T = TypeVar("T")


@contextmanager
def group_of_ranks(timeout: timedelta | None = None) -> Iterator[ProcessGroup | None]:
    """The process group of all ranks under torchrun; None without torchrun.

    Within another one it is a new group of the same ranks. A command that needs several opens one around all of them: if torch's
    default group is started a second time, ranks meet the addresses of the first.

    Args:
        timeout: how long a rank waits for another; None: torch's default.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield None
        return
    if distributed.is_initialized():
        group = distributed.new_group(timeout=timeout)
    else:
        distributed.init_process_group(timeout=timeout)
        group = distributed.group.WORLD
    try:
        yield group
    finally:
        distributed.destroy_process_group(group)


def on_first_rank(job: Callable[[], T]) -> T:
    """The result of a single-process job, which runs on the first rank only. The other ranks wait, and fail if it fails."""
    from bisparse.process_group import Ranks

    # A large checkpoint takes longer than torch's default timeout; if a rank dies, torchrun ends the others.
    with group_of_ranks(timedelta(days=7)) as group:
        ranks = Ranks(group)
        found: list[T] = []
        if ranks.rank == 0:
            with ranks.failing_together():
                found.append(job())
        return ranks.all(found)[0][0]


def prune_with_data(
    name: str,
    target: Path,
    pattern: Structure | None,
    method: Method,
    *,
    texts: TextFiles,
    overwrite: bool,
    as_json: bool,
    resume: Path | None,
    step: str,
    **options: Any,
) -> None:
    """Build the model, prune it and save it; `step` is stored in the sidecar."""
    from bisparse.pruning import prune_

    asked = {method.name: bool(method.needs), **fits_asked(options["reconstruction"])}
    source, data = open_job(name, target, texts, overwrite=overwrite, resume=resume, asked=asked)
    made_from = {**provenance(name, source, texts, data, options["order"]), "step": step}
    started = time.perf_counter()
    with group_of_ranks() as group:
        report = prune_(
            source.model,
            pattern,
            method,
            batches_of(data),
            progress=shows_progress(as_json=as_json),
            group=group,
            resume=resume,
            keep_journal=True,
            **{**options, "reconstruction": with_samples(options["reconstruction"], source, texts)},
        )
        finish(source, target, report, made_from, overwrite, time.perf_counter() - started, as_json, resume, group)


def plan_with_data(
    name: str,
    target: Path | None,
    pattern: Structure,
    method: Method,
    *,
    texts: TextFiles,
    overwrite: bool,
    as_json: bool,
    resume: Path | None,
    **options: Any,
) -> None:
    """Show what `prune_with_data` would do with the same arguments. Writes nothing."""
    from bisparse.checkpoint.reader import open_source as read_headers
    from bisparse.checkpoint.save_load import WEIGHTS, plain_weights
    from bisparse.checkpoint.sidecar import MASKS, SIDECAR, packed_size
    from bisparse.cli.plan import Plan, PlannedLayer, show_plan
    from bisparse.pruning.layer import plan
    from bisparse.results import count_parameters

    asked = {method.name: bool(method.needs), **fits_asked(options["reconstruction"])}
    source, data = open_job(name, target, texts, overwrite=overwrite, resume=resume, asked=asked)
    chosen = {key: options[key] for key in ("include", "exclude", "remainder", "patterns", "layouts")}
    found, left = plan(source.model, pattern, **chosen)
    layers = [
        PlannedLayer(
            one.name,
            one.parameter_name,
            tuple(one.weight.shape),
            str(one.weight.dtype).removeprefix("torch."),
            one.layout,
            structure,
        )
        for one, structure in found
    ]
    weights = plain_weights(source.model)
    others = () if source.folder is None else read_headers(source.folder).others
    nbytes = sum(one.numel() * one.dtype.itemsize for one in weights.values()) + sum(packed_size(one.shape) for one in layers)
    if source.folder is not None:
        nbytes += sum((source.folder / one).stat().st_size for one in others)
    files = (WEIGHTS, SIDECAR, MASKS, *others)
    notes = ("only the job itself finds out which layers the data reach, and their errors",) if data is not None else ()
    parameters = count_parameters(source.model)
    show_plan(Plan(pattern, method.name, layers, left, notes, parameters, nbytes, files, describe(name, texts, data)), as_json)


def open_job(
    name: str,
    target: Path | None,
    texts: TextFiles,
    *,
    overwrite: bool,
    resume: Path | None,
    asked: Mapping[str, bool],
) -> tuple[Source, TextBatches | list[Any] | None]:
    """The model and its data, after a check that the result can be written, since a job may take hours.

    Refuses a target or journal that overlaps an input or the other one, a target that exists or cannot be written, a model
    whose tensors are not those of its files, and missing data.

    Args:
        asked: by option or method, whether it needs calibration data.
    """
    from bisparse.apart import check_apart, origin_of
    from bisparse.checkpoint import atomic_folder as output
    from bisparse.checkpoint.names import named_as_in, unsaved_buffers
    from bisparse.checkpoint.reader import open_source as read_headers
    from bisparse.checkpoint.save_load import plain_weights
    from bisparse.cli.model_source import open_source, place_of

    inputs = {"source": place_of(name)} | {f"calibration text {number}": path for number, path in enumerate(texts.paths or (), 1)}
    if target is not None:
        check_apart(target, inputs)
    if resume is not None:
        check_apart(resume, {**inputs, "target": target})
    if target is not None:
        output.check_target(target, overwrite)
        output.check_writable(target)
    source = open_source(name, tokenizer=bool(texts.paths))
    for place in (target, resume):
        if place is not None:
            check_apart(place, {"model's own files": origin_of(source.model)})
    if source.folder is not None:
        named_as_in(read_headers(source.folder), plain_weights(source.model), unsaved=unsaved_buffers(source.model))
    data = _data(source, texts)
    _check_data(name, source, data, asked)
    return source, data


def provenance(name: str, source: Source, texts: TextFiles, data: TextBatches | list[Any] | None, order: str) -> dict[str, Any]:
    """How the job was called and what it was calibrated on, for the sidecar."""
    from bisparse.checkpoint.hub import source_name

    return {
        "command": shlex.join(["bisparse", *command_line()]),
        "source": name if source.folder is None or source.folder == Path(name) else source_name(source.folder),
        "order": order,
        "calibration": describe(name, texts, data),
        "versions": _versions(),
    }


def describe(name: str, texts: TextFiles, data: TextBatches | list[Any] | None) -> dict[str, Any] | None:
    """A description of the calibration data, as JSON values; None without data."""
    from bisparse.cli.calibration_text import SEED, TextBatches

    if not isinstance(data, TextBatches):
        return None if data is None else {"function": name, "batches": len(data)}
    return {
        "files": [asdict(one) for one in data.files],
        "text_field": texts.field,
        "sequences": data.sequences,
        "length": texts.length,
        "tokens": data.tokens,
        "seed": SEED,
        "batches": len(data.batches),
    } | ({} if texts.network_sequences is None else {"network_sequences_at_most": texts.network_sequences})


def batches_of(data: TextBatches | list[Any] | None) -> list[Any] | None:
    """The batches that the model is called with."""
    return data if data is None or isinstance(data, list) else list(data.batches)


def with_samples(
    reconstruction: BlockReconstruction | NetworkReconstruction | None, source: Source, texts: TextFiles
) -> BlockReconstruction | NetworkReconstruction | None:
    """The same fit, of the network on as many samples as were asked for."""
    from bisparse.pruning import NetworkReconstruction

    if texts.network_sequences is None or not isinstance(reconstruction, NetworkReconstruction):
        return reconstruction
    data = _data(source, replace(texts, sequences=texts.network_sequences))
    return replace(reconstruction, batches=batches_of(data))


def _versions() -> dict[str, str]:
    """Versions of the libraries that build the model and its tokens; the sidecar has the other versions anyway."""
    from importlib.metadata import version

    return {package: version(package) for package in ("transformers", "tokenizers") if package in sys.modules}


def _data(source: Source, texts: TextFiles) -> TextBatches | list[Any] | None:
    """The batches, from the text files or from the model's function; None if there are none."""
    from bisparse.cli.calibration_text import batches_for

    if not texts.paths:
        return source.batches
    if source.tokenizer is None:
        raise typer.BadParameter(
            "text requires a transformers model; module:function returns its own batches", param_hint="--calibration"
        )
    return batches_for(
        source.model, source.tokenizer, texts.paths, field=texts.field, sequences=texts.sequences, length=texts.length
    )


def _check_data(name: str, source: Source, data: TextBatches | list[Any] | None, asked: Mapping[str, bool]) -> None:
    """Refuse a job without data if a requested method or option needs data; the error says how to give them."""
    needing = next((what for what, needs in asked.items() if needs), None)
    if data is not None or needing is None:
        return
    if source.folder is None and source.tokenizer is None:
        raise typer.BadParameter(
            f"{name}() returns only a model, and {needing} needs calibration data: return (model, batches)", param_hint="SOURCE"
        )
    raise typer.BadParameter(f"missing; {needing} needs calibration data", param_hint="--calibration")


def finish(
    source: Source,
    target: Path,
    report: PruneReport,
    made_from: Mapping[str, Any],
    overwrite: bool,
    seconds: float,
    as_json: bool,
    journal: Path | None,
    group: ProcessGroup | None = None,
) -> None:
    """Save the model with its sidecar and other files, and print the report, on the first rank."""
    from torch import distributed

    from bisparse.checkpoint import save
    from bisparse.pruning import remove_journal

    if group is not None and distributed.get_rank(group) != 0:
        return
    # The folder's own tokenizer files are copied.
    beside = getattr(source.tokenizer, "save_pretrained", None) if source.folder is None else None
    report = save(
        source.model, target, report=report, overwrite=overwrite, source=source.folder, provenance=made_from, beside=beside
    ).report
    # Removed only now: if saving fails, the job can continue from the journal.
    if journal is not None:
        remove_journal(journal)
    if as_json:
        print_json({"ok": True, "target": str(target), "density": report.density, "time_s": seconds, **report.as_dict()})
        return
    console = to_stdout()
    groups = grouped(report, lambda one: one.name, lambda one: (one.shape, one.pattern))
    converted = any(one.violated_weights is not None for one in report)
    before = ("fitted", " violation", " by chance") if converted else ()
    heads = ("layer", " n", "to", " density", *before, " error masked", " error now", " damping", " s")
    print_table(console, heads, [_row(*group, converted) for group in groups])
    print_left_dense(console, report.left_dense)
    console.print()
    for note in report.notes:
        console.print(f"Note: {note}", markup=False)
    console.print(f"[bold green]{len(report)} layers[/] by {report.method}: density {report.density:.4f}, {seconds:.1f} s.")
    print_coverage(console, report.coverage)
    print_written(target)


def _row(name: str, group: list[LayerResult], converted: bool) -> tuple[str, ...]:
    def mean(values: list[float | None], digits: int = 4) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.{digits}f}" if known else "-"

    before: tuple[str, ...] = ()
    if converted:
        violated, chance = [one.violated_weights for one in group], [one.unstructured_weights for one in group]
        before = (_fitted(group), mean(violated), mean(chance))
    return (
        name,
        str(len(group)),
        group[0].pattern,
        mean([one.density for one in group]),
        *before,
        mean([one.error_before for one in group]),
        mean([one.error for one in group]),
        mean([one.damping for one in group]),
        f"{sum(one.time_s for one in group):.1f}",
    )


def _fitted(group: list[LayerResult]) -> str:
    """The range of the sparsest N:M that each layer fitted before a conversion, as text."""
    found = sorted({one.fitted for one in group if one.fitted}, key=lambda text: int(text.partition(":")[0]))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}" if found else "-"
