"""What mask search costs: its share of training time when masks are refreshed every 40 steps and every step.

    python benchmarks/training/search_cost.py [--steps 6] [--threads N]

On ResNet-20 (random images of Fashion-MNIST's size, which take the same time) and on a GPT of about 10M parameters, at 2:4-T,
4:8-T and 16:32-T: the exact solver cold and warm, greedy, the 2-approximation, Sinkhorn, OR-tools' flow, and a mixed-integer
program (HiGHS, timed on a sample of the tiles and scaled up; the row says on how many). Training steps without a search and
searches are timed in turn; the share is search / (k * step + search) at a refresh every k steps. Rows go to
results/training-search.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from experiment import Record, parser
from torch import nn

import bisparse
from bisparse.training import Sparsity, finalize_, sparsify_
from bisparse.training.recipe.models import GPT, ResNet20

PATTERNS = ("2:4-T", "4:8-T", "16:32-T")
SOLVERS: dict[str, Callable[[], bisparse.Solver]] = {
    "exact, warm": bisparse.Exact,
    "exact, cold": bisparse.Exact,
    "greedy": bisparse.Greedy,
    "2-approximation": bisparse.TwoApproximation,
    "Sinkhorn": bisparse.Sinkhorn,
    "OR-tools flow": bisparse.MinCostFlow,
}
INTEGER_TILES = {4: 400, 8: 150, 32: 8}
"""Tiles that the integer program is timed on."""


def resnet(batch: int) -> tuple[nn.Module, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    model = ResNet20(16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, lambda: (torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,)))


def gpt(batch: int) -> tuple[nn.Module, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    return GPT(384, 6, 6, 256), lambda: (torch.randint(0, 256, (batch, 256)), torch.randint(0, 256, (batch, 256)))


MODELS = {"resnet20": (resnet, 128), "gpt-10m": (gpt, 16)}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    start = time.perf_counter()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def search_seconds(sparsity: Sparsity, cold: bool) -> float:
    if cold:
        sparsity.search.prices.clear()
    before = sparsity.search_seconds
    sparsity.refresh()
    return sparsity.search_seconds - before


def integer_program_seconds(sparsity: Sparsity, pattern: bisparse.Pattern) -> tuple[float, int, int]:
    """Seconds for all tiles by HiGHS' mixed-integer solver, from a sample; (seconds, tiles timed, tiles in all)."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    from bisparse.tiles import pad_to_multiple, to_matrices, to_tiles

    m, n = pattern.m, pattern.n
    tiles = []
    for layer in sparsity.layers:
        padded = pad_to_multiple(to_matrices(layer.weight.detach().abs(), layer.layout), m)
        tiles.append(to_tiles(padded.reshape(-1, padded.shape[-1]), m))
    everything = torch.cat(tiles)
    count = min(INTEGER_TILES.get(m, 50), len(everything))
    chosen = everything[torch.randperm(len(everything))[:count]].double().numpy()
    rows, columns = np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))
    sides = LinearConstraint(np.vstack([rows, columns]), -np.inf, n)
    start = time.perf_counter()
    for tile in chosen:
        milp(-tile.ravel(), constraints=sides, integrality=np.ones(m * m), bounds=Bounds(0, 1))
    return (time.perf_counter() - start) * len(everything) / count, count, len(everything)


def main() -> None:
    arguments = parser(__doc__ or "", "training-search.jsonl")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--patterns", nargs="+", default=PATTERNS)
    arguments.add_argument("--steps", type=int, default=6, help="timed training steps, each followed by a timed search")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--batch", type=int, default=0, help="instead of the model's own")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    record = Record(chosen.results)
    for name in chosen.models:
        build, batch_size = MODELS[name]
        batch_size = chosen.batch or batch_size
        for pattern in chosen.patterns:
            for solver in (*SOLVERS, "integer program"):
                key = {"model": name, "pattern": pattern, "solver": solver, "threads": chosen.threads, "batch": batch_size}
                if chosen.dry_run or record.find(key) is not None:
                    print(key)
                    continue
                figures = measure(build, batch_size, pattern, solver, chosen.steps)
                row = record.add(key, figures)
                shares = f"{row['share_every_40']:.3%} at every 40, {row['share_every_1']:.2%} at every step"
                print(
                    f"{name} {pattern} {solver}: step {row['step_ms']:.1f} ms, search {row['search_ms']:.2f} ms, {shares}",
                    flush=True,
                )


def measure(
    build: Callable[..., tuple[nn.Module, Callable[..., object]]], batch_size: int, pattern: str, solver: str, steps: int
) -> dict[str, object]:
    torch.manual_seed(0)
    model, batches = build(batch_size)
    own = SOLVERS.get(solver, bisparse.Exact)()
    sparsity = sparsify_(model, pattern, solver=own, refresh=10**9, measure_every=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsity.attach(optimizer)
    train_step(model, optimizer, batches())
    step_times, search_times, how = [], [], {}
    for _ in range(steps):
        step_times.append(train_step(model, optimizer, batches()))
        if solver != "integer program":
            search_times.append(search_seconds(sparsity, cold=solver == "exact, cold"))
    if solver == "integer program":
        structure = bisparse.Pattern.parse(pattern)
        assert isinstance(structure, bisparse.Pattern)
        seconds, timed, tiles = integer_program_seconds(sparsity, structure)
        search_times, how = [seconds], {"tiles_timed": timed, "tiles": tiles}
    weights = sum(layer.weight.numel() for layer in sparsity.layers)
    finalize_(model)
    step, search = statistics.median(step_times), statistics.median(search_times[1:] or search_times)
    return how | {
        "weights": weights,
        "steps": steps,
        "step_ms": 1000 * step,
        "step_ms_all": [round(1000 * one, 3) for one in step_times],
        "search_ms": 1000 * search,
        "search_ms_all": [round(1000 * one, 3) for one in search_times],
        # The paper's figure is time added over training without a search.
        "added_every_40": search / (40 * step),
        "added_every_1": search / step,
        "share_every_40": search / (40 * step + search),
        "share_every_1": search / (step + search),
    }


if __name__ == "__main__":
    main()
