"""Pruning of single layers: choosing them, calling the method, and recording the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from bisparse.layers import (
    Filter,
    Layer,
    Skipped,
    computed_reason,
    dtype_reason,
    find_layers,
    held_reason,
    matches,
    matrix_sides,
    parse_patterns,
    remainder_reason,
)
from bisparse.pattern import Structure
from bisparse.pruning.bias import Bias, bias_of
from bisparse.pruning.experts import prune_experts
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned, Statistics, prune_in_range
from bisparse.pruning.reduction import positions
from bisparse.results import LayerResult, gap_of
from bisparse.solvers import Solver
from bisparse.tiles import Layout, LayoutKind, from_matrices, to_matrices

__all__ = ["Change", "check_can_be_written", "check_not_of_inference_mode", "layer_problem", "plan", "prune_layer", "record"]


@dataclass(frozen=True)
class Change:
    """The planned change of one layer, in its parameter's shape and dtype; small enough to hold for a whole model."""

    layer: Layer
    mask: Bool[Tensor, "..."]
    weight: Float[Tensor, "..."] | None = None
    """The new weight; None: kept weights are unchanged."""
    bias: Float[Tensor, " O"] | None = None
    """The new bias; None: unchanged."""
    bias_at: Bias | None = None
    """Where the bias is stored."""


def plan(
    model: nn.Module,
    pattern: Structure,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> tuple[list[tuple[Layer, Structure]], list[Skipped]]:
    """The layers to prune with their patterns, and a reason for each layer left dense. Changes nothing.

    Raises:
        ValueError: filters or patterns that match nothing, no layer to prune, or weights that cannot be changed in place.
    """
    singles = parse_patterns(patterns)
    found, left_dense = find_layers(model, include, exclude, remainder=remainder, layouts=layouts)
    planned = []
    unused = set(singles)
    for layer in found:
        chosen = next((name for name in singles if matches(name, layer.name, layer.module)), None)
        unused.discard(chosen or "")
        structure = singles[chosen] if chosen is not None else pattern
        check_can_be_written(layer)
        reason = remainder_reason(matrix_sides(layer.weight, layer.layout), structure, remainder, layer.name)
        if reason is None:
            planned.append((layer, structure))
        else:
            left_dense.append(Skipped(layer.name, reason))
    if unused:
        raise ValueError(f"patterns={sorted(unused)} match none of the layers to prune: {[layer.name for layer in found][:20]}")
    if not planned:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in left_dense[:4])
        raise ValueError(
            f"the model {type(model).__name__} has no layer to prune ({reasons or 'none that a pattern applies to'}); include "
            "layers by name"
        )
    return planned, left_dense


