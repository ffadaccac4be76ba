"""One-shot pruning of a model in place: all layers or, on bad input, none."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bisparse.layers import Filter, Layer, Skipped, find_layers, matches, matrix_sides, remainder_reason
from bisparse.pattern import Structure, parse_pattern
from bisparse.pruning.magnitude import Magnitude
from bisparse.pruning.method import LayerProblem, Method, Statistics
from bisparse.results import LayerResult, PruneReport, gap_of
from bisparse.solve import choose_solver
from bisparse.solvers import Solver
from bisparse.tiles import LayoutKind, from_matrices, to_matrices

__all__ = ["Change", "apply_", "plan", "prune_", "prune_layer"]


def prune_(
    model: nn.Module,
    pattern: str | Structure,
    method: Method | None = None,
    batches: Iterable[Any] | None = None,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    solver: Solver | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
) -> PruneReport:
    """Prune the layers of a model in place, and report what was done to each and which were left dense, and why.

    Either every chosen layer is changed or, when an error is raised, none.

    Args:
        pattern: the structure or its text, such as ``"4:8-T"``. N is the number kept.
        method: by default `Magnitude`.
        batches: calibration data, for methods that need statistics.
        include, exclude: names, globs, ``re:`` patterns, or functions ``(name, module) -> bool``; see `find_layers`.
        solver: for transposable patterns; by default `Exact`.
        remainder: where M does not divide a layer's sides. "pad": prune as if completed with zeros; "dense": leave the
            layer; "error".
        patterns: patterns of single layers, by name, glob or ``re:`` pattern; the first that matches counts.

    Raises:
        ValueError: weights that are NaN or infinite, filters that match nothing, parametrized weights, missing batches.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> report = prune_(model, "4:8-T")
    >>> [(layer.name, layer.density) for layer in report]
    [('0', 0.5), ('2', 0.5)]
    """
    pattern = parse_pattern(pattern)
    method = method or Magnitude()
    if method.needs and batches is None:
        needs = ", ".join(sorted(method.needs))
        raise ValueError(f"{method.name} needs the {needs} of each layer's inputs: pass batches of calibration data")
    planned, left_dense = plan(model, pattern, include=include, exclude=exclude, remainder=remainder, patterns=patterns)
    changes: list[Change] = []
    results: list[LayerResult] = []
    for layer, structure in planned:
        change, result = prune_layer(layer, structure, method, solver)
        changes.append(change)
        results.append(result)
    apply_(changes)
    return PruneReport(
        str(pattern),
        method.name,
        repr(solver or choose_solver(pattern)),
        tuple(results),
        tuple(left_dense),
        {glob: str(parse_pattern(one)) for glob, one in (patterns or {}).items()},
    )


@dataclass(frozen=True)
class Change:
    """What is to become of one layer, in its parameter's shape and dtype; small enough to hold for a whole model."""

    layer: Layer
    mask: Bool[Tensor, "..."]
    weight: Float[Tensor, "..."] | None = None
    """None: the kept weights stay."""
    bias: Float[Tensor, " O"] | None = None
    """None: it stays."""


def plan(
    model: nn.Module,
    pattern: Structure,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
) -> tuple[list[tuple[Layer, Structure]], list[Skipped]]:
    """The layers to prune, each with its pattern, and a reason for each one left dense. Changes nothing."""
    singles = {name: parse_pattern(one) for name, one in (patterns or {}).items()}
    found, left_dense = find_layers(model, include, exclude, remainder=remainder)
    planned = []
    unused = set(singles)
    for layer in found:
        chosen = next((name for name in singles if matches(name, layer.name, layer.module)), None)
        unused.discard(chosen or "")
        structure = singles[chosen] if chosen is not None else pattern
        _check_plain_parameter(layer)
        reason = remainder_reason(matrix_sides(layer.weight, layer.layout), structure, remainder, layer.name)
        if reason is None:
            planned.append((layer, structure))
        else:
            left_dense.append(Skipped(layer.name, reason))
    if unused:
        raise ValueError(f"patterns={sorted(unused)} match none of the layers to prune: {[layer.name for layer in found][:20]}")
    return planned, left_dense


def prune_layer(
    layer: Layer,
    pattern: Structure,
    method: Method,
    solver: Solver | None = None,
    statistics: Statistics | None = None,
) -> tuple[Change, LayerResult]:
    """Let a method prune one layer; the layer itself is not changed. `apply_` does that."""
    start = time.perf_counter()
    weight = layer.weight.detach()
    matrices = to_matrices(weight, layer.layout)
    positions = math.prod(weight.shape[2:]) if layer.layout.kind is LayoutKind.CONV else 1
    bias = getattr(layer.module, "bias", None)
    problem = LayerProblem(
        layer.name,
        matrices if matrices.dtype == torch.float64 else matrices.float(),
        pattern,
        solver,
        statistics,
        bias.detach() if isinstance(bias, Tensor) else None,
        positions,
    )
    pruned = method.prune(problem)
    mask = from_matrices(pruned.solution.mask, layer.layout, weight.shape)
    new = None if pruned.weight is None else from_matrices(pruned.weight, layer.layout, weight.shape).to(weight.dtype)
    result = LayerResult(
        layer.name,
        layer.parameter_name,
        tuple(weight.shape),
        str(weight.dtype).removeprefix("torch."),
        layer.layout,
        str(pattern),
        float(mask.sum()) / mask.numel(),
        pruned.solution.retained,
        gap_of(pruned.solution),
        pruned.solution.value,
        time.perf_counter() - start,
        pruned.error,
    )
    return Change(layer, mask, new, pruned.bias), result


def apply_(changes: Iterable[Change]) -> None:
    """Write masks and weights into the model, in place, keeping every parameter's identity, dtype and device."""
    with torch.no_grad():
        for change in changes:
            weight = change.layer.weight
            if change.weight is not None:
                weight.copy_(change.weight)
            weight.masked_fill_(~change.mask, 0)
            if change.bias is not None:
                bias = change.layer.module.bias
                assert isinstance(bias, Tensor)
                bias.copy_(change.bias)


def _check_plain_parameter(layer: Layer) -> None:
    if layer.parameter not in layer.module._parameters:
        raise ValueError(
            f"{layer.name}: its weight is computed by a parametrization, so that pruning it in place would be lost; "
            "call finalize_ or torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if layer.weight.is_meta:
        raise ValueError(f"{layer.name}: its weight is on the meta device and holds no numbers; load the model first")
