"""`prune_`: one-shot pruning of a model in place. On bad input or an interruption, no layer is changed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from bisparse.arguments import listed
from bisparse.layers import Filter, Skipped
from bisparse.pattern import Structure, parse_pattern
from bisparse.process_group import Ranks
from bisparse.pruning.block_reconstruction import BlockReconstruction
from bisparse.pruning.budget import Budget, Plan, plan_within
from bisparse.pruning.calibration.calibrate import calibrate
from bisparse.pruning.calibration.collector import Stage
from bisparse.pruning.calibration.finished_block import FinishedBlock
from bisparse.pruning.calibration.options import EXPERT_FLOOR, Options, Order
from bisparse.pruning.calibration.statistics import Statistics
from bisparse.pruning.given_scores import Scores, methods_of
from bisparse.pruning.job import Job, Outcome, Task
from bisparse.pruning.layer import plan
from bisparse.pruning.methods import parse_method
from bisparse.pruning.methods.base import Method
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.pruning.network_reconstruction import NetworkReconstruction, parse_reconstruction
from bisparse.results import LayerResult, PruneReport, checksum_of, count_parameters
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import Layout
from bisparse.wrappers import check_module

__all__ = ["prune_", "prune_layers_", "report_of"]


def prune_(
    model: nn.Module,
    pattern: str | Structure | None = None,
    method: str | Method | None = None,
    batches: Iterable[Any] | None = None,
    *,
    budget: str | float | Budget | None = None,
    scores: Scores | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    solver: str | Solver | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | Sequence[str | Structure] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    order: Order = "sequential",
    reconstruction: BlockReconstruction | NetworkReconstruction | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
    keep_journal: bool = False,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
    expert_floor: float = EXPERT_FLOOR,
) -> PruneReport:
    """Prune the layers of a model in place. Returns a report on each layer, with a reason for each one left dense.

    All chosen layers are changed or, on an error, none.

    Args:
        pattern: the structure or its text, such as ``"4:8-T"``. N is the number kept.
        method: a method or its name in `bisparse.pruning.METHODS`, such as ``"wanda"``; by default `Magnitude`.
        batches: calibration data, for methods that need statistics: passed to the model as ``model(**batch)``,
            ``model(*batch)`` or ``model(batch)``.
        budget: instead of a pattern, a total for all layers, such as ``"50%"`` of the weights, or a `Budget` of weights, bytes
            or time. Each layer gets one of `patterns`, with the smallest estimated loss of the network, on `batches` if given.
        scores: instead of a method, the importance of each weight: ``{name of the layer or its parameter: tensor}`` or a function
            ``(name, weight) -> tensor``, of the weight's shape, non-negative and finite; see `bisparse.scores`. Each mask keeps
            the largest total score.
        include, exclude: names, globs, ``re:`` patterns, or functions ``(name, module) -> bool``; see `find_layers`.
        solver: for transposable patterns, or its name in `bisparse.solvers.SOLVERS`; by default `Exact`.
        remainder: what to do if M does not divide a layer's sides. "pad": prune as if padded with zeros; "dense": leave the
            layer dense; "error": raise.
        patterns: patterns of single layers, by name, glob or ``re:`` pattern; the first that matches counts. With `budget`, the
            list of patterns to choose from, such as ``["2:4-T", "4:8-T", "6:8-T", "dense"]``.
        layouts: how single layers store their matrices, if it cannot be detected: "linear", "transposed", "conv",
            "experts", "experts-transposed", "groups:32", "parts:3"; see `bisparse.layers.parse_layout`.
        order: "sequential": each layer is pruned on its inputs in the network pruned so far; "parallel": on the dense network's
            inputs, as in the paper.
        reconstruction: after the layers of each block of a chain, such as a transformer's, fit the kept weights of the whole
            block to the dense block's output (`BlockReconstruction`), or those of the whole network to the dense network's output
            (`NetworkReconstruction`, with or without blocks before). Needs the order "sequential".
        forward: ``forward(model, batch)``, for batches that are passed in another way.
        device: where to run transformer blocks, one at a time; by default the model's device.
        resume: a folder for the journal of this job. An interrupted job that is called again with the same arguments continues
            at the layer where it stopped; the folder is removed at the end.
        keep_journal: keep that folder until the caller has saved the model; `remove_journal` removes it.
        progress: show a progress bar, or lines with the time without a terminal; None: only a bar on a terminal.
        group: ranks that share the job, such as ``torch.distributed.group.WORLD`` under torchrun. Each calls this function with
            the same model and batches, runs some of the batches, prunes some of the layers, and gets the whole result.
        expert_floor: of experts stored in one parameter, those that get fewer routed calibration tokens per input of their matrix
            are calibrated on all tokens. 0: on routed tokens only; ``float("inf")``: every expert on all tokens.

    Raises:
        CalibrationError: no data, data that does not fit the model, or inputs that are not finite.
        OtherRankError: another rank of the group failed.
        ValueError: weights that are NaN or infinite, filters that match nothing, no layer to prune, parametrized weights, missing
            batches.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> report = prune_(model, "4:8-T")
    >>> [(layer.name, layer.pattern, layer.density <= 0.5) for layer in report]
    [('0', '4:8-T', True), ('2', '4:8-T', True)]
    """
    ranks = Ranks(group)
    with ranks.failing_together():
        check_module(model)
        _check_choice(pattern, budget, patterns, scores)
        if scores is not None and method is not None:
            raise ValueError(f"both scores= and method={method!r:.60} choose the masks: leave out one of them")
        method = Magnitude() if method is None else parse_method(method)
        blocks, network = parse_reconstruction(reconstruction)
        options = Options(
            parse_solver(solver), order, blocks, forward, device, resume, keep_journal, progress, expert_floor, network
        )
        chosen: dict[str, Any] = {"include": include, "exclude": exclude, "remainder": remainder, "layouts": layouts}
        within: Plan | None = None
        if budget is not None:
            batches = None if batches is None else listed(batches)
            within = plan_within(model, budget, patterns, batches, options, ranks, **chosen)
            pattern, patterns = within.most, within.others
            planned, left_dense = list(within.layers), list(within.left_dense)
        else:
            assert pattern is not None and not isinstance(patterns, Sequence)
            pattern = parse_pattern(pattern)
            planned, left_dense = plan(model, pattern, patterns=patterns, **chosen)
        assert patterns is None or isinstance(patterns, Mapping)
        methods = [method for _ in planned] if scores is None else methods_of([layer for layer, _ in planned], scores)
    tasks = [Task(layer, structure, own) for (layer, structure), own in zip(planned, methods, strict=True)]
    outcome = prune_layers_(model, tasks, batches, options, ranks)
    if within is not None:
        outcome = _with_reasons(outcome, within)
    return report_of(pattern, methods[0], options, outcome, left_dense, patterns, count_parameters(model))


def _check_choice(pattern: object, budget: object, patterns: object, scores: object) -> None:
    """Raise ValueError unless the arguments define the layers' patterns exactly once."""
    if budget is None:
        if pattern is None:
            raise ValueError("no pattern: pass one, such as '4:8-T', or budget= with a list of patterns")
        if patterns is not None and not isinstance(patterns, Mapping):
            raise ValueError(f"patterns={patterns!r:.60}: expected patterns by layer name; a list of patterns needs budget=")
        return
    if pattern is not None:
        raise ValueError(
            f"pattern={pattern!r:.40} and budget={budget!r:.40}: with a budget, patterns= lists those to choose from"
        )
    if scores is not None:
        raise ValueError("scores= does not work with budget=, which compares losses of weights")