def layer_problem(
    layer: Layer,
    pattern: Structure,
    solver: Solver | None = None,
    statistics: Statistics | None = None,
    allowed: Bool[Tensor, "..."] | None = None,
    bias_at: Bias | None = None,
) -> LayerProblem:
    """The `LayerProblem` of a layer."""
    weight = layer.weight.detach()
    matrices = to_matrices(weight, layer.layout)

    def output(inputs: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        own = from_matrices(matrices, layer.layout, weight.shape)
        if isinstance(layer.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            # The convolution's own method, since it handles the padding mode.
            result: Tensor = layer.module._conv_forward(inputs, own, bias)
            return result
        return functional.linear(inputs, own.t() if layer.layout.kind is LayoutKind.TRANSPOSED else own, bias)

    return LayerProblem(
        layer.name,
        matrices if matrices.dtype == torch.float64 else matrices.float(),
        pattern,
        solver,
        statistics,
        None if bias_at is None else bias_at.value,
        positions(layer.layout, weight.shape),
        output,
        None if allowed is None else to_matrices(allowed, layer.layout),
    )


def record(layer: Layer, pattern: Structure, pruned: Pruned, change: Change, seconds: float) -> LayerResult:
    """The layer's record in the report."""
    weight = layer.weight if change.weight is None else change.weight
    # A mask may keep weights that were already zero.
    kept = change.mask.to(weight.device) & (weight != 0)
    return LayerResult(
        layer.name,
        layer.parameter_name,
        tuple(layer.weight.shape),
        str(layer.weight.dtype).removeprefix("torch."),
        layer.layout,
        str(pattern),
        int(kept.count_nonzero()) / max(kept.numel(), 1),
        pruned.solution.retained,
        gap_of(pruned.solution),
        pruned.solution.value,
        seconds,
        pruned.error,
        pruned.error_before,
        pruned.damping,
        pruned.note,
    )


def prune_layer(
    layer: Layer,
    pattern: Structure,
    method: Method,
    solver: Solver | None = None,
    statistics: Statistics | None = None,
    allowed: Bool[Tensor, "..."] | None = None,
    norms: Mapping[str, nn.Module] | None = None,
) -> tuple[Change, LayerResult]:
    """The change of one layer by a method; the layer itself is not changed.

    Args:
        allowed: where weights may be kept, of the weight's shape; None: no restriction.
        norms: the batch norm after each layer without a bias; see `norms_after`.

    Raises:
        ValueError: the method returned weights that are not finite; names the layer.
    """
    start = time.perf_counter()
    with torch.no_grad():
        bias_at = bias_of(layer, norms)
        problem = layer_problem(layer, pattern, solver, statistics, allowed, bias_at)
        experts = None if statistics is None else statistics.experts
        pruned = prune_in_range(method.prune, problem) if experts is None else prune_experts(problem, method, experts)
        if pruned.weight is not None and not bool(torch.isfinite(pruned.weight).all()):
            raise ValueError(f"{layer.name}: {method.name} at {pattern} returned weights that are not finite; raise the damping")
        if pruned.bias is not None and not bool(torch.isfinite(pruned.bias).all()):
            raise ValueError(f"{layer.name}: {method.name} at {pattern} returned a bias that is not finite; exclude the layer")
        if not pruned.note and statistics is not None and _all_zero(statistics):
            pruned = replace(pruned, note="all inputs are 0 in the calibration data")
        weight = layer.weight
        mask = from_matrices(pruned.solution.mask, layer.layout, weight.shape)
        new = None if pruned.weight is None else from_matrices(pruned.weight, layer.layout, weight.shape).to(weight.dtype)
        change = Change(layer, mask, new, pruned.bias, bias_at)
        return change, record(layer, pattern, pruned, change, time.perf_counter() - start)


def _all_zero(statistics: Statistics) -> bool:
    """Whether there were calibration inputs, and all of them were 0."""
    if statistics.columns == 0 or statistics.experts is not None:
        return False
    everything = statistics.merged()
    gram = everything.gram
    size = everything.norm if gram is None else gram.diagonal(dim1=1, dim2=2)
    return size is not None and not bool(size.any())


def check_can_be_written(layer: Layer) -> None:
    """Raise ValueError if the weight of a layer cannot be changed in place.

    Raises:
        ValueError: it is computed, on the meta device, of a dtype that cannot be pruned, or created in inference mode.
    """
    if (reason := held_reason(layer.module, layer.parameter)) is not None:
        raise ValueError(f"{layer.name}: {reason}")
    if layer.parameter not in layer.module._parameters:
        raise ValueError(
            f"{layer.name}: its weight is computed by a parametrization or a hook, so pruning it in place would have no effect; "
            "make it a plain parameter first: by finalize_, parametrize.remove_parametrizations, torch.nn.utils.prune.remove, "
            "remove_weight_norm or remove_spectral_norm, whichever made it"
        )
    if (reason := computed_reason(layer.module, layer.parameter)) is not None:
        raise ValueError(f"{layer.name}: {reason}; export the model to plain layers first, or exclude the layer")
    weight = layer.weight
    if weight.is_meta:
        raise ValueError(f"{layer.name}: its weight is on the meta device and has no values; load the model first")
    if (reason := dtype_reason(weight)) is not None:
        raise ValueError(f"{layer.name}: {reason}")
    check_not_of_inference_mode(f"{layer.name}: its weight", weight)


def check_not_of_inference_mode(what: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor was created in inference mode, outside of which it cannot be changed."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{what} was created in inference mode and cannot be changed; load the model outside of that mode")
