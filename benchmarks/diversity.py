"""Mask diversity: how many masks each structure allows, exactly and by the paper's formulas.

    python benchmarks/diversity.py

Nothing is timed and nothing drawn at random: the rows in benchmarks/results/diversity.jsonl are the same everywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bisparse import mask_diversity
from bisparse.diversity import count_tile_masks, hardware
from record import RESULTS

STRUCTURES = (
    "50%", "8:16", "4:8", "2:4", "32:64-T", "16:32-T", "8:16-T", "4:8-T", "2:4-T", "4:8-paired", "2:4-seq", "4:8-seq",
)  # fmt: skip
SIZES = (64, 1024, 8192 * 8192)
TILES = ((2, 1), (4, 1), (4, 2), (8, 2), (8, 6), (8, 4), (16, 2), (16, 4), (16, 8), (32, 2), (32, 4), (64, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "diversity.jsonl")
    options = parser.parse_args()
    lines = [json.dumps(row) for row in rows()]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} rows in {options.results}")


def rows() -> list[dict[str, Any]]:
    """All rows, in the order of the tables."""
    found: list[dict[str, Any]] = []
    for text in STRUCTURES:
        figures = hardware(text)
        found.append(
            {
                "table": "hardware",
                "pattern": text,
                "selectors": figures.selectors,
                "selector": figures.selector,
                "bits_packed": figures.metadata_bits_packed,
                "bits_per_kept": figures.metadata_bits_per_kept,
                "sparse_gemms": figures.sparse_gemms,
                "with_gradient": figures.sparse_gemms_with_gradient,
                "tensor_cores": figures.tensor_cores,
            }
        )
        for size in SIZES:
            exact, paper = mask_diversity(text, size), mask_diversity(text, size, "paper")
            found.append(
                {
                    "table": "masks",
                    "pattern": text,
                    "size": size,
                    "masks": exact.scientific,
                    "bits": exact.log2_per_weight,
                    "asymptotic": not exact.exact,
                    "paper_masks": paper.scientific,
                    "paper_bits": paper.log2_per_weight,
                }
            )
    for m, n in TILES:
        found.append({"table": "tiles", "m": m, "n": n, "masks": str(count_tile_masks(n, m))})
    return found


if __name__ == "__main__":
    main()
