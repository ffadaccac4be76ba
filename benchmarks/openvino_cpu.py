"""A pruned model in OpenVINO on this CPU: outputs against torch's, and whether its sparse weights option gains anything.

    python benchmarks/openvino_cpu.py FOLDER [--batch 8 --length 64] [--threads 1] [--turns 40]

FOLDER is a BERT-like encoder, pruned here to 2:4 by magnitude, since only speed and outputs matter; exported as float32, with
int8 weights, and with int8 weights and inputs. The option is CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, which packs int8 weights
whose fraction of zeros is at least the given one, on processors with AMX. Contenders take turns; medians. Outputs are compared
with torch's, in which inputs are not rounded. Needs the package openvino, which is in no extra. Rows:
benchmarks/results/openvino.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import openvino
import torch

import bisparse
from bisparse.cli.model_source import open_source
from bisparse.export import export_onnx
from bisparse.quantization import quantize_
from record import RESULTS, Record

SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.45}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--results", type=Path, default=RESULTS / "openvino.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = open_source(str(options.source)).model.float().eval()
    model = copy.deepcopy(dense)
    layers = [one.name for one in bisparse.prune_(model, "2:4")]
    rounded = copy.deepcopy(model)
    report = quantize_(rounded, "int8", include=layers)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    arrays = {name: one.numpy() for name, one in inputs.items()}
    core, compiled, expected = openvino.Core(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        ways = (
            ("dense", dense, None, None),
            ("2:4", model, None, None),
            ("2:4 int8 weights", rounded, report, None),
            ("2:4 int8", rounded, report, [inputs]),
        )
        for name, one, done, ranges in ways:
            file = Path(folder) / f"{name.replace(':', '')}.onnx"
            export_onnx(one, file, inputs, quantized=done, int8_inputs=ranges)
            with torch.inference_mode():
                expected[name] = one(**inputs)[0]
            for option, settings in (("", {}), (", sparse weights", SPARSE)):
                if option and done is None:
                    continue
                threads = {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": "f32"}
                compiled[name + option] = core.compile_model(str(file), "CPU", threads | settings)
        times: dict[str, list[float]] = {name: [] for name in compiled}
        figures: dict[str, dict[str, Any]] = {}
        for name, call in compiled.items():
            found = torch.from_numpy(call(arrays)[0])
            meant = expected[name.split(",")[0]]
            figures[name] = {"difference": float((found - meant).abs().max()), "largest": float(meant.abs().max())}
        for turn in range(options.turns):
            for name in sorted(compiled, reverse=turn % 2 == 1):
                start = time.perf_counter()
                compiled[name](arrays)
                times[name].append(1e3 * (time.perf_counter() - start))
    rows = Record(options.results)
    for name in compiled:
        row = {"model": Path(options.source).name, "contender": name, "batch": options.batch, "length": options.length}
        said = {"ms": statistics.median(times[name]), "ms_min": min(times[name]), "openvino": openvino.__version__}
        print(rows.add({**row, "threads": options.threads}, {**figures[name], **said}), flush=True)


if __name__ == "__main__":
    main()
