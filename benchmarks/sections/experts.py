"""Calibration of single experts: routed tokens against all tokens."""

from __future__ import annotations

from statistics import mean

from sections.markdown import provenance, table
from sections.pruning import Row, unmeasured


def experts(rows: list[Row]) -> list[str]:
    """Errors of one synthetic expert by the tokens that it was calibrated on."""
    parts = ["## Experts: tokens routed to them, or all tokens\n"]
    if not rows:
        return [*parts, unmeasured("expert_tokens.py")]
    draws = len({row["draw"] for row in rows})
    parts += [
        "Relative output error at 2:4 on those of 20,000 fresh tokens that the expert gets. Synthetic clusters of tokens, "
        f"2 experts per token; mean over matrices of 64 x 64 and 256 x 256, 8 and 16 experts, {draws} draws. No trained mixture "
        "was measured.\n"
    ]
    heads = ["method", "routed tokens per input", "cells", "error, routed", "error, all tokens", "all tokens better in"]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for ratio in sorted({row["routed_per_input"] for row in rows}):
            own = [row for row in rows if (row["method"], row["routed_per_input"]) == (method, ratio)]
            routed, everything = (mean(row[key] for row in own) for key in ("error_routed", "error_all"))
            better = sum(row["error_all"] < row["error_routed"] for row in own)
            body.append([method, f"{ratio:g}", str(len(own)), f"{routed:.3f}", f"{everything:.3f}", f"{better} of {len(own)}"])
    return [*parts, table(heads, body, 1), provenance(rows)]
