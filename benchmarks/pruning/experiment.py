"""What the pruning experiments share: the methods by name, rows that are not run twice, and text to calibrate on."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bisparse.pruning import ALPS, AdaPrune, BlockReconstruction, Magnitude, Method, NetworkReconstruction, SparseGPT, Wanda
from bisparse.results import PruneReport
from record import commit, device, read_rows, versions

METHODS: dict[str, tuple[Method, str]] = {
    "magnitude": (Magnitude(), "parallel"),
    "wanda": (Wanda(), "sequential"),
    "sparsegpt": (SparseGPT(), "sequential"),
    "adaprune, dense inputs": (AdaPrune(), "parallel"),
    "adaprune, own inputs": (AdaPrune(correct_upstream=False), "sequential"),
    "adaprune": (AdaPrune(), "sequential"),
    "sparsegpt, refitted": (SparseGPT(refit=True, correct_upstream=True), "sequential"),
    "alps, own inputs": (ALPS(correct_upstream=False), "sequential"),
    "alps": (ALPS(), "sequential"),
    "adaprune, damping 0.01": (AdaPrune(damping=0.01), "sequential"),
    "alps, short": (ALPS(rho_every=1, refit_damping=0.01), "sequential"),
    "alps, short, own inputs": (ALPS(rho_every=1, refit_damping=0.01, correct_upstream=False), "sequential"),
    "alps, short, dense inputs": (ALPS(rho_every=1, refit_damping=0.01), "parallel"),
    "sparsegpt, refitted, damping 0.01": (
        AdaPrune(SparseGPT(correct_upstream=True), damping=0.01),
        "sequential",
    ),
}
"""Name -> the method and the order of calibration. AdaPrune here is the default: Wanda's mask, least squares, damping by
held-out data, targets of the dense network; "own inputs" without the last, "dense inputs" as in the paper. "short": rho grows
at every iteration of ADMM instead of every third, and the refit's damping is 0.01 instead of chosen by held-out data."""

RECONSTRUCTIONS = {
    ", then blocks": BlockReconstruction(epochs=1),
    ", then blocks, up to 8 epochs": BlockReconstruction(epochs=8),
    ", then the network": NetworkReconstruction(epochs=2),
    ", then the network on more": NetworkReconstruction(epochs=1),
    ", then blocks, then the network on more": NetworkReconstruction(epochs=1, blocks=BlockReconstruction(epochs=1)),
    ", then blocks, then the network": NetworkReconstruction(epochs=2, blocks=BlockReconstruction(epochs=1)),
}
"""What a method's name ends in where each block, or the network, is reconstructed as a whole after its layers."""


def method_named(name: str) -> tuple[Method, dict[str, Any]]:
    """A method, and the options that `prune_` takes with it."""
    suffix = max((suffix for suffix in RECONSTRUCTIONS if name.endswith(suffix)), key=len, default="")
    method, order = METHODS[name.removesuffix(suffix)]
    return method, {"order": order, "reconstruction": RECONSTRUCTIONS.get(suffix)}


class Rows:
    """A JSONL file of results. What is in it is not run again, whatever the commit: full grids take hours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)
        self.environment = {**device(), "versions": versions(), "commit": commit(), "threads": torch.get_num_threads()}

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    @contextmanager
    def new(self, key: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        """A row to fill, on disk when the block ends; None where the file has it already.

        A value of None in the key stands for rows without that column.
        """
        if self.find(key) is not None:
            yield None
            return
        row = {name: value for name, value in key.items() if value is not None}
        yield row
        print(json.dumps(row), flush=True)
        row |= {**self.environment, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measured(report: PruneReport, seconds: float) -> dict[str, Any]:
    """The columns that every pruning result has."""
    errors = [layer.error for layer in report if layer.error is not None]
    before = [layer.error_before for layer in report if layer.error_before is not None]
    dampings = sorted(layer.damping for layer in report if layer.damping is not None)
    return {
        "layers": len(report),
        "density": round(report.density, 5),
        "seconds": round(seconds, 2),
        "mean_error": round(sum(errors) / len(errors), 5) if errors else None,
        "mean_error_before": round(sum(before) / len(before), 5) if before else None,
        "median_damping": dampings[len(dampings) // 2] if dampings else None,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def load_text(path: Path, unit: str, *, spaced: bool = False) -> list[str]:
    """Sentences, or one long text, of a plain file, or of a folder of word/tag files (the Brown corpus).

    Punctuation follows words without a space, as people write; with `spaced` it is a word of its own, as in Brown and WikiText.
    """
    files = sorted(file for file in path.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name)) if path.is_dir() else [path]
    lines = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if path.is_dir():
            text = re.sub(r"(\S+)/\S+", r"\1", text)
        lines += [words(line) if spaced else detokenised(line) for line in text.splitlines() if line.strip()]
    if unit == "sentence":
        return [line for line in lines if 5 <= len(line.split()) <= 60]
    return ["\n".join(lines)]


def words(line: str) -> str:
    return re.sub(r"\s+", " ", line.strip()).replace("``", '"').replace("''", '"')


def detokenised(line: str) -> str:
    line = re.sub(r" @(.)@ ", r"\1", words(line))  # WikiText's hyphens and separators of thousands
    line = re.sub(r" ([.,;:!?)\]])", r"\1", line)
    return re.sub(r"([(\[]) ", r"\1", line)
