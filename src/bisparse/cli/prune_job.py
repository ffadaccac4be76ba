"""The two kinds of job of `bisparse prune`: by magnitude on the files, or with calibration data on the model."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from bisparse.cli.calibrated import on_first_rank, plan_with_data, prune_with_data
from bisparse.cli.calibration_options import TextFiles, parse_device, parse_expert_floor, parse_method, parse_reconstruction
from bisparse.cli.console import (
    command_line,
    parse_solver_option,
    parse_source,
    print_coverage,
    print_json,
    print_written,
    progress_bar,
    to_stdout,
)
from bisparse.cli.plan import Plan, PlannedLayer, show_plan
from bisparse.cli.tables import grouped, print_left_dense, print_table

if TYPE_CHECKING:
    from bisparse.checkpoint import CheckpointPlan
    from bisparse.pattern import Structure
    from bisparse.results import LayerResult, PruneReport

__all__ = ["CalibrationSettings", "PruneJob", "prune_by_magnitude", "prune_calibrated"]


@dataclass(frozen=True)
class PruneJob:
    """The arguments of `bisparse prune` that both kinds of job take."""

    source: Path
    target: Path | None
    """None in a dry run without a target."""
    structure: Structure | None
    """None with a budget."""
    layers: dict[str, Any]
    """Which layers, to which patterns: arguments of `prune_` and `prune_checkpoint`."""
    solver: str | None
    key: str | None
    overwrite: bool
    as_json: bool
    texts: TextFiles


@dataclass(frozen=True)
class CalibrationSettings:
    """The options of `bisparse prune` for methods that use calibration data, as given."""

    method: str
    damping: float | None
    order: Literal["sequential", "parallel"]
    block_epochs: int
    network_epochs: int
    expert_floor: float | None
    device: str | None
    resume: Path | None


def prune_calibrated(job: PruneJob, settings: CalibrationSettings, step: str | None) -> None:
    """Build the model and prune it by a method.

    Args:
        step: a name that is stored with the target; None: a dry run, which only shows the plan.
    """
    if job.key is not None:
        raise typer.BadParameter("chooses a state dict in a torch file, which only magnitude pruning reads", param_hint="--key")
    arguments: dict[str, Any] = dict(
        texts=job.texts,
        overwrite=job.overwrite,
        as_json=job.as_json,
        **job.layers,
        solver=parse_solver_option(job.solver),
        order=settings.order,
        reconstruction=parse_reconstruction(settings.block_epochs, settings.network_epochs, settings.order, job.texts),
        expert_floor=parse_expert_floor(settings.expert_floor),
        device=parse_device(settings.device),
        resume=settings.resume,
    )
    chosen = parse_method(settings.method, settings.damping)
    if step is None:
        structure = job.structure
        if structure is None:
            raise typer.BadParameter("does not work with --budget, which chooses patterns during the job", param_hint="--dry-run")
        on_first_rank(lambda: plan_with_data(str(job.source), job.target, structure, chosen, **arguments))
        return
    target = job.target
    assert target is not None
    prune_with_data(str(job.source), target, job.structure, chosen, step=step, **arguments)


def prune_by_magnitude(job: PruneJob, step: str | None) -> None:
    """Prune the files by magnitude, without building the model; `step` is as for `prune_calibrated`."""
    from bisparse.checkpoint import plan_checkpoint, prune_checkpoint

    structure, target = job.structure, job.target
    assert structure is not None
    source = parse_source(job.source, "SOURCE")
    if step is None:
        plan = plan_checkpoint(source, structure, key=job.key, **job.layers)
        plan.source.check_writable()
        show_plan(_plan(plan, structure), job.as_json)
        return
    assert target is not None

    def prune_files() -> None:
        start = time.perf_counter()
        with progress_bar(show=not job.as_json) as progress:
            report = prune_checkpoint(
                source,
                target,
                structure,
                solver=parse_solver_option(job.solver),
                key=job.key,
                overwrite=job.overwrite,
                progress=progress,
                provenance={"command": shlex.join(["bisparse", *command_line()]), "source": str(job.source), "step": step},
                **job.layers,
            )
        _print_report(report, target, time.perf_counter() - start, job.as_json)

    on_first_rank(prune_files)


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
    print_table(
        console, ("layer", " n", " shape", "to", " density", " |w| kept", " gap at most"), [_row(*group) for group in groups]
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
    print_written(target)


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
    # A smaller gap is only the rounding of two sums in double precision.
    return f"{gap:.0e}" if gap > 1e-13 else "0"
