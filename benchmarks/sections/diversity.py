"""How many masks each structure allows, and what it asks of hardware."""

from __future__ import annotations

from typing import Any

from sections.markdown import table


def diversity(rows: list[dict[str, Any]]) -> list[str]:
    """How many masks there are."""
    parts = ["## Mask diversity\n"]
    if not rows:
        return [*parts, "Not computed yet: `python benchmarks/diversity.py`.\n"]
    masks = [row for row in rows if row["table"] == "masks"]
    for size in dict.fromkeys(row["size"] for row in masks):
        body = []
        for row in (row for row in masks if row["size"] == size):
            exact = [row["masks"], f"{row['bits']:.4f}{' (asymptotic)' if row['asymptotic'] else ''}"]
            paper = [row["paper_masks"], f"{row['paper_bits']:.4f}"] if row["paper_bits"] != row["bits"] else ["the same", ""]
            body.append([row["pattern"], *exact, *paper])
        parts += [f"**T = {size:,} weights**\n"]
        parts += [table(["structure", "masks", "bits per weight", "by the paper's formula", "bits per weight"], body)]
    tiles = [row for row in rows if row["table"] == "tiles"]
    parts += ["**M x M matrices of 0 and 1 with all row and column sums N**\n"]
    counts = [[str(row["m"]), str(row["n"]), grouped(row["masks"])] for row in tiles]
    parts += [table(["M", "N", "how many"], counts, text_columns=2)]
    parts += ["**In hardware**\n"]
    body = []
    for row in (row for row in rows if row["table"] == "hardware"):
        selectors = f"{row['selectors']} of {row['selector']}" if row["selectors"] else ""
        bits = "" if row["bits_packed"] is None else f"{row['bits_packed']:.3g}"
        kept = "" if row["bits_per_kept"] is None else str(row["bits_per_kept"])
        gemms = [f"{row['sparse_gemms']} of 3", f"{row['with_gradient']} of 3"]
        body.append([row["pattern"], selectors, bits, kept, *gemms, "yes" if row["tensor_cores"] else "no"])
    head = [
        "structure",
        "selectors per group",
        "metadata bits per weight, packed",
        "bits per kept entry",
        "sparse GEMMs",
        "with MVUE",
    ]
    head += ["tensor cores today"]
    parts += [table(head, body)]
    return parts


def grouped(digits: str) -> str:
    return f"{int(digits):,}" if len(digits) < 30 else f"{digits[0]}.{digits[1:6]}...e{len(digits) - 1}"
