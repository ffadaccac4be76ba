"""Results as lines of JSON: every row says on what it was measured, and what is there is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("bisparse", "torch", "numpy", "numba", "ortools")


def results_file(given: Path | None, name: str, *, quick: bool = False) -> Path:
    """Where rows are kept: what was given, else the committed results, or out/quick/ of a run that only tries the program."""
    if given is not None:
        return given
    folder = ROOT / "out" / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def device() -> dict[str, Any]:
    """The processor as it names itself, what it can do, and how many cores this process may use."""
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            model = found[1].strip()
        if found := re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE):
            flags = found[1]
    vector = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine()
    return {"device": model, "vector": vector, "cores": cores()}


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what a time depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sources() -> str:
    """A digest of the code that is measured: rows of other code are not taken for this one's."""
    digest = hashlib.sha256()
    package = ROOT / "src" / "bisparse"
    for path in sorted([*(package / "kernels").rglob("*.py"), *(package / "solvers").glob("*.py"), package / "_solve.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out, with a plus where the sources differ from it."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


class Record:
    """A file of rows. A row is found again by its `key`, for the same sources, on the same device, with the same versions."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.environment = {**device(), "versions": versions(), "sources": sources()}
        self.commit = commit()
        self.rows = [] if fresh else read_rows(path)
        if fresh and path.exists():
            path.unlink()

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of that key measured in this environment; None where there is none yet."""
        wanted = {**key, **self.environment}
        return next((row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())), None)

    def add(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
        """Append a row; it is on disk when this returns, so that a run that is cut off loses nothing."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = {**key, **figures, **self.environment, "commit": self.commit, "date": now}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, oldest first; none where there is no file. A last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def newest(rows: Sequence[dict[str, Any]], *key: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The latest row of each combination of the named fields."""
    return {tuple(row.get(name) for name in key): row for row in rows}
