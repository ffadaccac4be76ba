"""Pruning a folder by magnitude, band by band: weights per second of CPU time and of the clock.

    python benchmarks/streaming.py [--patterns 2:4-T 4:8-T 2:4] [--layers 8] [--repeat 7]

Random bfloat16 layers of 4096 x 4096, written to --folder (a temporary one by default) and pruned by `prune_checkpoint`, which
solves, proves, writes, reads back and verifies. The file is in the page cache; nothing else should run. One thread solves, a
second one writes. Medians. Rows go to results/streaming.jsonl.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bisparse import verify_checkpoint
from bisparse.checkpoint import prune_checkpoint
from record import Record, results_file

SIDE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["2:4-T", "4:8-T", "2:4"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(results_file(options.results, "streaming.jsonl"))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.mkdir()
        generator = torch.Generator().manual_seed(0)
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(options.layers)]
        save_file(
            {name: (torch.randn(SIDE, SIDE, generator=generator) * 0.02).bfloat16() for name in names},
            source / "model.safetensors",
        )
        for pattern in options.patterns:
            for run in range(-1, options.repeat):
                shutil.rmtree(target, ignore_errors=True)
                started = time.process_time(), time.perf_counter()
                prune_checkpoint(source, target, pattern)
                seconds = time.process_time() - started[0], time.perf_counter() - started[1]
                if run < 0:  # compiles, and is verified
                    verify_checkpoint(target, pattern).check()
                    cpu, wall = [], []
                    continue
                cpu.append(seconds[0])
                wall.append(seconds[1])
            weights = options.layers * SIDE * SIDE
            key = {
                "benchmark": "streaming",
                "pattern": pattern,
                "dtype": "bfloat16",
                "weights": weights,
                "repeat": options.repeat,
            }
            figures = {"cpu_s": round(statistics.median(cpu), 3), "wall_s": round(statistics.median(wall), 3)}
            print(record.add(key, figures), flush=True)


if __name__ == "__main__":
    main()
