"""`advise`: which layers are faster sparse, measured on this device or predicted from a stored grid, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bisparse.accelerate.advice import Advice, LayerAdvice, LayerShape, Source, check_tokens
from bisparse.accelerate.advisor_cpu import MAX_FLOPS, advise_on_cpu
from bisparse.accelerate.backends import BACKENDS, BackendError, Refusal
from bisparse.accelerate.backends.cpu import CPU, cpu_reason
from bisparse.accelerate.eligibility import BackendName, choose_backend, directions_of, is_2to4, pattern_refusal
from bisparse.accelerate.grid import Grid, stored_grids
from bisparse.accelerate.timing import Timing, measure_linear
from bisparse.arguments import check_flag
from bisparse.device import usable_device
from bisparse.layers import Filter, Layer, Skipped, find_layers
from bisparse.pattern import Structure, parse_pattern
from bisparse.tiles import Layout
from bisparse.training.parametrizations import layer_state

__all__ = ["advise", "advise_shapes", "layer_shapes", "shape_at"]


@dataclass(frozen=True)
class Measured:
    """The fastest backend for a layer, with its times."""

    backend: str
    timing: Timing


def advise(
    model: nn.Module,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    backend: BackendName = "auto",
    training: bool | None = None,
    pattern: str | Structure | None = None,
    grid: Grid | str | Path | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """Measure each layer of a model dense and sparse on this device, and advise which layers to run sparse.

    On a CPU, the forward pass is measured, dense and packed as by `accelerate_`, unless a product takes seconds. For training
    without a CUDA device, times are predicted from a grid. Without a grid, the advice has only shapes, bytes and FLOPs, and its
    note says so. Layers of the same shape are measured once.

    Args:
        tokens: rows of the layers' inputs: batch size times sequence length.
        dtype: float16, bfloat16 or, for inference on a CPU, float32.
        device: by default CUDA if available.
        backend: measure only this backend; "auto" measures all that run here and takes the fastest.
        training: time both passes; otherwise only the forward pass. By default the mode of the model.
        pattern: assume that the layers are pruned to it; by default judge their weights, or masks in training.
        grid: measured times to predict from, or their file; by default those that come with the package.
        include, exclude, layouts: which layers, and how they store their matrices, as for `prune_`.
        progress: called with the layer's name, the number of layers done and their total.

    Raises:
        BackendError: the given backend does not run on this device.
        ValueError: tokens below 1; a device that does not exist; a file that is not a grid.
    """
    shapes, left = layer_shapes(model, pattern, include, exclude, layouts)
    training = model.training if training is None else training
    check_flag("training", training)
    return advise_shapes(
        shapes, tokens, left=left, dtype=dtype, device=device, backend=backend, training=training, grid=grid, progress=progress
    )


def layer_shapes(
    model: nn.Module,
    pattern: str | Structure | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> tuple[list[LayerShape], list[Skipped]]:
    """The layers of a model that may run sparse, as `advise_shapes` takes them, and all others with their reasons."""
    layers, left = find_layers(model, include, exclude, layouts=layouts)
    shapes = []
    for layer in layers:
        found = directions_of(layer)
        if isinstance(found, Refusal) and found.cause == "layer":
            left.append(Skipped(layer.name, found.reason))
            continue
        weight = layer_state(layer.module, layer.parameter).weight
        size = (weight.shape[0], weight.shape[1])
        if pattern is not None:
            shapes.append(shape_at(layer.name, size, pattern))
        elif isinstance(found, Refusal):
            shapes.append(LayerShape(layer.name, size, False, found.reason, _density(layer)))
        else:
            shapes.append(LayerShape(layer.name, size, found.both, density=_density(layer)))
    return shapes, left


def _density(layer: Layer) -> float:
    state = layer_state(layer.module, layer.parameter)
    kept = state.weight if state.mask is None else state.mask
    return 1.0 if kept.is_meta else int(kept.detach().count_nonzero()) / max(1, kept.numel())


def shape_at(name: str, shape: tuple[int, int], pattern: str | Structure) -> LayerShape:
    """A layer of this shape, as if pruned to a pattern."""
    pattern = parse_pattern(pattern)
    rows, columns = is_2to4(pattern)
    return LayerShape(name, shape, columns, "" if rows else pattern_refusal(pattern).reason, pattern.density)


def advise_shapes(
    shapes: Iterable[LayerShape],
    tokens: int,
    *,
    left: Iterable[Skipped] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    backend: BackendName = "auto",
    training: bool = True,
    grid: Grid | str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """`advise` without a model, for layers given by name and shape, such as from a checkpoint's headers."""
    check_tokens(tokens)
    check_flag("training", training)
    shapes = list(shapes)
    if wrong := [one for one in shapes if not isinstance(one, LayerShape)]:
        raise TypeError(f"shapes must be LayerShapes, not {type(wrong[0]).__name__}")
    chosen = _device(device)
    small = all(2 * tokens * one.shape[0] * one.shape[1] <= MAX_FLOPS for one in shapes)
    if grid is None and _measures_cpu(chosen, backend, dtype, training) and (backend == CPU or small):
        return advise_on_cpu(shapes, tokens, left=left, dtype=dtype, progress=progress)
    stored: Grid | None = None
    note = ""
    if grid is not None:
        stored = grid if isinstance(grid, Grid) else Grid.read(grid)
    elif chosen.type != "cuda" and backend == "auto":
        grids = stored_grids()
        stored = next((one for one in grids.values() if one.dtype == str(dtype).removeprefix("torch.")), None)
        if stored is None and grids:
            note = f"torch sees no CUDA device here, and there are no stored times for {str(dtype).removeprefix('torch.')}"
        elif stored is None:
            note = "torch sees no CUDA device here, and no grid of measured times is stored; `make bench-gpu` measures one"
    if stored is not None and stored.dtype != str(dtype).removeprefix("torch."):
        raise ValueError(f"the grid was measured in {stored.dtype}, not in {str(dtype).removeprefix('torch.')}")
    names = _candidates(backend, chosen, stored)
    if isinstance(names, Refusal):
        note, names = note or names.reason, []
    source: Source = "predicted" if stored is not None else "measured" if names else "exact"
    where = stored.device if stored is not None else torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    known: dict[tuple[tuple[int, int], bool], Measured | Refusal] = {}
    layers, shapes = [], list(shapes)
    for number, one in enumerate(shapes):
        if progress is not None:
            progress(one.name, number, len(shapes))
        if one.reason:
            found: Measured | Refusal = Refusal(one.reason, "weight")
        elif not names:
            found = Refusal(f"not known: {note}", "unmeasured")
        else:
            key = (one.shape, one.both_ways)
            found = known[key] if key in known else _fastest(one, tokens, dtype, chosen, names, training, stored)
            known[key] = found
        layers.append(_advice(one, tokens, dtype, training, found))
    return Advice(tuple(layers), tuple(left), source, where, tokens, str(dtype).removeprefix("torch."), training, note)


