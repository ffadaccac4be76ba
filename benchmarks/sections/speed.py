"""The solver benchmark: how fast the best mask is found, next to its targets."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import figure, percent, provenance, table, verdict

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
FASTER_THAN_OR_TOOLS = {"2:4-T": 1500, "4:8-T": 150, "8:16-T": 80, "16:32-T": 60}
GUIDE_NS = {"2:4-T": 0.55, "4:8-T": 3.0, "8:16-T": 4.5, "16:32-T": 5.5}
"""Nanoseconds per weight on an AVX-512 core: a guide; the ratio is the target."""
TWO_THREADS = 1.7
COLD_S, SECOND_S, IMPORT_S = 30.0, 2.0, 0.3

HOW = """Every tile's certificate was checked before anything was timed. Contenders and thread counts take turns within one run,
and medians are compared. Exact is `solve(scores, pattern)` as users call it: at most N, mask only, float32, gap zero. OR-tools is
one SimpleMinCostFlow per tile, all arcs added at once, on the same integers. The memory pass is numpy's abs and a byte written
per weight. Where the matrix has more than 2^20 weights, OR-tools and the torch solvers are timed on 2^20 of them and scaled
(marked ~). `make bench` runs it.
"""

Latest = dict[tuple[Any, ...], dict[str, Any]]


def speed(rows: list[dict[str, Any]]) -> list[str]:
    """Tables of the solver benchmark, one set for each device."""
    parts = ["## How fast the best mask is found\n"]
    if not rows:
        return [*parts, "Not measured yet: `make bench`.\n"]
    parts += [
        HOW,
        "1024 x 1024 Gaussian scores, one thread:\n",
        "![Milliseconds of each solver by pattern](../images/solver-times.svg)\n",
    ]
    timed = [row for row in rows if row["benchmark"] == "solvers" and "time_ms" in row]
    startup = [row for row in rows if row["benchmark"] == "startup"]
    for name in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in timed if row["device"] == name]
        if own:
            parts += [f"### {heading(own)}\n", provenance(own)]
            latest = newest(own, "side", "pattern", "input", "contender", "threads")
            for side in sorted({row["side"] for row in own}):
                parts += against_targets(latest, side)
                parts += by_input(latest, side)
                parts += by_contender(latest, side)
        if own_startup := [row for row in startup if row["device"] == name]:
            parts += start_up(own_startup)
    return parts


def heading(rows: list[dict[str, Any]]) -> str:
    return f"{rows[-1]['device']} ({rows[-1]['cores']} cores, {rows[-1]['vector']})"


def most_threads(latest: Latest, side: int, pattern: str, name: str) -> int:
    return max(
        (key[4] for key in latest if key[:4] == (side, pattern, name, "Exact") and key[4] is not None),
        default=1,
    )


def against_targets(latest: Latest, side: int) -> list[str]:
    """Gaussian scores, one thread: the ratio to OR-tools, the guide, and the gain by threads."""
    body = []
    for pattern in PATTERNS:
        one = latest.get((side, pattern, "gaussian", "Exact", 1))
        reference = latest.get((side, pattern, "gaussian", "OR-tools", 1))
        if one is None or reference is None:
            continue
        ratio = reference["time_ms"] / one["time_ms"]
        threads = most_threads(latest, side, pattern, "gaussian")
        cells = [pattern, scaled(reference), figure(one["time_ms"]), f"{figure(ratio)} x", f"{FASTER_THAN_OR_TOOLS[pattern]} x"]
        cells += [verdict(ratio >= FASTER_THAN_OR_TOOLS[pattern]), figure(one["ns_per_weight"]), figure(GUIDE_NS[pattern], 2)]
        if threads > 1:
            gain = one["time_ms"] / latest[side, pattern, "gaussian", "Exact", threads]["time_ms"]
            target = f"{TWO_THREADS} x: {verdict(gain >= TWO_THREADS)}" if threads == 2 else ""
            cells += [f"{gain:.2f} x", target]
        else:
            cells += ["", ""]
        body.append(cells)
    if not body:
        return []
    head = ["pattern", "OR-tools ms", "Exact ms", "faster", "target", "", "ns per weight", "guide (AVX-512)", "all threads", ""]
    return [f"**{side} x {side}, Gaussian, one thread**\n", table(head, body)]


def scaled(row: dict[str, Any]) -> str:
    return ("~" if row["scaled_from_weights"] else "") + figure(row["time_ms"])


def by_input(latest: Latest, side: int) -> list[str]:
    """Every kind of matrix: nanoseconds per weight, and the ratio to OR-tools on the same scores."""
    names = list(dict.fromkeys(key[2] for key in latest if key[0] == side))
    body = []
    for name in names:
        cells = [name]
        for pattern in PATTERNS:
            one = latest.get((side, pattern, name, "Exact", 1))
            reference = latest.get((side, pattern, name, "OR-tools", 1))
            if one is None or reference is None:
                cells.append("")
                continue
            ratio = reference["time_ms"] / one["time_ms"]
            missed = "" if ratio >= FASTER_THAN_OR_TOOLS[pattern] else " **missed**"
            cells.append(f"{figure(one['ns_per_weight'])} ns ({figure(ratio)} x{missed})")
        body.append(cells)
    if len(names) < 2:
        return []
    return [
        f"**{side} x {side}, one thread: Exact, and how many times faster than OR-tools, by kind of scores**\n",
        table(["scores", *PATTERNS], body),
    ]


def by_contender(latest: Latest, side: int) -> list[str]:
    """Gaussian scores: each solver's time on one thread and on all, and the fraction of the optimum that it keeps."""
    names = list(dict.fromkeys(key[3] for key in latest if key[0] == side and key[2] == "gaussian"))
    body = []
    for name in names:
        cells = [name]
        for pattern in PATTERNS:
            one = latest.get((side, pattern, "gaussian", name, 1))
            if one is None:
                cells.append("")
                continue
            text = f"{scaled(one)} ms"
            threads = most_threads(latest, side, pattern, "gaussian")
            if threads > 1 and (several := latest.get((side, pattern, "gaussian", name, threads))):
                text += f" / {scaled(several)}"
            if one["share"] is not None:
                text += f", {percent(one['share'], 3)}"
            cells.append(text)
        body.append(cells)
    if not body:
        return []
    title = f"**{side} x {side}, Gaussian: milliseconds on one thread / on all, and the value as a fraction of the optimum**\n"
    return [title, table(["", *PATTERNS], body)]


def start_up(rows: list[dict[str, Any]]) -> list[str]:
    """Import, cold compilation and second process, against their targets."""
    latest = newest(rows, "what", "pattern")
    body = []
    for (what, pattern), row in latest.items():
        flavour, more = what.split(": ", 1)[-1], ""
        if what == "import":
            time_s, target, label = row["time_s"], IMPORT_S, "import of bisparse, without torch's own"
        elif what.startswith("cold"):
            time_s, target, label = row["time_s"], COLD_S, f"{flavour}: first call, empty cache"
        else:
            label = f"{flavour}: in a second process, with torch's import (whole process in brackets)"
            time_s, target, more = row["until_mask_s"], SECOND_S, f" ({row['process_s']:.2f} s)"
        body.append([label, pattern, f"{time_s:.2f} s{more}", f"under {target:g} s", verdict(time_s < target)])
    body.sort(key=lambda cells: (cells[0], PATTERNS.index(cells[1]) if cells[1] in PATTERNS else -1))
    return ["**Start-up**\n", provenance(rows), table(["what", "pattern", "time", "target", ""], body, text_columns=2)]
