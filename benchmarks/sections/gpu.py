"""Layers on sparse tensor cores against dense ones, as `benchmarks/gpu/linear.py` and `block.py` measured them."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import figure, percent, provenance, table, verdict


def gpu(rows: list[dict[str, Any]]) -> list[str]:
    """Linear layers and a GPT block, both passes."""
    parts = ["## Sparse tensor cores\n"]
    linear = [row for row in rows if row["benchmark"] == "linear"]
    blocks = [row for row in rows if row["benchmark"] == "block"]
    if not linear and not blocks:
        return [*parts, "Not measured yet: no GPU was at hand. `make bench-gpu` on a machine that has one measures it.\n"]
    if linear:
        parts += [f"**A Linear, float32 weights under bfloat16 autocast, forward and backward** ({where(linear)})\n"]
        body = [
            [
                f"{row['shape'][0]} x {row['shape'][1]}, {row['tokens']:,} tokens",
                row["contender"],
                f"{figure(row['forward_ms'])} + {figure(row['backward_ms'])}",
                *against(row),
            ]
            for row in newest(linear, "shape_text", "tokens", "contender").values()
        ]
        parts += [table(["layer", "contender", "ms", "times dense", "target", ""], body, text_columns=2)]
    if blocks:
        parts += [f"**A GPT block, compiled, forward and backward, masks refreshed every 40 steps** ({where(blocks)})\n"]
        body = [
            [
                f"{row['width']} wide, {row['batch']} x {row['length']}",
                row["contender"],
                f"{figure(row['forward_ms'])} + {figure(row['backward_ms'])}",
                *against(row),
                figure(row["refresh_ms"]) if row["refresh_ms"] else "",
                refresh_share(row),
            ]
            for row in newest(blocks, "width", "batch", "length", "contender").values()
        ]
        head = ["block", "contender", "ms", "times dense", "target", "", "refresh, ms", "of a step with a refresh (under 3 %)"]
        parts += [table(head, body, text_columns=2)]
    return parts


def where(rows: list[dict[str, Any]]) -> str:
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    return f"{devices}; {provenance(rows).rstrip()}"


def against(row: dict[str, Any]) -> list[str]:
    speedup, target = row["speedup"], row["target"]
    if target is None:
        return [f"{speedup:.2f}", "", ""]
    return [f"{speedup:.2f}", f"at least {target}", verdict(speedup >= target)]


def refresh_share(row: dict[str, Any]) -> str:
    share = row["refresh_share_every_step"]
    return "" if share is None else f"{percent(share, 1)}, {verdict(share < row['refresh_share_target'])}"