def _with_reasons(outcome: Outcome, within: Plan) -> Outcome:
    """The outcome, with a note per layer on the reason for its pattern."""
    results = [
        replace(one, note=f"{within.reasons[one.name]}; {one.note}" if one.note else within.reasons[one.name])
        for one in outcome.results
    ]
    return replace(outcome, results=tuple(results), notes=(within.note, *outcome.notes))


def prune_layers_(
    model: nn.Module, tasks: Sequence[Task], batches: Iterable[Any] | None, options: Options, ranks: Ranks
) -> Outcome:
    """Prune layers, each to its own structure by its own method; on any error, none is changed."""
    with Job(model, tasks, batches, options, ranks) as job, closing(_stages(job)) as stages:
        for stage in stages:
            if isinstance(stage, FinishedBlock):
                job.reconstruct(stage)
            else:
                job.prune(stage)
        job.reconstruct_network()
        outcome = job.commit()
        return replace(outcome, results=tuple(_identified(one, job) for one in outcome.results))


def _identified(result: LayerResult, job: Job) -> LayerResult:
    """A result with the checksum of its weight, by which `save` finds weights that were changed since."""
    task = job.tasks[result.name]
    if isinstance(task.method, Magnitude) and not job.uses_data:
        return result  # its kept score is the sum of the weight's magnitudes, which `save` compares
    return replace(result, checksum=checksum_of(task.layer.weight))


def _stages(job: Job) -> Generator[Stage | FinishedBlock]:
    """Yield the layers of a job in the order in which they are pruned, with the statistics that their methods need."""
    if not job.uses_data:
        yield Stage(tuple(job.layers), tuple(Statistics(0) for _ in job.layers))
        return
    yield from calibrate(
        job.model, job.layers, job.data, job.needs, job.options, done=job.done, dense=job.original, walk=job.walk, ranks=job.ranks
    )


def report_of(
    pattern: Structure,
    method: Method,
    options: Options,
    outcome: Outcome,
    left_dense: Sequence[Skipped],
    patterns: Mapping[str, str | Structure] | None,
    parameters: int,
) -> PruneReport:
    """The report of a job."""
    return PruneReport(
        str(pattern),
        method.name,
        repr(options.solver),
        outcome.results,
        (*left_dense, *outcome.unreached),
        {glob: str(parse_pattern(one)) for glob, one in (patterns or {}).items()},
        outcome.notes,
        parameters,
    )
