"""What mask search costs: its share of training time when masks are refreshed every 40 steps and every step.

    python benchmarks/training/search_cost.py [--steps 6] [--threads N]

On ResNet-20 (random images of Fashion-MNIST's size, which take the same time) and on a GPT of about 10M parameters, at 2:4-T,
4:8-T and 16:32-T: the exact solver cold and warm, greedy, the 2-approximation, Sinkhorn, OR-tools' flow, and a mixed-integer
program (HiGHS, timed on a sample of the tiles and scaled up; the row says on how many). A training step without a search, then
a search by each solver for the same weights, and so on in turn; the share is search / (k * step + search) at a refresh every k
steps. Rows go to results/training-search.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from experiment import Record, parser
from recipes.models import GPT, ResNet20
from torch import nn

import bisparse
from bisparse.training import Sparsity, finalize_, sparsify_

PATTERNS = ("2:4-T", "4:8-T", "16:32-T")
SOLVERS: dict[str, Callable[[], bisparse.solvers.Solver]] = {
    "exact, warm": bisparse.solvers.Exact,  # first: what comes later in a turn would give it prices of the same weights
    "exact, cold": bisparse.solvers.Exact,
    "greedy": bisparse.solvers.Greedy,
    "2-approximation": bisparse.solvers.TwoApproximation,
    "Sinkhorn": bisparse.solvers.Sinkhorn,
    "OR-tools flow": bisparse.solvers.MinCostFlow,
}
CACHES = 1 << 24
"""Numbers that fill the caches."""
PROGRAM = "integer program"
INTEGER_TILES = {4: 400, 8: 150, 32: 8}
"""Tiles that the integer program is timed on."""


def resnet(batch: int) -> tuple[nn.Module, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    model = ResNet20(16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, lambda: (torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,)))


def gpt(batch: int) -> tuple[nn.Module, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    return GPT(384, 6, 6, 256), lambda: (torch.randint(0, 256, (batch, 256)), torch.randint(0, 256, (batch, 256)))


MODELS = {"resnet20": (resnet, 128), "gpt-10m": (gpt, 16)}


def now() -> float:
    """Seconds of the processor where one thread works, which others on the machine disturb least; else of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    start = now()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return now() - start


def search_seconds(sparsity: Sparsity, solver: bisparse.solvers.Solver, other: torch.Tensor) -> float:
    """Of one search, with the caches full of `other` data, as a training step leaves them."""
    other.add_(1)
    sparsity.search.solver = solver
    start = now()
    sparsity.refresh()
    return now() - start


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
    start = now()
    for tile in chosen:
        milp(-tile.ravel(), constraints=sides, integrality=np.ones(m * m), bounds=Bounds(0, 1))
    return (now() - start) * len(everything) / count, count, len(everything)


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
            keys = {
                solver: {"model": name, "pattern": pattern, "solver": solver, "threads": chosen.threads, "batch": batch_size}
                for solver in (*SOLVERS, PROGRAM)
            }
            left = [solver for solver, key in keys.items() if record.find(key) is None]
            if chosen.dry_run or not left:
                print("\n".join(str(keys[solver]) for solver in left))
                continue
            figures = measure(build, batch_size, pattern, chosen.steps)
            for solver in left:
                row = record.add(keys[solver], figures[solver])
                said = f"{row['share_every_40']:.3%} at every 40, {row['share_every_1']:.2%} at every step"
                print(
                    f"{name} {pattern} {solver}: step {row['step_ms']:.1f} ms, search {row['search_ms']:.2f} ms, {said}",
                    flush=True,
                )


def measure(
    build: Callable[..., tuple[nn.Module, Callable[..., tuple[torch.Tensor, torch.Tensor]]]],
    batch_size: int,
    pattern: str,
    steps: int,
) -> dict[str, dict[str, object]]:
    """By solver: how long its searches took beside the training steps."""
    torch.manual_seed(0)
    model, batches = build(batch_size)
    sparsity = sparsify_(model, pattern, refresh=10**9, measure_every=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsity.attach(optimizer)
    solvers = {name: make() for name, make in SOLVERS.items()}
    other = torch.zeros(CACHES)
    step_times: list[float] = []
    search_times: dict[str, list[float]] = {name: [] for name in SOLVERS}
    for turn in range(steps + 1):  # the first warms up
        step = train_step(model, optimizer, batches())
        found = {}
        for name, solver in solvers.items():
            if name == "exact, cold":
                prices, masks = dict(sparsity.search.prices), [layer.mask.clone() for layer in sparsity.layers]
            if name != "exact, warm":
                sparsity.search.prices.clear()
            found[name] = search_seconds(sparsity, solver, other)
        sparsity.search.prices.update(prices)  # training goes on with the exact masks, the next warm search with their prices
        for layer, mask in zip(sparsity.layers, masks, strict=True):
            layer.mask.copy_(mask)
        if turn:
            step_times.append(step)
            for name, seconds in found.items():
                search_times[name].append(seconds)
    structure = bisparse.Pattern.parse(pattern)
    assert isinstance(structure, bisparse.Pattern)
    seconds, timed, tiles = integer_program_seconds(sparsity, structure)
    search_times[PROGRAM] = [seconds]
    shared = {
        "weights": sum(layer.weight.numel() for layer in sparsity.layers),
        "steps": steps,
        "clock": "processor" if torch.get_num_threads() == 1 else "wall",
    }
    finalize_(model)
    return {
        name: shared
        | ({"tiles_timed": timed, "tiles": tiles} if name == PROGRAM else {})
        | shares(statistics.median(step_times), statistics.median(own))
        | {
            "step_ms_all": [round(1000 * one, 3) for one in step_times],
            "search_ms_all": [round(1000 * one, 3) for one in own],
        }
        for name, own in search_times.items()
    }


def shares(step: float, search: float) -> dict[str, float]:
    return {
        "step_ms": 1000 * step,
        "search_ms": 1000 * search,
        # The paper's figure is time added over training without a search.
        "added_every_40": search / (40 * step),
        "added_every_1": search / step,
        "share_every_40": search / (40 * step + search),
        "share_every_1": search / (step + search),
    }


if __name__ == "__main__":
    main()
