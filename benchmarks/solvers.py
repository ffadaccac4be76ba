"""How long mask search takes: verify first, then time, everything in one run.

    python benchmarks/solvers.py [--quick] [--side 1024 --side 8192] [--pattern 4:8-T] [--input gaussian] [--layer FILE]

Each cell (input, size, pattern) is solved and its proofs checked tile by tile, and only then timed: all contenders and thread
counts take turns, round after round, so that a slow moment of the machine hits them alike, and medians are compared. Rows go
to benchmarks/results/solvers.jsonl; a run that was cut off goes on where it stopped (same code, device and versions).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import startup
from bisparse import Pattern, Solution, solve, verify
from bisparse.solvers import Exact, Greedy, Sinkhorn, TwoApproximation
from inputs import HARD, INPUTS, LAYER, scores
from record import Record, cores, gaussian, results_file

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
SIDES = (1024, 8192)
SAMPLE = 1 << 20
"""Weights that slow contenders are timed on where the matrix has more; their time is scaled, and the row says so."""
LEAST_S = 0.02
"""A sample of a fast contender repeats the call until it lasts about this long."""
LONG_S = 1.0
"""A contender that takes less has a sample for nothing before each."""
DRIFT = 0.01
"""Relative change of the scores since the solution that a warm start begins from, as between two refreshes of training."""


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` works on `weights` weights; `masks` gives the mask to judge, where there is one."""

    name: str
    run: Callable[[], object]
    weights: int
    threads: tuple[int, ...]
    share: float | None = None
    """Value over the optimum's on the same weights."""
    density: float | None = None
    proof: str = ""
    """What was checked before timing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 x 256, two inputs, few rounds: does it all run?")
    parser.add_argument("--side", type=int, action="append", help=f"side of the matrix; default {SIDES}")
    parser.add_argument("--pattern", action="append", help=f"default {PATTERNS}")
    parser.add_argument("--input", action="append", choices=(*INPUTS, *HARD))
    parser.add_argument("--layer", type=Path, help="a safetensors file with the real layer; default all-MiniLM-L6-v2's")
    parser.add_argument("--tensor", default=LAYER, help="its name in that file")
    parser.add_argument("--rounds", type=int, help="default 9, at 8192 and above 5")
    parser.add_argument("--skip-startup", action="store_true", help="leave out import and compilation times")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/solvers.jsonl; with --quick out/quick/")
    options = parser.parse_args()
    sides = options.side or ((256,) if options.quick else SIDES)
    record = Record(results_file(options.results, "solvers.jsonl", quick=options.quick), options.fresh)
    for side in sides:
        inputs = options.input or (("gaussian", "constant") if options.quick else (*INPUTS, *HARD) if side <= 1024 else INPUTS)
        for pattern in options.pattern or PATTERNS:
            for name in inputs:
                rounds = options.rounds or (3 if options.quick else 5 if side >= 8192 else 9)
                measure(record, name, side, pattern, rounds, options)
    if not options.skip_startup:
        startup.measure(record, 1 if options.quick else 5)


def measure(record: Record, name: str, side: int, pattern: str, rounds: int, options: argparse.Namespace) -> None:
    """One cell: verify, time, and add a row for each contender and thread count."""
    cell = {"benchmark": "solvers", "input": name, "side": side, "pattern": pattern}
    if record.find({**cell, "contender": "end of cell"}) is not None:
        return
    print(f"{pattern} on {name}, {side} x {side}: verifying", end="", flush=True)
    matrix = scores(name, side, options.layer, options.tensor)
    contenders = prepare(matrix, Pattern.parse(pattern), pattern)
    print(", timing", flush=True)
    turns = [(contender, threads) for contender in contenders for threads in contender.threads]
    times: dict[tuple[str, int], list[float]] = {(contender.name, threads): [] for contender, threads in turns}
    calls: dict[tuple[str, int], int] = {}
    brief: dict[tuple[str, int], bool] = {}
    before = torch.get_num_threads()
    for turn in range(-1, rounds):  # the first round warms up and sizes the samples
        for contender, threads in turns:
            torch.set_num_threads(threads)
            count = calls.get((contender.name, threads), 1)
            if turn >= 0 and brief[contender.name, threads]:
                # Not timed: the contender before left its data in the caches, gave pages back, and if it waited for memory the
                # processor has slowed down. Whoever came after the memory pass took up to a third longer.
                for _ in range(count):
                    contender.run()
            start = time.perf_counter()
            for _ in range(count):
                contender.run()
            elapsed = (time.perf_counter() - start) / count
            if turn < 0:
                start = time.perf_counter()  # again: the first call may have compiled or filled caches
                contender.run()
                seconds = time.perf_counter() - start
                calls[contender.name, threads] = max(1, round(LEAST_S / max(seconds, 1e-6)))
                brief[contender.name, threads] = seconds < LONG_S
            else:
                times[contender.name, threads].append(elapsed)
    torch.set_num_threads(before)
    total = matrix.numel()
    for contender, threads in turns:
        samples = times[contender.name, threads]
        median = statistics.median(samples)
        figures: dict[str, Any] = {
            "time_ms": 1e3 * median * total / contender.weights,
            "ns_per_weight": 1e9 * median / contender.weights,
            "spread": (max(samples) - min(samples)) / median,
            "rounds": len(samples),
            "share": contender.share,
            "density": contender.density,
            "proof": contender.proof,
            "scaled_from_weights": None if contender.weights == total else contender.weights,
        }
        row = record.add({**cell, "contender": contender.name, "threads": threads}, figures)
        print_row(row, statistics.median(times["Exact", threads]) * 1e3)
    record.add({**cell, "contender": "end of cell"}, {})


def prepare(matrix: Tensor, pattern: object, text: str) -> list[Contender]:
    """Solve and prove everything, and hand back what is to be timed."""
    assert isinstance(pattern, Pattern)
    n, m = pattern.n, pattern.m
    every = (1, cores()) if cores() > 1 else (1,)
    best = solve(matrix, text)
    best.check()
    exactly = solve(matrix, text, Exact(exactly=True))
    exactly.check()
    noise = gaussian(*matrix.shape, seed=9)
    drifted = (matrix * (1 + DRIFT * noise)).clamp_(min=0)
    warm = solve(drifted, text, warm_start=best)
    warm.check()
    del noise
    proof = "every tile's certificate, in integers"
    size = matrix.numel()

    def exact(name: str, run: Callable[[], object], solution: Solution) -> Contender:
        return Contender(name, run, size, every, 1.0, float(solution.mask.double().mean()), proof)

    contenders = [
        exact("Exact", lambda: solve(matrix, text).mask, best),
        exact("Exact, certificate", lambda: solve(matrix, text).certificate, best),
        exact("Exact, exactly N", lambda: solve(matrix, text, Exact(exactly=True)).mask, exactly),
        exact("Exact, 1 % drift, cold", lambda: solve(drifted, text).certificate, warm),
        exact("Exact, 1 % drift, warm", lambda: solve(drifted, text, warm_start=best).certificate, warm),
    ]
    rows = max(m, min(matrix.shape[0], SAMPLE // matrix.shape[1] // m * m))
    band = matrix[:rows].contiguous()
    optimum = float(band.double()[best.mask[:rows]].sum())
    for name, solver in (
        ("torch greedy", Greedy(fill=False)),
        ("torch greedy, filled", Greedy()),
        ("2-approximation", TwoApproximation()),
        ("Sinkhorn", Sinkhorn()),
    ):
        solution = solve(band, text, solver)
        verify(solution.mask, text).check()
        share = solution.value / optimum if optimum else 1.0
        contenders.append(
            Contender(
                name,
                lambda solver=solver: solve(band, text, solver).mask,  # type: ignore[misc]
                band.numel(),
                every,
                share,
                float(solution.mask.double().mean()),
                "the pattern, on W and W^T",
            )
        )
    contenders.append(or_tools(band, exactly, n, m))
    source, magnitude, byte = matrix.numpy(), np.empty(matrix.shape, np.float32), np.empty(matrix.shape, np.uint8)

    def memory_pass() -> None:
        np.abs(source, out=magnitude)
        byte.fill(1)

    contenders.append(Contender("memory pass", memory_pass, size, (1,)))
    return contenders


def or_tools(band: Tensor, exactly: Solution, n: int, m: int) -> Contender:
    """The baseline: OR-tools' SimpleMinCostFlow, one tile at a time, all arcs added at once from arrays made beforehand.

    It solves the paper's program, exactly N in each row and column: that graph has fewer arcs than the one for "at most N".
    """
    from ortools.graph.python import min_cost_flow

    rows, columns = band.shape
    tiles = band.view(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m * m).double()
    # 24 bits of each tile's largest score, as Exact rounds them.
    exponent = torch.where(tiles.amax(1) > 0, 24 - torch.frexp(tiles.amax(1)).exponent.long(), 0)
    costs = -torch.ldexp(tiles, exponent[:, None]).round().long().numpy()
    tails = np.repeat(np.arange(m, dtype=np.int32), m)
    heads = np.tile(np.arange(m, 2 * m, dtype=np.int32), m)
    capacities, entries = np.ones(m * m, dtype=np.int64), np.arange(m * m, dtype=np.int32)
    nodes, supplies = np.arange(2 * m, dtype=np.int32), np.repeat(np.array([n, -n], dtype=np.int64), m)
    kept = np.empty(costs.shape, dtype=np.int64)

    def run() -> None:
        for tile in range(len(costs)):
            problem = min_cost_flow.SimpleMinCostFlow()
            problem.add_arcs_with_capacity_and_unit_cost(tails, heads, capacities, costs[tile])
            problem.set_nodes_supplies(nodes, supplies)
            assert problem.solve() == problem.OPTIMAL
            kept[tile] = problem.flows(entries)

    run()
    ours = exactly.mask[:rows].view(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m * m).numpy()
    certificate = exactly.certificate
    assert certificate is not None
    fast = (certificate.exponent[: len(costs)].long() == exponent).numpy()
    # Both are exact on the same integers, wherever Exact did not need more than 24 bits.
    same = (-costs * ours).sum(1) == (-costs * kept).sum(1)
    assert same[fast].all(), f"OR-tools and Exact differ on tile {int((~same & fast).argmax())}"
    value = float((tiles.numpy() * kept).sum())
    optimum = float((tiles.numpy() * ours).sum())
    return Contender(
        "OR-tools",
        run,
        band.numel(),
        (1,),
        value / optimum if optimum else 1.0,
        float(kept.mean()),
        "the same integer value as Exact",
    )


def print_row(row: dict[str, Any], exact_ms: float) -> None:
    """One line on the terminal."""
    share = "" if row["share"] is None else f"{100 * row['share']:9.4f} % of the optimum"
    scaled = " (scaled from a sample)" if row["scaled_from_weights"] else ""
    print(
        f"  {row['contender']:24} {row['threads']} thr {row['time_ms']:11.3f} ms {row['ns_per_weight']:9.2f} ns/weight "
        f"{row['time_ms'] / exact_ms:9.1f}x Exact {share}{scaled}",
        flush=True,
    )


if __name__ == "__main__":
    main()
