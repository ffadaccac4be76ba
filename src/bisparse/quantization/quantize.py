"""`quantize_`: quantises a model's weights in place. Zeros stay zeros, and on an error no layer is changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.arguments import check_choice, check_number
from bisparse.layers import Filter, Layer, Skipped, find_layers, matrix_sides
from bisparse.pattern import Structure, Unstructured, parse_pattern
from bisparse.pruning.calibration.calibrate import calibrate
from bisparse.pruning.calibration.collector import Stage
from bisparse.pruning.calibration.finished_block import FinishedBlock
from bisparse.pruning.calibration.hooks import none_reached
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic, Statistics, full_precision, stacked_moments
from bisparse.pruning.layer import check_can_be_written, layer_problem
from bisparse.pruning.methods.base import LayerProblem, in_range
from bisparse.pruning.reduction import positions
from bisparse.quantization.report import QuantizationReport, QuantizedLayer
from bisparse.quantization.rounding import Choose, Stored, round_to_nearest, round_with_feedback
from bisparse.quantization.scheme import Scheme, parse_scheme
from bisparse.rollback import Rollback
from bisparse.tiles import Layout, from_matrices
from bisparse.verification import PatternError

__all__ = ["quantize_"]

METHODS = ("rtn", "gptq")
ANY = Unstructured(1.0)


@dataclass(frozen=True)
class _Settings:
    scheme: Scheme
    method: str
    damping: float
    pattern: Structure | None
    """Of the masks chosen in the same sweep; None: only existing zeros are kept."""


def quantize_(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    data: Iterable[Any] | None = None,
    method: str = "rtn",
    pattern: str | Structure | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    damping: float = 0.01,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> QuantizationReport:
    """Quantise the weights of a model's layers in place; zero weights stay exactly zero.

    Weights keep their dtype and contain the dequantised values, so that the model runs everywhere. The scales are in the
    report, from which `bisparse.export` writes files of stored numbers. All layers are changed or, on an error, none.

    Args:
        scheme: ``"int8"`` and ``"fp8"`` (e4m3), with a scale per output channel; ``"int4-g32"``, ``"int4-g64"`` and
            ``"int4-g128"``, with a scale per group of inputs; ``"fp4"`` (e2m1 with float8 scales per 16 inputs, NVFP4).
        data: calibration batches, as for `prune_`; required by "gptq". With data the report has output errors.
        method: "rtn": each weight is rounded to nearest; "gptq": column by column, and later columns compensate for the error.
        pattern: with "gptq": prune to this pattern in the same sweep, as SparseGPT does, so that later columns compensate for
            pruned and for rounded weights together. By default only existing zeros are kept.
        include, exclude, layouts: which layers, and how they store their matrices, as for `prune_`.
        damping: ridge parameter of "gptq", in units of the mean square of an input.
        forward, device, progress: as for `prune_`.

    Raises:
        CalibrationError: no data, data that does not fit the model, or inputs that are not finite.
        ValueError: an unknown scheme or method, weights that are not finite or that would all become zero, no layer to
            quantise, or missing data.

    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> report = quantize_(model, "int8")
    >>> report["0"].scheme, report["0"].weight_error < 0.01
    ('int8', True)
    """
    check_choice("method", method, METHODS)
    check_number("damping", damping, least=0)
    settings = _Settings(parse_scheme(scheme), method, damping, None if pattern is None else parse_pattern(pattern))
    _check_pattern(settings)
    if method == "gptq" and data is None:
        raise ValueError('method="gptq" needs the moments of each layer\'s inputs: pass data, batches of calibration data')
    layers, left = _choose(model, settings.scheme, include, exclude, layouts)
    started = time.perf_counter()
    options = Options(forward=forward, device=device, progress=progress)
    done: dict[str, QuantizedLayer] = {}
    with torch.no_grad(), Rollback(model) as rollback, closing(_stages(model, layers, data, options)) as stages:
        for stage in stages:
            if isinstance(stage, FinishedBlock):
                continue
            for layer, statistics in zip(stage.layers, stage.statistics, strict=True):
                rollback.touch(layer.weight)
                with full_precision(layer.weight.device):
                    done[layer.name] = _quantise_(layer, statistics, settings)
        for layer in layers:
            if layer.name not in done:
                rollback.touch(layer.weight)
                done[layer.name] = _quantise_(layer, Statistics(0), settings)
    results = tuple(done[layer.name] for layer in layers)
    return QuantizationReport(settings.scheme.name, method, results, tuple(left), time.perf_counter() - started)


def _check_pattern(settings: _Settings) -> None:
    pattern, group = settings.pattern, settings.scheme.group
    if pattern is None:
        return
    if settings.method != "gptq":
        raise ValueError(f'pattern= prunes in the sweep of method="gptq"; for "{settings.method}" call prune_ first')
    m = getattr(pattern, "m", None)
    if m is None or (group is not None and group % m):
        raise ValueError(f"{pattern} cannot be combined with {settings.scheme.name}: its groups must divide those of the scheme")


def _choose(
    model: nn.Module,
    scheme: Scheme,
    include: Filter | None,
    exclude: Filter | None,
    layouts: Mapping[str, str | Layout] | None,
) -> tuple[list[Layer], list[Skipped]]:
    """The layers to quantise, and a reason for each layer left out. Changes nothing."""
    found, left = find_layers(model, include, exclude, layouts=layouts)
    layers = []
    for layer in found:
        check_can_be_written(layer)
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"{layer.name}: its weight has NaN or infinite numbers, which cannot be quantised")
        inputs = matrix_sides(layer.weight, layer.layout)[1]
        reason = scheme.refusal(inputs, positions(layer.layout, layer.weight.shape))
        if reason is None:
            layers.append(layer)
        else:
            left.append(Skipped(layer.name, reason))
    if not layers:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in left[:4])
        raise ValueError(
            f"the model {type(model).__name__} has no layer to quantise to {scheme.name} ({reasons or 'it has no layers'}); "
            "include layers by name, or use another scheme"
        )
    return layers, left


def _stages(
    model: nn.Module, layers: Sequence[Layer], data: Iterable[Any] | None, options: Options
) -> Generator[Stage | FinishedBlock]:
    """The layers in the order in which they are quantised, with the moments of their inputs if there is data."""
    if data is None:
        yield Stage(tuple(layers), tuple(Statistics(0) for _ in layers))
        return
    reached = False
    for stage in calibrate(model, layers, data, frozenset({Statistic.GRAM}), options):
        if isinstance(stage, Stage):
            reached |= any(statistics.columns for statistics in stage.statistics)
        yield stage
    if not reached:
        raise CalibrationError(none_reached(layers))


def _quantise_(layer: Layer, statistics: Statistics, settings: _Settings) -> QuantizedLayer:
    """Quantise one layer in place."""
    scheme, dtype = settings.scheme, layer.weight.dtype
    unseen = ""
    if statistics.experts is not None and statistics.columns:
        empty = [str(number) for number, one in enumerate(statistics.experts) if not one.statistics.columns]
        unseen = f"rounded to nearest, since no token was routed there: experts {', '.join(empty)}" if empty else ""
        statistics = stacked_moments(statistics.experts)
    problem = layer_problem(layer, settings.pattern or ANY, statistics=statistics if statistics.columns else None)
    dense = problem.rows(problem.weight).float()
    judged, factor = in_range(problem)
    rows, choose = dense, None
    if settings.pattern is not None:
        rows = dense * problem.rows(problem.solve(problem.weight.abs()).mask)
        width, inputs = getattr(settings.pattern, "m", 1), dense.shape[-1] // problem.positions
        choose = Choose(lambda scores: problem.solve(scores[None]).mask[0], width, inputs, factor)
    stored, scale = round_to_nearest(rows, scheme, dtype)
    nearest = stored, scale
    errors: tuple[float | None, float | None] = (None, None)
    note = ""
    if statistics.columns:
        whole = judged.least_squares(centred=False, statistics=statistics.merged())
        note = unseen or whole.note
        if settings.method == "gptq":
            rows, gram = dense, whole.damped(settings.damping).gram
            stored, scale = round_with_feedback(rows, rows != 0, gram, scheme, dtype, layer.name, choose)
        # Of the values that the layer will have, in its dtype.
        after, rounded = (whole.error(_values(one, scheme, dtype).float() * factor) for one in ((stored, scale), nearest))
        errors = after, rounded
    elif settings.method == "gptq":
        pruned = "" if settings.pattern is None else "pruned by magnitude and "
        note = f"no calibration batch reached this layer: its weights are {pruned}rounded to nearest"
    # Before the weight is written, whose memory `dense` may share.
    density_before, unit = float((dense != 0).double().mean()), scheme.unit(rows, dtype)
    if coarse := int(scheme.coarse(scale, dtype, unit).sum()):
        few = f"{coarse} of {scale.numel()} scales are near the smallest {dtype}, so that their weights have fewer levels"
        note = "; ".join(filter(None, (note, few)))
    weight = _dequantised(layer, problem, (stored, scale), scheme)
    _check_zeros(layer, weight)
    before = layer.weight.double()
    energy, changed = float(before.square().sum()), float((weight.double() - before).square().sum())
    if before.any() and not weight.any():
        raise ValueError(
            f"{layer.name}: all its weights would become zero, since {dtype} has no scale as small; exclude the layer"
        )
    layer.weight.copy_(weight)
    return QuantizedLayer(
        layer.name,
        layer.parameter_name,
        tuple(layer.weight.shape),
        str(dtype).removeprefix("torch."),
        layer.layout,
        scheme.name,
        scale.to(dtype),
        float((weight != 0).double().mean()),
        density_before,
        (changed / energy) ** 0.5 if energy else 0.0,
        energy,
        *errors,
        note,
        unit,
    )


def _values(stored: Stored, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    numbers, scale = stored
    values: Tensor = numbers.to(dtype) * scheme.spread(scale, numbers.shape[-1]).to(dtype)
    return values


def _dequantised(layer: Layer, problem: LayerProblem, stored: Stored, scheme: Scheme) -> Tensor:
    """The dequantised weight, in the layer's shape and dtype, computed as inference engines do."""
    dtype = layer.weight.dtype
    rows = _values(stored, scheme, dtype)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{layer.name}: its weights round up to more than the largest {dtype}; quantise the model in bfloat16")
    result: Tensor = from_matrices(problem.matrices(rows), layer.layout, layer.weight.shape)
    return result


def _check_zeros(layer: Layer, weight: Tensor) -> None:
    """Raise PatternError if the new weight is not zero where the old one is."""
    broken = int(((weight != 0) & (layer.weight == 0)).sum())
    if broken:
        raise PatternError(f"{layer.name}: quantisation would change {broken} zero weights")
