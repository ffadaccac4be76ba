"""Pruning a folder without building the model."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import provenance, table, verdict

ASKED = 150.0
"""Million weights per second of one core, at 2:4-T."""

HOW = """Random bfloat16 layers of 4096 x 4096 in one safetensors file, which is in the page cache. `bisparse prune FOLDER`
solves, proves and writes each band, writing on a second thread, and then reads each tensor back and verifies it.
`python benchmarks/streaming.py` runs it.
"""


def streaming(rows: list[dict[str, Any]]) -> list[str]:
    """Weights per second, one table for each device."""
    parts = ["## How fast a folder is pruned by magnitude\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/streaming.py`.\n"]
    parts.append(HOW)
    for name in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == name]
        lines = []
        for (pattern,), row in newest(own, "pattern").items():
            speeds = [row["weights"] / row[clock] / 1e6 for clock in ("cpu_s", "wall_s")]
            asked = f"{ASKED:.0f}: {verdict(speeds[0] >= ASKED)}" if pattern == "2:4-T" else ""
            lines.append([pattern, f"{row['weights']:,}", *(f"{speed:.0f}" for speed in speeds), asked])
        parts += [
            f"### {name} ({own[-1]['cores']} cores, {own[-1]['vector']})\n",
            provenance(own),
            table(["pattern", "weights", "million per CPU second", "million per second", "asked per CPU second"], lines),
        ]
    return parts
