"""Which layers win by running sparse: measured on this device, or predicted from a stored grid; and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from bisparse.accelerate.accelerate import BackendName, is_2to4, layer_reason, weight_refusal
from bisparse.accelerate.advice import Advice, LayerAdvice, LayerShape, Source
from bisparse.accelerate.backends.base import BACKENDS, BackendError, choose_backend
from bisparse.accelerate.grid import Grid, stored_grids
from bisparse.accelerate.timing import Timing, measure_linear
from bisparse.device import usable_device
from bisparse.diversity import hardware
from bisparse.layers import Filter, Skipped, find_layers
from bisparse.pattern import Structure, parse_pattern
from bisparse.solution import verify
from bisparse.training.layer import static_mask
from bisparse.training.parametrizations import own_parametrization, trained_parameter

__all__ = ["advise", "advise_shapes", "layer_shapes", "shape_at"]


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
    progress: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """Say of every layer of a model whether it wins by running sparse, by measuring dense and sparse on this device.

    Without a CUDA device, times are predicted from a grid; without a grid either, only shapes, bytes and FLOPs are given, and
    that is said. Layers of the same shape are measured once.

    Args:
        tokens: rows of the layers' inputs, all batches and positions together.
        dtype: float16 or bfloat16.
        device: by default CUDA where there is one.
        backend: measure this one alone; "auto" measures all that run here and takes the fastest.
        training: both passes count; otherwise the forward pass alone. By default the mode of the model.
        pattern: as if the layers were pruned to it; by default what their weights, or masks in training, hold now.
        grid: measured times to predict from, or the file; by default those that come with the package.
        progress: called with the layer's name, the shapes done and those there are.

    Raises:
        BackendError: the backend that was asked for does not run on this device.
        ValueError: tokens below 1; a device that is not there; a file that is no grid.
    """
    shapes, left = layer_shapes(model, pattern, include, exclude)
    training = model.training if training is None else training
    return advise_shapes(
        shapes, tokens, left=left, dtype=dtype, device=device, backend=backend, training=training, grid=grid, progress=progress
    )


def layer_shapes(
    model: nn.Module,
    pattern: str | Structure | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
) -> tuple[list[LayerShape], list[Skipped]]:
    """The layers of a model as advice sees them, and those that are no candidates for pruning at all."""
    layers, left = find_layers(model, include, exclude)
    shapes = []
    for layer in layers:
        if (reason := layer_reason(layer)) is not None:
            left.append(Skipped(layer.name, reason))
            continue
        weight = trained_parameter(layer.module, layer.parameter)
        own, static = own_parametrization(layer.module, layer.parameter), static_mask(layer.module, layer.parameter)
        size = (weight.shape[0], weight.shape[1])
        if pattern is not None or own is not None:
            shapes.append(shape_at(layer.name, size, own.pattern if pattern is None and own is not None else pattern or "2:4"))
            continue
        mask = weight if static is None else static
        refusal = weight_refusal(mask)
        both = refusal is None and bool(verify(mask, "2:4-T"))
        shapes.append(LayerShape(layer.name, size, both, refusal.reason if refusal is not None else ""))
    return shapes, left


def shape_at(name: str, shape: tuple[int, int], pattern: str | Structure) -> LayerShape:
    """A layer as if it were pruned to a pattern."""
    pattern = parse_pattern(pattern)
    rows, columns = is_2to4(pattern)
    reason = "" if rows else f"{pattern} has no path on tensor cores, it stays masked-dense. {hardware(pattern).note}"
    return LayerShape(name, shape, columns, reason)


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
    """`advise` without a model: layers by name and shape, as a checkpoint's headers give them."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens={tokens!r}: expected the number of rows of a layer's input, at least 1")
    chosen = _device(device)
    stored: Grid | None = None
    note = ""
    if grid is not None:
        stored = grid if isinstance(grid, Grid) else Grid.read(grid)
    elif chosen.type != "cuda" and backend == "auto":
        grids = stored_grids()
        stored = next((one for one in grids.values() if one.dtype == str(dtype).removeprefix("torch.")), None)
        if stored is None and grids:
            note = f"torch sees no CUDA device here, and the stored times are not of {str(dtype).removeprefix('torch.')}"
        elif stored is None:
            note = "torch sees no CUDA device here, and no grid of measured times is stored; `make bench-gpu` measures one"
    if stored is not None and stored.dtype != str(dtype).removeprefix("torch."):
        raise ValueError(f"the grid was measured in {stored.dtype}, and {str(dtype).removeprefix('torch.')} is asked for")
    names = _candidates(backend, chosen, stored)
    if isinstance(names, str):
        note, names = note or names, []
    source: Source = "predicted" if stored is not None else "measured" if names else "exact"
    where = stored.device if stored is not None else torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    known: dict[tuple[tuple[int, int], bool], tuple[str, Timing] | str] = {}
    layers, shapes = [], list(shapes)
    for number, one in enumerate(shapes):
        if progress is not None:
            progress(one.name, number, len(shapes))
        key = (one.shape, one.both_ways)
        if not one.reason and names and key not in known:
            known[key] = _fastest(one, tokens, dtype, chosen, names, training, stored)
        layers.append(_advice(one, tokens, dtype, training, known.get(key) if not one.reason else None, note))
    return Advice(tuple(layers), tuple(left), source, where, tokens, str(dtype).removeprefix("torch."), training, note)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device here; leave it out to predict from a stored grid")
    return usable_device(device)


