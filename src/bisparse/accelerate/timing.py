"""Times and memory of a Linear on a device, dense and sparse: medians of both passes, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from bisparse.accelerate.eligibility import Plan
from bisparse.accelerate.linear_packed import PackedLinear
from bisparse.accelerate.linear_trained import SparseLinear

__all__ = ["Pass", "Timing", "measure_linear", "random_mask"]


@dataclass(frozen=True)
class Pass:
    """What one way to run a layer (dense, or sparse by some backend) takes: median times in milliseconds, and memory in bytes."""

    forward_ms: float
    backward_ms: float
    """Time of the gradients of input and weight; 0 if only the forward pass was measured."""
    peak_bytes: int | None = None
    """Largest memory in addition to what was allocated before; None on a device that does not report it."""

    @property
    def total_ms(self) -> float:
        """Time of both passes."""
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Timing:
    """The same layer dense and sparse, measured together."""

    dense: Pass
    sparse: Pass

    @property
    def speedup(self) -> float:
        """Dense time divided by sparse time, of both passes."""
        return self.dense.total_ms / self.sparse.total_ms


def measure_linear(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    *,
    training: bool = True,
    both_ways: bool = True,
    mvue: bool = False,
    rounds: int = 15,
) -> Timing:
    """Time a Linear of shape (out_features, in_features) on random numbers.

    In training: float32 weights under autocast, gradients of input and weight. Otherwise: the forward pass, weights in `dtype`.

    Args:
        both_ways: the mask is 2:4-T, and the gradient of the input is a sparse product.
        rounds: number of timed runs of each, after three warm-up runs.

    Raises:
        BackendError, RuntimeError: the backend refuses the layer, or memory runs out (`torch.OutOfMemoryError`).
    """
    # Events are recorded on a stream of the current device, which may not be the one that is measured.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        contenders = [_contender(shape, tokens, dtype, device, one, training, both_ways, mvue) for one in (None, backend)]
        for _ in range(3):
            for run in contenders:
                run()
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(rounds):
            for own, run in zip(times, contenders, strict=True):
                own.append(run())
        peaks = [_peak(run, device) for run in contenders]
    dense, sparse = (
        Pass(statistics.median(one for one, _ in own), statistics.median(other for _, other in own), peak)
        for own, peak in zip(times, peaks, strict=True)
    )
    return Timing(dense, sparse)


def random_mask(rows: int, columns: int, device: torch.device, seed: int = 0) -> Bool[Tensor, "R C"]:
    """A random 2:4-T mask, two kept entries per row and column of each tile: one tile with rows and columns permuted."""
    generator = torch.Generator(device).manual_seed(seed)
    tiles = (-(-rows // 4), -(-columns // 4))
    first = torch.rand((*tiles, 4), device=device, generator=generator).argsort(-1)
    second = torch.rand((*tiles, 4), device=device, generator=generator).argsort(-1)
    # Before permutation, rows 0 and 1 keep columns 0 and 1, and rows 2 and 3 keep columns 2 and 3.
    kept = (first // 2).unsqueeze(-1) == (second // 2).unsqueeze(-2)
    return kept.transpose(1, 2).reshape(4 * tiles[0], 4 * tiles[1])[:rows, :columns].contiguous()


def _contender(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    training: bool,
    both_ways: bool,
    mvue: bool,
) -> Callable[[], tuple[float, float]]:
    rows, columns = shape
    module = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.float32 if training else dtype)
    generator = torch.Generator(device).manual_seed(1)
    inputs = torch.randn(tokens, columns, device=device, dtype=dtype, generator=generator)
    if backend is not None:
        with torch.no_grad():
            module.weight.mul_(random_mask(rows, columns, device))
        if training:
            SparseLinear.install_(module, Plan("trained", backend, dtype, both_ways))
            assert isinstance(module, SparseLinear)
            # As in sparse training, where all weights get a gradient.
            module.products = replace(module.products, fixed=False, mvue=mvue)
        else:
            PackedLinear.install_(module, Plan("packed", backend, dtype, both_ways=False))
    if not training:
        return lambda: _timed(lambda: module(inputs), None, device)
    inputs.requires_grad_()
    upstream = torch.randn(tokens, rows, device=device, dtype=dtype, generator=generator)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    def forward() -> Tensor:
        module.zero_grad()
        inputs.grad = None
        with autocast:
            output: Tensor = module(inputs)
        return output

    return lambda: _timed(forward, upstream, device)


@torch.enable_grad()
def _timed(forward: Callable[[], Tensor], upstream: Tensor | None, device: torch.device) -> tuple[float, float]:
    """Milliseconds of forward and backward, by CUDA events on a GPU."""
    with torch.inference_mode() if upstream is None else nullcontext():
        if device.type != "cuda":
            start = time.perf_counter()
            output = forward()
            middle = time.perf_counter()
            if upstream is not None:
                output.backward(upstream)
            end = time.perf_counter()
            return 1e3 * (middle - start), 1e3 * (end - middle) if upstream is not None else 0.0
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        output = forward()
        events[1].record()
        if upstream is not None:
            output.backward(upstream)
        events[2].record()
        torch.cuda.synchronize(device)
        return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2]) if upstream is not None else 0.0


def _peak(run: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
