"""Masks and packing on a GPU next to their targets, and the resources that the compiled kernels use, which needs no GPU."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import figure, percent, provenance, table, verdict

EXACT_MS = 2.0
MASK_COPIES, PACK_COPIES = 1.5, 3.0
MORE_MAGNITUDE = 0.015
PATTERNS = ("4:8-T", "8:16-T", "16:32-T")
TILE_PRUNING = "torch's tile pruning, packed"
UNMEASURED = "not measured: no GPU was at hand"

HOW = """Gaussian scores, 8192 x 8192. Before anything is timed every certificate is recomputed, and every 2:4 mask and packed
operand compared with the CPU's; medians between CUDA events. "solve" is what users call, and copies one number from the device;
the operator alone copies none. Torch's tile pruning is the kernel that it took over from xFormers. `make bench-gpu` runs it.
"""

Latest = dict[tuple[Any, ...], dict[str, Any]]


def gpu_solvers(rows: list[dict[str, Any]]) -> list[str]:
    """Times on each device, or, where there are none, the targets and that nothing was measured."""
    parts = ["## Masks on a GPU\n", HOW]
    if not rows:
        return [*parts, targets({})]
    for name in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == name]
        latest = newest(own, "pattern", "dtype", "contender")
        parts += [f"### {name}\n", provenance(own), targets(latest)]
        body = [
            [row["pattern"], row["dtype"], row["contender"], figure(row["time_ms"]), percent(row["share"], 3)]
            for row in latest.values()
        ]
        parts.append(table(["pattern", "dtype", "", "ms", "kept"], body, text_columns=3))
    return parts


def targets(latest: Latest) -> str:
    """The targets of the GPU kernels, each with its figure or with the reason that there is none."""
    body = []
    for pattern in PATTERNS:
        row = latest.get((pattern, "float32", "solve"))
        figures = [UNMEASURED, ""] if row is None else [f"{figure(row['time_ms'])} ms", verdict(row["time_ms"] < EXACT_MS)]
        body.append([f"exact mask, {pattern}, float32, certified", f"under {EXACT_MS:g} ms", *figures])
    half = {contender: row for (pattern, dtype, contender), row in latest.items() if dtype == "bfloat16"}
    for contender, copies, what in (
        ("operator", MASK_COPIES, "exact mask, 2:4-T, bfloat16"),
        ("mask and pack", PACK_COPIES, "2:4-T mask, W and W^T packed, bfloat16"),
    ):
        figures = [UNMEASURED, ""]
        if contender in half and "device copy" in half:
            ratio = half[contender]["time_ms"] / half["device copy"]["time_ms"]
            figures = [f"{figure(ratio)} x", verdict(ratio < copies)]
        body.append([what, f"under {copies:g} x a copy of the matrix", *figures])
    figures = [UNMEASURED, ""]
    if "mask and pack" in half and TILE_PRUNING in half:
        own, torch_own = half["mask and pack"], half[TILE_PRUNING]
        faster, more = torch_own["time_ms"] / own["time_ms"], own["share"] / torch_own["share"] - 1
        figures = [f"{figure(faster)} x as fast, {percent(more)} more", verdict(faster >= 1 and round(more, 3) >= MORE_MAGNITUDE)]
    body.append(
        ["mask and pack against torch's tile pruning", f"no slower, {percent(MORE_MAGNITUDE, 1)} more magnitude", *figures]
    )
    return table(["what", "target", "figure", ""], body, text_columns=4)


def gpu_kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Registers, spills and instructions of the compiled kernels; no GPU is needed for these."""
    parts = ["### Resources of the mask kernels\n"]
    if not rows:
        return [*parts, "Not compiled yet: `benchmarks/gpu/kernels.py`.\n"]
    parts.append(
        "Compiled without a GPU by `benchmarks/gpu/kernels.py`; nothing was timed. Instructions are counted in the machine\n"
        "code, each once. Spills are loads and stores of registers that did not fit.\n"
    )
    body = []
    for row in newest(rows, "call", "kernel").values():
        cells = [row["call"], f"`{row['kernel']}`", str(row["warps"]), str(row["registers"]), str(row["spill_instructions"])]
        body.append([*cells, str(row["shared_bytes"]), str(row["instructions"])])
    head = ["call", "kernel", "warps", "registers", "spills", "shared bytes", "instructions"]
    return [*parts, f"{rows[-1]['device']}; {provenance(rows)}", table(head, body, text_columns=2)]
