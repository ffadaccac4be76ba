"""`convert_`: converts masks to another pattern without training.

Pruned weights stay pruned unless `regrow` is set. The new mask keeps the best of the kept weights, which are then fitted to
restore each layer's output on calibration data.
Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from bisparse.arguments import check_flag
from bisparse.layers import Filter, find_layers
from bisparse.pattern import Pattern, Structure, parse_pattern
from bisparse.process_group import Ranks
from bisparse.pruning.block_reconstruction import BlockReconstruction
from bisparse.pruning.calibration.options import EXPERT_FLOOR, Options, Order
from bisparse.pruning.job import Task
from bisparse.pruning.layer import plan
from bisparse.pruning.methods import parse_method
from bisparse.pruning.methods.adaprune import AdaPrune
from bisparse.pruning.methods.base import Method
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.pruning.methods.regrow import Regrow
from bisparse.pruning.network_reconstruction import NetworkReconstruction, parse_reconstruction
from bisparse.pruning.prune import prune_layers_, report_of
from bisparse.pruning.violation import CONFIDENCE, check_group, sparsest_pattern, violation
from bisparse.results import PruneReport, count_parameters
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import Layout

__all__ = ["convert_", "fitting_patterns"]


def convert_(
    model: nn.Module,
    pattern: str | Structure,
    method: str | Method | None = None,
    batches: Iterable[Any] | None = None,
    *,
    regrow: bool = False,
    include: Filter | None = None,
    exclude: Filter | None = None,
    solver: str | Solver | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
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
    """Convert the masks of a model (the non-zeros of its weights) to another pattern, in place.

    From any mask to any pattern: dense to N:M, unstructured to N:M, 4:8 to 2:4, 4:8 to 4:8-T, N:M to 4:8-paired. The report has
    per layer the pattern violation and that of random masks, the sparsest N:M that the old mask fitted, the output error before
    and after, the method and the time. All layers are changed or, on an error, none.

    Args:
        pattern: the new pattern, or its text.
        method: a method or its name; by default `AdaPrune` with data, otherwise `Magnitude`.
        batches: calibration data; see `prune_`. Without it, weights are dropped by magnitude and nothing is fitted.
        regrow: let the new mask keep weights that the old one pruned; requires data and `AdaPrune`.
        patterns: patterns of single layers, by name, such as from `fitting_patterns`.
        include, exclude, layouts, remainder, solver, order: as for `prune_`.
        reconstruction, forward, device, resume, keep_journal, progress, group, expert_floor: as for `prune_`.

    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = convert_(model, "4:8")
    >>> layer = convert_(model, "4:8-T")["0"]
    >>> layer.pattern, layer.violated_weights is not None
    ('4:8-T', True)
    """
    ranks = Ranks(group)
    with ranks.failing_together():
        pattern = parse_pattern(pattern)
        check_flag("regrow", regrow)
        if method is None:
            method = AdaPrune() if batches is not None else Magnitude()
        method = parse_method(method)
        if regrow:
            if not isinstance(method, AdaPrune) or batches is None:
                raise ValueError("regrow=True ranks pruned weights by their gain, which requires batches and the method AdaPrune")
            method = Regrow(method)
        blocks, network = parse_reconstruction(reconstruction)
        options = Options(
            parse_solver(solver), order, blocks, forward, device, resume, keep_journal, progress, expert_floor, network
        )
        planned, left_dense = plan(
            model, pattern, include=include, exclude=exclude, remainder=remainder, patterns=patterns, layouts=layouts
        )
        tasks = [Task(layer, structure, method, layer.weight.detach() != 0) for layer, structure in planned]
        found = {task.layer.name: _violated(task) for task in tasks}
    outcome = prune_layers_(model, tasks, batches, options, ranks)
    outcome = replace(outcome, results=tuple(replace(result, **found[result.name]) for result in outcome.results))
    return report_of(pattern, method, options, outcome, left_dense, patterns, count_parameters(model))


def _violated(task: Task) -> dict[str, Any]:
    """The fields of a layer's result that describe its mask before the conversion."""
    kept, structure, layout = task.allowed, task.structure, task.layer.layout
    assert kept is not None
    found = violation(kept, structure, layout=layout)
    m = getattr(structure, "m", None)
    transposable = isinstance(structure, Pattern) and structure.transposable
    fitted = None if m is None else sparsest_pattern(kept, m, transposable=transposable, layout=layout)
    return {
        "violated_weights": found.weights,
        "violated_groups": found.groups,
        "unstructured_weights": found.predicted_weights,
        "unstructured_groups": found.predicted_groups,
        "origin": str(found.origin or ""),
        "origin_weights": found.origin_weights,
        "origin_groups": found.origin_groups,
        "fitted": str(fitted or ""),
    }


def fitting_patterns(
    model: nn.Module,
    m: int,
    *,
    confidence: float = CONFIDENCE,
    transposable: bool = False,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> dict[str, Pattern]:
    """The sparsest N:M per layer that a fraction `confidence` of its groups already fits; for ``patterns=`` of `convert_`.

    A layer that fits no pattern below M:M is not listed.
    """
    check_group("m", m)
    check_flag("transposable", transposable)
    layers, _ = find_layers(model, include, exclude, layouts=layouts)
    proposed = {}
    for layer in layers:
        with torch.no_grad():
            kept = layer.weight != 0
        if fitting := sparsest_pattern(kept, m, confidence=confidence, transposable=transposable, layout=layer.layout):
            proposed[layer.name] = fitting
    return proposed
