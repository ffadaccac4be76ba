"""``python -m attack``: run kinds of attack for a bounded time and print what they found; exit code 1 if anything.

Cases run in a worker process, so that one that crashes or hangs is counted and the next goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from attack.found import CATEGORIES

KINDS = {
    "files": "crafted weights, indices, configs and sidecars",
    "kills": "SIGKILL, SIGTERM and SIGINT at random moments",
    "disks": "full disks, unwritable folders, damaged caches",
    "rivals": "two writers, inputs that change while they are read",
    "values": "bad values for public functions and command-line options",
    "steps": "models whose n-th step fails",
    "solver": "extreme tiles against independent solvers",
}
LONGEST_CASE_S = 90
LONGEST_START_S = 180


def work(kind: str, seed: int, count: int) -> None:
    """In the worker: run cases from a seed on; a line when each begins and when it ends."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.fsync = lambda _: None  # it protects from power failure, which no attack causes, and takes seconds on a busy disk
    attack = import_module(f"attack.{kind}").attack
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints
    print(json.dumps({"ready": True}), file=lines)
    for one in range(seed, seed + count):
        print(json.dumps({"begins": one}), file=lines)
        with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as folder:
            os.chdir(folder)
            found = attack(one, Path(folder))
            os.chdir("/")
        print(json.dumps({"ends": one, "calls": found.calls, "findings": found.findings}), file=lines)


class Run:
    """Workers of one kind, one after the other, until the time is up or the cases are done."""

    def __init__(self, kind: str, seed: int, seconds: float, cases: int) -> None:
        self.kind, self.seed, self.last = kind, seed, seed + cases
        self.deadline = time.monotonic() + seconds
        self.cases, self.calls, self.findings = 0, 0, []  # findings: (category, seed, text)

    def go_on(self) -> None:
        while self.seed < self.last and time.monotonic() < self.deadline:
            self._worker()

    def _worker(self) -> None:
        command = [
            sys.executable,
            "-m",
            "attack",
            "--worker",
            self.kind,
            "--seed",
            str(self.seed),
            "--cases",
            str(self.last - self.seed),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "COLUMNS": "160",
            "HF_HUB_OFFLINE": "1",
        }
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True) as process,
        ):
            assert process.stdout is not None
            selector = selectors.DefaultSelector()
            selector.register(process.stdout, selectors.EVENT_READ)
            os.set_blocking(process.stdout.fileno(), False)
            running, limit, buffer = None, time.monotonic() + LONGEST_START_S, b""
            while True:
                selector.select(max(0.0, min(limit, self.deadline) - time.monotonic()))
                data = process.stdout.read()
                buffer += data or b""
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    limit = time.monotonic() + LONGEST_CASE_S
                    running = event.get("begins") if "ends" not in event else None
                    self._count(event)
                if data == b"":
                    break
                if time.monotonic() > min(limit, self.deadline):
                    if running is not None and time.monotonic() > limit:
                        self._find("hang", running, f"a case took longer than {LONGEST_CASE_S} s")
                    stop(process)
                    return
            code = process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            if code < 0:
                self._find("crash", self.seed, f"the process died of signal {-code}")
            elif code > 0:
                self._find("foreign", self.seed, f"the attack itself failed: {' '.join(said)[:300]}")

    def _count(self, event: dict[str, Any]) -> None:
        if "ends" not in event:
            return
        self.cases, self.calls, self.seed = self.cases + 1, self.calls + event["calls"], event["ends"] + 1
        self.findings += [(category, event["ends"], text) for category, text in event["findings"]]

    def _find(self, category: str, seed: int, text: str) -> None:
        self.findings.append((category, seed, text))
        self.cases, self.seed = self.cases + 1, seed + 1

    def counts(self) -> dict[str, int]:
        counted = Counter(category for category, _, _ in self.findings)
        return {"cases": self.cases, "calls": self.calls, **{one: counted[one] for one in CATEGORIES}}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a worker that we started, with its children: they are one process group of their own."""
    import signal

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(runs: list[Run]) -> None:
    head = ("kind", "cases", "calls", *CATEGORIES)
    rows = [(run.kind, *map(str, run.counts().values())) for run in runs]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    for run in runs:
        for category, seed, text in run.findings:
            print(f"\n{category}, again by --only {run.kind} --seed {seed} --cases 1:\n  {text}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="time for all kinds together")
    parser.add_argument(
        "--seed", type=int, default=0, help="the first case of each kind; the next ones are seed + 1, seed + 2, ..."
    )
    parser.add_argument("--cases", type=int, default=1_000_000, help="at most so many of each kind")
    parser.add_argument(
        "--only", metavar="KIND", action="append", choices=KINDS, help="; ".join(f"{k}: {v}" for k, v in KINDS.items())
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.seed, options.cases)
        return 0
    kinds, begun, runs = options.only or list(KINDS), time.monotonic(), []
    for number, kind in enumerate(kinds):
        left = options.seconds - (time.monotonic() - begun)
        runs.append(Run(kind, options.seed, left / (len(kinds) - number), options.cases))
        runs[-1].go_on()
        if not options.json:
            print(f"{kind}: {runs[-1].counts()}", file=sys.stderr)
    if options.json:
        findings = [
            dict(zip(("kind", "category", "seed", "text"), (run.kind, *one), strict=True)) for run in runs for one in run.findings
        ]
        print(
            json.dumps(
                {"seconds": time.monotonic() - begun, "kinds": {run.kind: run.counts() for run in runs}, "findings": findings},
                indent=2,
            )
        )
    else:
        show(runs)
    return int(any(run.findings for run in runs))


if __name__ == "__main__":
    sys.exit(main())