def _candidates(backend: BackendName, device: torch.device, grid: Grid | None) -> list[str] | str:
    """The backends to compare, or why there are none."""
    if grid is not None:
        measured = sorted({point.backend for point in grid.points})
        return [one for one in measured if backend in ("auto", one)] or f"the grid has no times of {backend!r}"
    if backend != "auto":
        chosen = choose_backend(backend, device)
        return chosen if isinstance(chosen, str) else [chosen.name]
    reasons = {name: own.device_reason(device) for name, own in BACKENDS.items() if name != "reference"}
    usable = [name for name, reason in reasons.items() if reason is None]
    return usable or "; ".join(str(reason) for reason in reasons.values())


def _fastest(
    layer: LayerShape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    names: list[str],
    training: bool,
    grid: Grid | None,
) -> tuple[str, Timing] | str:
    """The backend with the least time and its times, or why none has any."""
    rows, columns = layer.shape
    found: list[tuple[str, Timing]] = []
    reasons = []
    for name in names:
        backend = BACKENDS[name]
        both_ways = training and layer.both_ways and backend.shape_reason(columns, rows) is None
        reason = backend.dtype_reason(dtype) or backend.shape_reason(rows, columns)
        if reason is None and grid is not None:
            timing = grid.predict(layer.shape, tokens, name, training=training, both_ways=both_ways)
            if timing is not None:
                found.append((name, timing))
                continue
            reason = f"{rows} x {columns} at {tokens} tokens lies outside of what was measured with {name}"
        elif reason is None:
            try:
                timing = measure_linear(layer.shape, tokens, dtype, device, name, training=training, both_ways=both_ways)
                found.append((name, timing))
                continue
            except torch.OutOfMemoryError as error:
                reason = f"out of memory while measuring: {str(error).splitlines()[0]}"
            except (BackendError, RuntimeError) as error:
                reason = f"{name} fails on {rows} x {columns} at {tokens} tokens: {str(error).splitlines()[0]}"
        reasons.append(str(reason))
    return min(found, key=lambda one: one[1].sparse.total_ms) if found else "; ".join(reasons)


def _advice(
    layer: LayerShape, tokens: int, dtype: torch.dtype, training: bool, known: tuple[str, Timing] | str | None, note: str
) -> LayerAdvice:
    rows, columns = layer.shape
    weights = rows * columns
    ways = 2 if training and layer.both_ways else 1
    # Positions take a byte a group of four, metadata two bits a kept weight; in training the float32 weight stays.
    dense_bytes = weights * (4 if training else dtype.itemsize)
    sparse_bytes = dense_bytes + ways * weights * 3 // 8 if training else weights * dtype.itemsize * 9 // 16
    exact = (2 * tokens * weights, dense_bytes, dense_bytes if layer.reason else sparse_bytes)
    if layer.reason:
        return LayerAdvice(layer.name, layer.shape, False, layer.reason, None, None, *exact)
    if known is None:
        return LayerAdvice(layer.name, layer.shape, None, f"not known: {note}", None, None, *exact)
    if isinstance(known, str):
        outside = "lies outside" in known
        return LayerAdvice(layer.name, layer.shape, None if outside else False, known, None, None, *exact)
    backend, timing = known
    wins = timing.speedup > 1.0
    reason = f"{timing.speedup:.2f}x faster" if wins else f"slower by {1 / timing.speedup:.2f}x at {tokens} tokens with {backend}"
    return LayerAdvice(layer.name, layer.shape, wins, reason, backend, timing, *exact)
