"""What masks keep: by structure, by solver, and what a bound says of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from record import newest
from sections.markdown import percent, provenance, table

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
BOUNDS = """**How far above the optimum a bound is**

From a mask alone: u_i is the least score kept by a full row, else 0, v_j alike; the better of (u, v) and (u, v) / 2. The solver's
prices prove optimality in integers; what is left is the rounding of the scores to 24 bits.
"""


def quality(rows: list[dict[str, Any]]) -> list[str]:
    """What masks keep of Gaussian scores."""
    parts = ["## What masks keep\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/quality.py`.\n"]
    side = rows[-1]["side"]
    rows = [row for row in rows if row["side"] == side]
    parts += [f"|N(0,1)|, {side} x {side}; {provenance(rows)}"]
    structures = newest([row for row in rows if row["table"] == "structures"], "pattern")
    body = [
        [pattern, percent(row["retained"]), percent(row["of_plain"], 1), percent(row["density"])]
        for (pattern,), row in structures.items()
    ]
    parts += ["**Share of the total score that the best mask keeps (at most N; proved)**\n"]
    parts += [table(["structure", "kept", "of what plain N:M keeps", "density"], body)]

    by_solver = newest([row for row in rows if row["table"] == "solvers"], "solver", "pattern")
    names = list(dict.fromkeys(name for name, _ in by_solver))

    def cells(name: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(show(row) if (row := by_solver.get((name, pattern))) else "" for pattern in PATTERNS)]

    parts += ["**Value as a share of the best mask with exactly N, and density**\n"]
    shares = [cells(name, lambda row: f"{percent(row['share'], 3)}, {percent(row['density'], 1)}") for name in names]
    parts += [table(["solver", *PATTERNS], shares)]
    parts += ["**Tiles whose rows and columns are not all full**\n"]
    parts += [table(["solver", *PATTERNS], [cells(name, lambda row: percent(row["not_full"], 1)) for name in names])]

    bounds = newest([row for row in rows if row["table"] == "bounds"], "pattern")
    flattened = newest([row for row in rows if row["table"] == "flattened"], "pattern")
    parts += [BOUNDS]
    body = [
        [
            "from the greedy mask alone",
            *(f"{percent(bounds[p,]['from_mask'])} above" if (p,) in bounds else "" for p in PATTERNS),
        ],
        ["from the solver's prices", *(f"{bounds[p,]['from_solver']:.0e} above" if (p,) in bounds else "" for p in PATTERNS)],
    ]
    parts += [table(["bound", *PATTERNS], body)]
    body = [["broken groups of W^T", *(percent(flattened[p,]["broken"], 1) if (p,) in flattened else "" for p in PATTERNS)]]
    parts += ["**Tiles of M * M neighbours of one row, as in the paper's code, in place of squares of the GEMM's matrix**\n"]
    parts += [table(["", *PATTERNS], body)]
    return parts
