"""Packed products on CPUs against dense ones, as `benchmarks/cpu.py` measured them."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import figure, percent, provenance, table

HOW = """Weights in bfloat16. `packed` is the product with non-zeros and a bit per entry, `torch` the faster of torch's bfloat16
and float32 Linear, `int8` the packed product with weights rounded to int8, `dense loop` our inner loop on the same matrix
with its zeros, and `one pass` a sum over the packed bytes,
which no product can beat if the weight is read from memory. Medians of turns in random order in one run; each product was
compared with float64 first. `load` is the machine's load average: figures taken next to other programs are no claims about speed.
"""


def cpu(rows: list[dict[str, Any]]) -> list[str]:
    """One table per device and number of tokens; that nothing was measured where there are no rows."""
    parts = ["## Products with packed weights\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/cpu.py`.\n"]
    parts.append(HOW)
    for name in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == name]
        parts += [f"### {name} ({own[-1]['cores']} cores, {own[-1]['vector']})\n", provenance(own)]
        latest = newest(own, "rows", "columns", "pattern", "tokens", "threads").values()
        for tokens in sorted({row["tokens"] for row in latest}):
            chosen = [row for row in latest if row["tokens"] == tokens]
            parts += [f"**{tokens} token{'' if tokens == 1 else 's'}**\n", _table(chosen)]
    return parts


def _table(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        torch_ms = min(row["torch_bf16_ms"], row["torch_f32_ms"])
        cells = [f"{row['rows']} x {row['columns']}", row["pattern"], str(row["threads"])]
        cells += [figure(row["packed_ms"]), figure(torch_ms), f"{torch_ms / row['packed_ms']:.2f}"]
        cells += [figure(row[name]) if name in row else "" for name in ("int8_ms", "dense_loop_ms", "one_pass_ms")]
        body.append([*cells, percent(row["bytes"] / row["bytes_dense"], 1), f"{row.get('load', float('nan')):.1f}"])
    head = [
        "weight",
        "pattern",
        "threads",
        "packed, ms",
        "torch, ms",
        "times as fast",
        "int8, ms",
        "dense loop, ms",
        "one pass, ms",
    ]
    return table([*head, "bytes of dense", "load"], body, text_columns=2)
