"""What a user waits for before the first mask: import, compilation of the kernels in an empty cache, and a second process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

from record import Record

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
IMPORT = """
import time, torch
start = time.perf_counter()
import bisparse
bisparse.solve, bisparse.verify, bisparse.Pattern
print(time.perf_counter() - start, time.time(), time.process_time())
"""
FIRST_MASK = """
import sys, time, torch
torch.set_num_threads(1)
scores = torch.rand(256, 256)
start = time.perf_counter()
from bisparse import solve
solve(scores, sys.argv[1]).mask
print(time.perf_counter() - start, time.time(), time.process_time())
"""
EVERYTHING = """
import sys, time, torch
torch.set_num_threads(1)
scores = torch.rand(256, 256)
start = time.perf_counter()
from bisparse import solve
from bisparse.solvers import Exact
first = solve(scores, sys.argv[1]).check()
solve(scores, sys.argv[1], Exact(exactly=True)).check()
solve(scores * 1.01, sys.argv[1], warm_start=first).check()
print(time.perf_counter() - start, time.time(), time.process_time())
"""


def measure(record: Record, repeat: int) -> None:
    """Add the rows that are not there: seconds, each in processes of their own."""
    key = {"benchmark": "startup", "what": "import", "pattern": ""}
    if record.find(key) is None:
        times = [_run(IMPORT, None)[0] for _ in range(2 * repeat + 1)][1:]
        print(_shown(record.add(key, {"time_s": statistics.median(times), "times_s": times})))
    for pattern in PATTERNS:
        for what, script in (("mask", FIRST_MASK), ("mask, proof, exactly, warm", EVERYTHING)):
            cold_key = {"benchmark": "startup", "what": f"cold: {what}", "pattern": pattern}
            second_key = {"benchmark": "startup", "what": f"second process: {what}", "pattern": pattern}
            if record.find(cold_key) is not None and record.find(second_key) is not None:
                continue
            with tempfile.TemporaryDirectory() as cache:
                cold, _, _, cold_cpu = _run(script, cache, pattern)
                again = [_run(script, cache, pattern) for _ in range(repeat)]
            print(_shown(record.add(cold_key, {"time_s": cold, "cpu_s": cold_cpu})))
            inside, until, whole, cpu = (statistics.median(run[which] for run in again) for which in range(4))
            times = {"time_s": inside, "until_mask_s": until, "process_s": whole, "cpu_s": cpu}
            print(_shown(record.add(second_key, times)))


def _run(script: str, cache: str | None, *arguments: str) -> tuple[float, float, float, float]:
    """Seconds the script reports, without torch's own import; from the start of its process until then; of the whole process,
    whose end takes a while where torch is loaded; of processor time, on all cores."""
    environment = dict(os.environ) if cache is None else {**os.environ, "NUMBA_CACHE_DIR": cache}
    start = time.time()
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    whole = time.time() - start
    if done.returncode:
        raise RuntimeError(f"a process of the start-up benchmark failed:\n{done.stderr}")
    inside, then, processor = map(float, done.stdout.split())
    return inside, then - start, whole, processor


def _shown(row: dict[str, object]) -> str:
    whole = f", whole process {row['until_mask_s']:.2f} s, with its end {row['process_s']:.2f} s" if "process_s" in row else ""
    return f"start-up   {row['pattern'] or '-':8} {row['what']:44} {row['time_s']:8.3f} s{whole}"
