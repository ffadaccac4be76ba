"""4:8 on 2:4 tensor cores: what the expansion costs on a GPU."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import figure, provenance, table


def gpu_windows(rows: list[dict[str, Any]]) -> list[str]:
    """Dense, 2:4 and expanded products; where there are no rows, that nothing was measured."""
    parts = ["### 4:8 by overlapping windows\n"]
    if not rows:
        return [*parts, "Not measured: no GPU was at hand. `benchmarks/gpu/windows.py`; the arithmetic is in decision 0007.\n"]
    for name in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == name]
        latest = newest(own, "size", "tokens", "contender")
        dense = {(row["size"], row["tokens"]): row["time_ms"] for row in latest.values() if row["contender"] == "dense"}
        body = []
        for row in latest.values():
            place = row["size"], row["tokens"]
            gain = f"{dense[place] / row['time_ms']:.2f} x" if place in dense else ""
            body.append([row["contender"], str(row["size"]), str(row["tokens"]), figure(row["time_ms"]), gain])
        parts += [f"{name}; {provenance(own)}", table(["product", "size", "tokens", "ms", "against dense"], body)]
    return parts
