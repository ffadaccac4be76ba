"""Sparse training: what a training step costs more than a dense one, with all hooks, masking and decay."""

from __future__ import annotations

from typing import Any

from sections.markdown import table

VARIANTS = ("static", "dynamic", "dynamic, ste")
TARGETS = {"static": 2, "dynamic": 5}


def training_step(rows: list[dict[str, Any]]) -> list[str]:
    """Added CPU time per step, by device and model; the newest measurement of each."""
    parts = [
        "## Sparse training: what a step costs\n",
        "Added CPU time of a step with 4:8-T masks, one thread, masks refreshed every 40 steps: masking, hooks, decay and search "
        "together. Targets: static 2 % and dynamic 5 % at most, on ResNet-20 and on the GPT.\n",
    ]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/training/step_cost.py`.\n"]
    # Rows with this note are of an earlier way to mask, measured once more to compare.
    current = [row for row in rows if row["note"] != "masked by torch's operators"]
    newest = {(row["device"], row["model"], row["variant"]): row for row in current}
    body = []
    for device, model in dict.fromkeys((device, model) for device, model, _ in newest):
        added = [newest.get((device, model, variant)) for variant in VARIANTS]
        dense = newest[device, model, "dense"]
        figures = [f"{100 * row['over_dense']:+.1f}" if row else "-" for row in added]
        body.append([device, model, f"{dense['step_ms']:.0f}", *figures, str(dense["rounds"]), dense["date"][:10]])
    parts.append(table(("device", "model", "dense, ms", *(f"{one}, %" for one in VARIANTS), "rounds", "date"), body, 2))
    parts.append(
        "Medians over rounds, in each of which every variant takes a step. *ste*: without decay. *gpt*: torch's unfused AdamW, "
        "which takes the square roots of the zero moments of pruned weights several times as slowly: 128 x 512 numbers "
        "took 28 us, and 184 us with half of them zero (AMD EPYC). `fused=True` does not.\n"
    )
    return parts