def _measures_cpu(device: torch.device, backend: BackendName, dtype: torch.dtype, training: bool) -> bool:
    """Whether to measure packed products on this CPU.

    Raises:
        BackendError: backend="cpu" was given and this CPU has no kernels.
        ValueError: backend="cpu" was given for training.
    """
    reason = cpu_reason(device, dtype)
    if backend == CPU and reason is not None:
        raise BackendError(f"backend={CPU!r}: {reason}")
    if backend == CPU and training:
        raise ValueError(f"backend={CPU!r} is for inference: pass training=False, or --inference")
    return backend in ("auto", CPU) and reason is None and not training


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device here; leave it out to predict from a stored grid")
    return usable_device(device)


def _candidates(backend: BackendName, device: torch.device, grid: Grid | None) -> list[str] | Refusal:
    """The backends to compare, or a refusal if there are none."""
    if grid is not None:
        measured = sorted({point.backend for point in grid.points})
        return [one for one in measured if backend in ("auto", one)] or Refusal(f"the grid has no times of {backend!r}")
    if backend != "auto":
        chosen = choose_backend(backend, device)
        return chosen if isinstance(chosen, Refusal) else [chosen.name]
    reasons = {name: own.device_reason(device) for name, own in BACKENDS.items() if name != "reference"}
    usable = [name for name, reason in reasons.items() if reason is None]
    return usable or Refusal("; ".join(str(reason) for reason in reasons.values()))


def _fastest(
    layer: LayerShape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    names: list[str],
    training: bool,
    grid: Grid | None,
) -> Measured | Refusal:
    """The backend with the shortest time, or a refusal if none has a time."""
    outcomes = [_timing(name, layer, tokens, dtype, device, training, grid) for name in names]
    measured = [one for one in outcomes if isinstance(one, Measured)]
    refused = [one for one in outcomes if isinstance(one, Refusal)]
    if measured:
        return min(measured, key=lambda one: one.timing.sparse.total_ms)
    unmeasured = any(one.cause == "unmeasured" for one in refused)
    return Refusal("; ".join(one.reason for one in refused), "unmeasured" if unmeasured else "backend")


def _timing(
    name: str,
    layer: LayerShape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    grid: Grid | None,
) -> Measured | Refusal:
    """A layer's times by one backend, or a refusal."""
    (rows, columns), backend = layer.shape, BACKENDS[name]
    both_ways = training and layer.both_ways and backend.shape_reason(columns, rows) is None
    if (reason := backend.dtype_reason(dtype) or backend.shape_reason(rows, columns)) is not None:
        return Refusal(reason)
    if grid is not None:
        timing = grid.predict(layer.shape, tokens, name, training=training, both_ways=both_ways)
        if timing is None:
            reason = f"{rows} x {columns} at {tokens} tokens is outside of the sizes measured with {name}"
            return Refusal(reason, "unmeasured")
        return Measured(name, timing)
    try:
        timing = measure_linear(layer.shape, tokens, dtype, device, name, training=training, both_ways=both_ways)
    except torch.OutOfMemoryError as error:
        return Refusal(f"out of memory while measuring: {str(error).splitlines()[0]}")
    except (BackendError, RuntimeError) as error:
        return Refusal(f"{name} fails on {rows} x {columns} at {tokens} tokens: {str(error).splitlines()[0]}")
    return Measured(name, timing)


def _advice(layer: LayerShape, tokens: int, dtype: torch.dtype, training: bool, found: Measured | Refusal) -> LayerAdvice:
    rows, columns = layer.shape
    weights = rows * columns
    ways = 2 if training and layer.both_ways else 1
    # Positions take one byte per group of four, metadata two bits per kept weight; in training the float32 weight stays.
    dense_bytes = weights * (4 if training else dtype.itemsize)
    sparse_bytes = dense_bytes + ways * weights * 3 // 8 if training else weights * dtype.itemsize * 9 // 16
    exact = (2 * tokens * weights, dense_bytes, dense_bytes if layer.reason else sparse_bytes)
    if isinstance(found, Refusal):
        convert = None if found.cause == "unmeasured" else False
        return LayerAdvice(layer.name, layer.shape, convert, found.reason, None, None, *exact)
    speedup = found.timing.speedup
    wins = speedup > 1.0
    reason = f"{speedup:.2f}x faster" if wins else f"slower by {1 / speedup:.2f}x at {tokens} tokens with {found.backend}"
    return LayerAdvice(layer.name, layer.shape, wins, reason, found.backend, found.timing, *exact)
