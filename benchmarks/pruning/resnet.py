"""The paper's comparison on ResNet-20 and Fashion-MNIST: what each repair brings back after a change of mask, without training.

    python benchmarks/pruning/resnet.py --cache FOLDER [--data FOLDER]

Rows: benchmarks/results/pruning_resnet.jsonl. 400 calibration images, 3 seeds of them. Layer errors are of images that no method
has seen. CPU seconds are those of the process, so that a busy machine does not change them; one torch thread.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from experiment import Rows, measured
from network import accuracy, arguments, calibration, held_out_errors, opened, trained
from torch import Tensor, nn

from bisparse import verify
from bisparse.pruning import (
    ALPS,
    AdaPrune,
    BiasCorrection,
    GradientAdaPrune,
    Magnitude,
    MatchMoments,
    MeanAbsorption,
    Method,
    convert_,
    reestimate_batch_norms_,
)
from record import results_file

ROUTES = (
    (None, "2:4"), (None, "4:8"), (None, "2:4-T"), (None, "4:8-T"), (None, "16:32-T"), ("4:8", "2:4"), ("50%", "4:8"),
)  # fmt: skip
METHODS: dict[str, tuple[Method, str]] = {
    "magnitude": (Magnitude(), "parallel"),
    "+ mean absorption, everywhere": (MeanAbsorption(always=True), "parallel"),
    "+ mean absorption, where it helps": (MeanAbsorption(), "parallel"),
    "+ bias correction": (BiasCorrection(), "parallel"),
    "+ means and deviations matched": (MatchMoments(what="outputs"), "parallel"),
    "adaprune (a), Adam": (GradientAdaPrune(), "parallel"),
    "adaprune (b), same mask and inputs": (AdaPrune(Magnitude(), correct_upstream=False), "parallel"),
    "adaprune (b), default": (AdaPrune(), "sequential"),
    "alps": (ALPS(), "sequential"),
}
HELD_OUT = 400
"""Test images that layer errors are measured on."""


def converted(dense: nn.Module, to: str, name: str, batches: list[Tensor], images: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """A converted copy of a network, verified, and the figures of its row."""
    method, order = METHODS[name]
    model = copy.deepcopy(dense)
    started, busy = time.perf_counter(), time.process_time()
    report = convert_(model, to, method, batches, order=order, progress=True)
    figures = measured(report, time.perf_counter() - started)
    figures["cpu_seconds"] = round(time.process_time() - busy, 2)
    for layer in report:
        verify(model.get_parameter(layer.parameter), to).check()
    figures["violated_weights"] = sum(x.violated_weights * x.size for x in report) / report.weights
    figures["violated_groups"] = sum(x.violated_groups * x.size for x in report) / report.weights
    errors = held_out_errors(dense, model, [layer.name for layer in report], images[:HELD_OUT])
    figures |= {"held_out_error": round(errors[0], 5), "held_out_error_own_inputs": round(errors[1], 5)}
    return model, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=list(dict.fromkeys(to for _, to in ROUTES)))
    parser.add_argument("--results", type=Path, help="default benchmarks/results/pruning_resnet.jsonl; with --quick out/quick/")
    options = parser.parse_args()
    data, how, budget = opened(options)
    rows = Rows(results_file(options.results, "pruning_resnet.jsonl", quick=options.quick))
    for origin in dict.fromkeys(origin for origin, to in ROUTES if to in options.patterns):
        with rows.new({**budget, "origin": origin or "dense", "to": None}) as row:
            if row is not None:
                row["accuracy"] = accuracy(trained(how, data, origin), data, how.dtype)
    for seed in range(1 if options.quick else options.seeds):
        batches = calibration(data, seed)
        for origin, to in ROUTES:
            for name in options.methods:
                if to not in options.patterns:
                    continue
                # The seed is that of the images for the batch norms too, for methods that need no others.
                key = {**budget, "origin": origin or "dense", "to": to, "method": name, "seed": seed}
                if rows.find({**key, "batch_norms": "re-estimated"}):
                    continue
                model, figures = converted(trained(how, data, origin), to, name, batches, data.test_inputs)
                with rows.new({**key, "batch_norms": "as they were"}) as row:
                    if row is not None:
                        row |= {"accuracy": accuracy(model, data, how.dtype), **figures}
                reestimate_batch_norms_(model, batches)
                with rows.new({**key, "batch_norms": "re-estimated"}) as row:
                    if row is not None:
                        row |= {"accuracy": accuracy(model, data, how.dtype), **figures}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
