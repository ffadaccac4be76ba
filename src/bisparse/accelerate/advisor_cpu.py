"""Advice for a CPU: each layer's product with a given number of tokens, dense by torch and packed, measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bisparse.accelerate.advice import Advice, LayerAdvice, LayerShape
from bisparse.accelerate.backends.cpu import CPU, MAX_DENSITY, MIN_SPEEDUP, measured
from bisparse.accelerate.timing import Pass, Timing
from bisparse.kernels.packed_cpu.layout import packed_bytes
from bisparse.layers import Skipped

__all__ = ["advise_on_cpu"]

MAX_FLOPS = 1e11
"""Operations of one product above which a layer takes seconds and is only measured if backend="cpu" is given."""


@torch.no_grad()
def advise_on_cpu(
    shapes: Iterable[LayerShape],
    tokens: int,
    *,
    left: Iterable[Skipped] = (),
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """Advice for the forward pass, from times of random weights with the layers' shapes and densities."""
    layers, shapes = [], list(shapes)
    for number, one in enumerate(shapes):
        if progress is not None:
            progress(one.name, number, len(shapes))
        layers.append(_layer(one, tokens, dtype))
    threads = torch.get_num_threads()
    where = f"this CPU with {threads} thread{'s' if threads > 1 else ''}"
    return Advice(tuple(layers), tuple(left), "measured", where, tokens, str(dtype).removeprefix("torch."), False)


def _layer(layer: LayerShape, tokens: int, dtype: torch.dtype) -> LayerAdvice:
    rows, columns = layer.shape
    flops, dense_bytes = 2 * tokens * rows * columns, rows * columns * dtype.itemsize
    if layer.density > MAX_DENSITY:
        reason = "its weight is dense: prune it first" if layer.density == 1.0 else f"it keeps {layer.density:.1%} of its entries"
        return LayerAdvice(layer.name, layer.shape, False, reason, None, None, flops, dense_bytes, dense_bytes)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    weight *= torch.rand(rows, columns, generator=generator, dtype=torch.float32, device="cpu") < layer.density
    found = measured(weight, tokens)
    timing = Timing(Pass(1e3 * found.dense_s, 0.0), Pass(1e3 * found.packed_s, 0.0))
    wins = found.speedup > MIN_SPEEDUP
    reason = f"{found.speedup:.2f}x faster"
    if not wins:
        reason = f"slower by {1 / found.speedup:.2f}x packed" if found.speedup < 1.0 else f"only {reason}, which may be noise"
    sparse_bytes = packed_bytes(rows, columns, round(layer.density * rows * columns), dtype)
    return LayerAdvice(layer.name, layer.shape, wins, reason, CPU, timing, flops, dense_bytes, sparse_bytes)
