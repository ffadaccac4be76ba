"""What masks keep: the share of L1 by structure, by solver, and what a certificate says of a heuristic's mask.

    python benchmarks/quality.py [--side 1024] [--quick]

Gaussian scores throughout, as in the paper's and TSENOR's tables. Rows go to benchmarks/results/quality.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisparse import Pattern, solve, verify
from bisparse.solvers import Exact, Greedy, Sinkhorn, Solver, TwoApproximation
from bisparse.tiles import Layout, LayoutKind
from record import Record, gaussian, results_file

STRUCTURES = (
    "50%", "16:32", "8:16", "4:8", "2:4", "1:2", "32:64-T", "16:32-T", "8:16-T", "4:8-T", "2:4-T",
    "4:8-paired", "2:4-seq", "4:8-seq",
)  # fmt: skip
PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, help="side of the matrix; default 1024")
    parser.add_argument("--quick", action="store_true", help="256 x 256: does it all run?")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/quality.jsonl; with --quick out/quick/")
    options = parser.parse_args()
    side = options.side or (256 if options.quick else 1024)
    record = Record(results_file(options.results, "quality.jsonl", quick=options.quick), options.fresh)
    scores = gaussian(side, side).abs()
    for structure in STRUCTURES:
        add(
            record, {"table": "structures", "side": side, "pattern": structure}, lambda text=structure: by_structure(scores, text)
        )
    for pattern in PATTERNS:
        for name, solver in solvers().items():
            key = {"table": "solvers", "side": side, "pattern": pattern, "solver": name}
            add(record, key, lambda pattern=pattern, solver=solver: by_solver(scores, pattern, solver))
        key = {"table": "bounds", "side": side, "pattern": pattern}
        add(record, key, lambda pattern=pattern: bounds(scores, pattern))
        key = {"table": "flattened", "side": side, "pattern": pattern}
        add(record, key, lambda pattern=pattern: flattened(scores, pattern))


def add(record: Record, key: dict[str, Any], measure: Any) -> None:
    """A row, unless it is there."""
    key = {"benchmark": "quality", **key}
    if record.find(key) is None:
        figures = measure()
        record.add(key, figures)
        shown = {name: round(value, 6) if isinstance(value, float) else value for name, value in figures.items()}
        print(*(key[name] for name in key if name not in ("benchmark", "side")), shown, flush=True)


def solvers() -> dict[str, Solver | None]:
    """By the name in the table; None is the heuristic written out here."""
    return {
        "Exact, at most N": Exact(),
        "Exact, exactly N": Exact(exactly=True),
        "Sinkhorn": Sinkhorn(),
        "greedy, filled": Greedy(),
        "greedy, as the paper's code": Greedy(fill=False),
        "2-approximation (Algorithm 1)": TwoApproximation(),
        "row top-N, then column top-N": None,
    }


def tiles_of(matrix: Tensor, m: int) -> Tensor:
    """(B, M, M)."""
    rows, columns = matrix.shape
    return matrix.view(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m, m)


def by_structure(scores: Tensor, text: str) -> dict[str, Any]:
    """Share of the total score that the best mask keeps, proved; and of what the same N:M keeps without the transpose."""
    solution = solve(scores, text).check()
    plain = solve(scores, text.removesuffix("-T")).value if text.endswith("-T") else None
    return {
        "retained": solution.retained,
        "of_plain": solution.value / plain if plain else None,
        "density": density(solution.mask),
    }


def by_solver(scores: Tensor, pattern: str, solver: Solver | None) -> dict[str, Any]:
    """Value over that of the best "= N" mask, the unit of the published tables; and how full the tiles are."""
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern)
    n, m = structure.n, structure.m
    optimum = solve(scores, pattern, Exact(exactly=True)).check().value
    mask = rows_then_columns(scores, n, m) if solver is None else solve(scores, pattern, solver).mask
    verify(mask, pattern).check()
    tiles = tiles_of(mask, m)
    full = (tiles.sum(1) == n).all(1) & (tiles.sum(2) == n).all(1)
    value = float(scores.double()[mask].sum())
    return {"share": value / optimum, "density": density(mask), "not_full": 1 - density(full)}


def rows_then_columns(scores: Tensor, n: int, m: int) -> Tensor:
    """The best N of every M along rows, and of these the best N of every M along columns."""
    along_rows = solve(scores, f"{n}:{m}").mask
    along_columns = solve((scores * along_rows).t().contiguous(), f"{n}:{m}").mask.t()
    return along_rows & along_columns


def bounds(scores: Tensor, pattern: str) -> dict[str, Any]:
    """How close a bound made from the greedy mask alone is to the optimum: u_i is the least score kept by a full row, else 0."""
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern)
    n, m = structure.n, structure.m
    optimum = solve(scores, pattern).value
    w = tiles_of(scores, m).double()
    kept = tiles_of(solve(scores, pattern, Greedy(fill=False)).mask, m)
    least = torch.where(kept, w, torch.inf)
    u = torch.where(kept.sum(2) == n, least.amin(2), 0)
    v = torch.where(kept.sum(1) == n, least.amin(1), 0)
    totals = []
    for scale in (1.0, 0.5):
        slack = (w - scale * (u[:, :, None] + v[:, None, :])).clamp(min=0)
        totals.append(n * scale * (u.sum(1) + v.sum(1)) + slack.sum((1, 2)))
    from_mask = float(torch.minimum(*totals).sum())
    certificate = solve(scores, pattern).bound
    return {"from_mask": from_mask / optimum - 1, "from_solver": certificate / optimum - 1}


def flattened(scores: Tensor, pattern: str) -> dict[str, Any]:
    """Groups of W^T that break when a tile is M * M neighbours of one row, as in the paper's code, and not a square of W."""
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern)
    n, m = structure.n, structure.m
    mask = solve(scores.view(-1, m, m), pattern, layout=Layout(LayoutKind.EXPERTS)).mask.view(scores.shape)
    groups = mask.t().reshape(-1, m).sum(1)
    return {"broken": float((groups > n).double().mean())}


def density(mask: Tensor) -> float:
    """Share of entries that are True."""
    return float(mask.double().mean())


if __name__ == "__main__":
    main()
