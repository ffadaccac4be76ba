"""Full disks, folders that cannot be written, damaged caches: a message and no half output, or the right result."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from attack.found import Found
from attack.jobs import JOBS, NO_MESSAGE, ended, forked, left_behind, weights_of
from attack.kills import prepare, target_of, undisturbed

__all__ = ["attack"]

PROGRAM = """
import torch, bisparse
scores = torch.arange(64.0).view(8, 8)
mask = bisparse.solve(scores, "2:4-T").mask
assert bisparse.verify(mask, "2:4-T")
print("kept", float(scores[mask].sum()))
"""


def attack(seed: int, folder: Path) -> Found:
    """A job on a disk that fills up; at times, a program whose cache of compiled kernels is damaged or cannot be written."""
    found, choose = Found(), random.Random(seed)
    if choose.random() < 0.1:
        _cache(found, folder, choose)
        return found
    job = choose.choice(list(JOBS))
    expected, _ = undisturbed(job, 0)
    prepare(folder, job, 0)
    kind = choose.choice(["full", "full", "full", "full with its log", "errno", "target"])
    limit = choose.choice([0, 100, 1000, 4096, 40_000, 200_000, choose.randrange(1_000_000)])
    if kind == "target":
        target_of(folder, job).symlink_to(folder / "nowhere" / "at all")

    def limited() -> int:
        if kind.startswith("full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if kind == "errno":
            _fail_late(choose.randrange(1, 60))
        return JOBS[job](folder)

    code, what = ended(forked(limited, own_log=kind == "full with its log")), f"{job}, {kind} {limit}"
    found.calls += 1
    said = (folder / "log.txt").read_text(errors="replace") if (folder / "log.txt").exists() else ""
    if code is None:
        found.add("hang", what)
    elif code < 0:
        found.add("crash", f"{what}: signal {-code}")
    elif kind == "full with its log" and code == NO_MESSAGE:
        pass  # whatever the job printed raised an error, and there is no place to say that; its output is judged below
    elif code not in (0, 1, 2) or "Traceback" in said:
        found.add("foreign", f"{what}: exit code {code}: {said[-400:]}")
    written = weights_of(target_of(folder, job))
    if written is not None and written != expected:
        found.add("wrong", f"{what}: the output is neither whole nor absent")
    if code == 0 and written is None:
        found.add("wrong", f"{what}: success, and nothing was written")
    if kind == "target":
        target_of(folder, job).unlink(missing_ok=True) if target_of(folder, job).is_symlink() else None
        shutil.rmtree(folder / "nowhere", ignore_errors=True)
    code = ended(forked(lambda: JOBS[job](folder)))
    if code != 0 or weights_of(target_of(folder, job)) != expected:
        found.add("wrong", f"{what}: cannot be done once there is room: {(folder / 'log.txt').read_text()[-300:]}")
    elif more := left_behind(folder):
        found.add("wrong", f"{what}: leaves {more}")
    return found


def _fail_late(at: int) -> None:
    """From the n-th call on, this process cannot open files to write, as on a disk that is full."""
    import builtins
    import errno
    import io

    count, original = [0], io.open

    def failing(file, mode="r", *args, **kwargs):  # type: ignore[no-untyped-def]
        if any(letter in mode for letter in "wax+"):
            count[0] += 1
            if count[0] >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return original(file, mode, *args, **kwargs)

    builtins.open = io.open = failing


def _cache(found: Found, folder: Path, choose: random.Random) -> None:
    cache = folder / "cache"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}

    def run(limit: int | None = None) -> None:
        found.calls += 1
        before = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, preexec_fn=before, timeout=80
        )
        if done.returncode < 0:
            found.add("crash", f"cache: signal {-done.returncode}")
        elif done.returncode or "kept 1008.0" not in done.stdout:
            found.add("wrong", f"cache: {done.stdout} {done.stderr[-400:]}")

    kind = choose.choice(["full", "file", "damaged"])
    if kind == "full":
        run(choose.choice([0, 1000, 20_000]))
    elif kind == "file":
        cache.write_text("no folder")
        run()
    else:
        run()
        for path in cache.rglob("*.nb?"):
            data = bytearray(path.read_bytes())
            if choose.random() < 0.5 and data:
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            else:
                data = data[: choose.randrange(len(data) + 1)]
            path.write_bytes(data)
        run()
