"""Jobs killed at random moments: their output is whole or absent, and a second run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import cache
from pathlib import Path

import bisparse
from attack.found import Found
from attack.jobs import JOBS, ended, forked, left_behind, make_input, warm_up, weights_of

__all__ = ["attack"]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@cache
def undisturbed(job: str, seed: int) -> tuple[dict[str, bytes] | None, float]:
    """What a job writes, and how long it takes."""
    import tempfile

    warm_up()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(Path(folder), job, seed)
        start = time.perf_counter()
        code = ended(forked(lambda: JOBS[job](Path(folder))))
        took = time.perf_counter() - start
        assert code == 0, Path("log.txt").read_text()
        result = weights_of(target_of(Path(folder), job))
        os.chdir(before)
    return result, took


def target_of(folder: Path, job: str) -> Path:
    return folder / ("out.html" if job == "report" else "out")


def prepare(folder: Path, job: str, seed: int) -> None:
    if job in ("prune", "report"):
        make_input(folder / "model", seed)
    if job == "report":
        bisparse.prune_checkpoint(folder / "model", folder / "pruned", "2:4")


def attack(seed: int, folder: Path) -> Found:
    """One job, killed up to three times and then left alone."""
    found, choose = Found(), random.Random(seed)
    job = choose.choice(list(JOBS))
    expected, took = undisturbed(job, 0)
    prepare(folder, job, 0)
    for _ in range(choose.randint(1, 3)):
        number = choose.choice(SIGNALS)
        pid, moment = forked(lambda: JOBS[job](folder)), choose.uniform(0, 1.1 * took)
        time.sleep(moment)
        os.kill(pid, number)
        if choose.random() < 0.3 and number != signal.SIGKILL:
            time.sleep(0.01)
            os.kill(pid, number)  # a launcher that is in a hurry
        code, what = ended(pid), f"{job}, {signal.Signals(number).name} after {moment:.2f} of {took:.2f} s"
        found.calls += 1
        if code is None:
            found.add("hang", what)
        elif code not in (0, 130, 143, -number):
            found.add("foreign", f"{what}: exit code {code}: {Path('log.txt').read_text()[-300:]}")
        written = weights_of(target_of(folder, job))
        if written is not None and written != expected:
            found.add("wrong", f"{what}: the output is neither whole nor absent")
    code = ended(forked(lambda: JOBS[job](folder)))
    found.calls += 1
    if code != 0:
        found.add("wrong", f"{job}: cannot be done again: exit code {code}: {Path('log.txt').read_text()[-300:]}")
    elif weights_of(target_of(folder, job)) != expected:
        found.add("wrong", f"{job}: ends otherwise after it was stopped")
    elif more := left_behind(folder):
        found.add("wrong", f"{job}: leaves {more}")
    return found
