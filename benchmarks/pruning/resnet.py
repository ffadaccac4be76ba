"""The paper's comparison on ResNet-20 and Fashion-MNIST: what each repair brings back after a change of mask, without training.

    python benchmarks/pruning/resnet.py --cache FOLDER [--data FOLDER]

Rows: benchmarks/results/pruning_resnet.jsonl. 400 calibration images, 3 seeds of them.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from experiment import Rows, measured
from network import accuracy, arguments, calibration, opened, trained

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
from record import RESULTS

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=list(dict.fromkeys(to for _, to in ROUTES)))
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning_resnet.jsonl")
    options = parser.parse_args()
    data, how, budget = opened(options)
    rows = Rows(options.results)
    for origin in dict.fromkeys(origin for origin, to in ROUTES if to in options.patterns):
        with rows.new({**budget, "origin": origin or "dense", "to": None}) as row:
            if row is not None:
                row["accuracy"] = accuracy(trained(how, data, origin), data)
    for seed in range(1 if options.quick else options.seeds):
        batches = calibration(data, seed)
        for origin, to in ROUTES:
            for name in options.methods:
                if to not in options.patterns:
                    continue
                method, order = METHODS[name]
                key = {**budget, "origin": origin or "dense", "to": to, "method": name, "seed": seed if method.needs else None}
                if rows.find({**key, "batch_norms": "re-estimated"}):
                    continue
                model = copy.deepcopy(trained(how, data, origin))
                started = time.perf_counter()
                report = convert_(model, to, batches, method=method, order=order, progress=True)
                figures = measured(report, time.perf_counter() - started)
                figures["violated_weights"] = sum(x.violated_weights * x.size for x in report) / report.weights
                for layer in report:
                    verify(model.get_parameter(layer.parameter), to).check()
                with rows.new({**key, "batch_norms": "as they were"}) as row:
                    if row is not None:
                        row |= {"accuracy": accuracy(model, data), **figures}
                reestimate_batch_norms_(model, batches)
                with rows.new({**key, "batch_norms": "re-estimated"}) as row:
                    if row is not None:
                        row |= {"accuracy": accuracy(model, data), **figures}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
