"""Two writers of one output or journal, and inputs that change while they are read: one whole result, or an error."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import bisparse
from attack.found import Found
from attack.jobs import JOBS, ended, forked, left_behind, make_input, weights_of
from attack.kills import prepare, target_of, undisturbed

__all__ = ["attack"]


def attack(seed: int, folder: Path) -> Found:
    found, choose = Found(), random.Random(seed)
    if choose.random() < 0.5:
        _two_writers(found, folder, choose)
    else:
        _a_changing_input(found, folder, choose)
    return found


def _log(folder: Path) -> str:
    return (folder / "log.txt").read_text(errors="replace")[-400:] if (folder / "log.txt").exists() else ""


def _two_writers(found: Found, folder: Path, choose: random.Random) -> None:
    job = choose.choice(list(JOBS))
    expected, took = undisturbed(job, 0)
    prepare(folder, job, 0)
    first = forked(lambda: JOBS[job](folder))
    time.sleep(choose.uniform(0, 0.7 * took))
    second = forked(lambda: JOBS[job](folder))
    codes = [ended(first), ended(second)]
    found.calls += 2
    if None in codes:
        found.add("hang", f"two of {job}")
    elif any(code < 0 for code in codes if code is not None):
        found.add("crash", f"two of {job}: {codes}")
    elif any(code not in (0, 1, 2) for code in codes) or "Traceback" in _log(folder):
        found.add("foreign", f"two of {job}: exit codes {codes}: {_log(folder)}")
    elif 0 not in codes:
        found.add("wrong", f"two of {job}: none went on: {codes} {_log(folder)}")
    if weights_of(target_of(folder, job)) != expected:
        found.add("wrong", f"two of {job}: the output is not what one of them writes: {codes} {_log(folder)}")
    if more := left_behind(folder):
        found.add("wrong", f"two of {job}: leave {more}")


def _a_changing_input(found: Found, folder: Path, choose: random.Random) -> None:
    """The input becomes another model at a random moment, in place or by a new file, before, while or after it is read."""
    expected, took = undisturbed("prune", 0)
    other, _ = undisturbed("prune", 1)
    make_input(folder / "model", 0)
    make_input(folder / "other", 1)
    pid = forked(lambda: JOBS["prune"](folder))
    time.sleep(choose.uniform(0, took))
    path, kind = folder / "model" / "model.safetensors", choose.choice(["in place", "new file", "truncated", "removed"])
    data = (folder / "other" / "model.safetensors").read_bytes()
    if kind == "in place":
        with open(path, "r+b") as file:
            half = choose.randrange(len(data))
            file.write(data[:half])
            file.flush()
            time.sleep(0.01)
            file.write(data[half:])
    elif kind == "new file":
        os.replace(folder / "other" / "model.safetensors", path)
    elif kind == "truncated":
        os.truncate(path, choose.randrange(len(data)))
    else:
        shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "other")
    code = ended(pid)
    found.calls += 1
    what = f"an input that changes ({kind})"
    if code is None:
        found.add("hang", what)
    elif code < 0:
        found.add("crash", f"{what}: signal {-code}")
    elif code not in (0, 1, 2) or "Traceback" in _log(folder):
        found.add("foreign", f"{what}: exit code {code}: {_log(folder)}")
    written = weights_of(folder / "out")
    if written not in (None, expected, other):
        found.add("wrong", f"{what}: the output mixes two models")
    if (code == 0) != (written is not None):
        found.add("wrong", f"{what}: exit code {code}, and the output is {'there' if written else 'absent'}")
    if written is not None:
        bisparse.verify_checkpoint(folder / "out").check()
