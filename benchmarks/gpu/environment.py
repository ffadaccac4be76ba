"""What the GPU benchmarks share: is there a GPU, what is it, and how several programs are timed in turns."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from record import ROOT, Record

RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"

FILLER_CYCLES = 1_000_000
"""About half a millisecond."""


def need_gpu(name: str) -> torch.device:
    """The CUDA device; without one, a plain message and exit code 2."""
    if not torch.cuda.is_available():
        print(
            f"benchmarks/gpu/{name}: torch sees no CUDA device here, so nothing was measured. Run `make bench-gpu` on a machine "
            "that has one; `--rehearse` shows that the program runs, on the CPU.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def record_on(device: torch.device, path: Path, fresh: bool) -> Record:
    """The file of rows; each names the GPU, what drives it, and a digest of the code that is measured."""
    record = Record(path, fresh)
    digest = hashlib.sha256()
    package = ROOT / "src" / "bisparse"
    for file in sorted([*package.glob("accelerate/*.py"), *package.glob("training/*.py"), *package.glob("kernels/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    found = torch.cuda.get_device_properties(device)
    record.environment |= {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version(),
        "sources": digest.hexdigest()[:16],
    }
    return record


def take_turns(
    programs: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int, warm_up: int = 5
) -> dict[str, tuple[list[float], list[float]]]:
    """For each program, the medians of its parts and their spread (interquartile range over median), over rounds in turns."""
    for _ in range(warm_up):
        for run in programs.values():
            run()
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            times[name].append(run())
    found = {}
    for name, own in times.items():
        parts = list(zip(*own, strict=True))
        medians = [statistics.median(part) for part in parts]
        spreads = []
        for part, median in zip(parts, medians, strict=True):
            low, _, high = statistics.quantiles(part, n=4) if len(part) > 1 else (median,) * 3
            spreads.append((high - low) / median if median else 0.0)
        found[name] = (medians, spreads)
    return found


def clocked(*parts: Callable[[], Any], device: torch.device) -> tuple[float, ...]:
    """Milliseconds of each part, run one after the other: CUDA events on a GPU, so that nothing waits in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for part in parts:
            part()
            marks.append(time.perf_counter())
        return tuple(1e3 * (end - start) for start, end in itertools.pairwise(marks))
    # While the GPU is busy with this, the first calls are queued: else the time of short ones is that of their launch.
    torch.cuda._sleep(FILLER_CYCLES)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    events[0].record()
    for part, event in zip(parts, events[1:], strict=True):
        part()
        event.record()
    torch.cuda.synchronize(device)
    return tuple(start.elapsed_time(end) for start, end in itertools.pairwise(events))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is NaN."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")
