"""The "10 % law": accuracy that AdaPrune recovers, against the pattern violation of the mask it starts from.

    python benchmarks/pruning/law.py --cache FOLDER [--data FOLDER]

Networks pruned to 100, 90, ..., 10 % density and trained one epoch with that mask are converted to 2:4 and 4:8; the sparser
they are, the less of them the pattern violates. Rows: benchmarks/results/pruning_law.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiment import Rows
from network import accuracy, arguments, calibration, opened, trained
from resnet import converted

from bisparse.pruning import reestimate_batch_norms_
from record import results_file

DENSITIES = (100, 90, 80, 70, 60, 50, 45, 40, 35, 30, 20, 10)
COMPARED = ("magnitude", "adaprune (a), Adam", "adaprune (b), same mask and inputs", "adaprune (b), default", "alps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(COMPARED))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8"])
    parser.add_argument("--densities", nargs="+", type=int, default=list(DENSITIES))
    parser.add_argument("--results", type=Path, help="default benchmarks/results/pruning_law.jsonl; with --quick out/quick/")
    options = parser.parse_args()
    data, how, budget = opened(options)
    rows = Rows(results_file(options.results, "pruning_law.jsonl", quick=options.quick))
    for density in options.densities[:: 5 if options.quick else 1]:
        origin = None if density == 100 else f"{density}%"
        with rows.new({**budget, "origin_density": density, "to": None}) as row:
            if row is not None:
                row["accuracy"] = accuracy(trained(how, data, origin), data, how.dtype)
        for to in options.patterns:
            for name in options.methods:
                for seed in range(1 if options.quick else options.seeds):
                    key = {**budget, "origin_density": density, "to": to, "method": name, "seed": seed}
                    with rows.new(key) as row:
                        if row is None:
                            continue
                        batches = calibration(data, seed)
                        model, figures = converted(trained(how, data, origin), to, name, batches, data.test_inputs)
                        row |= figures
                        row["accuracy_norms_as_they_were"] = accuracy(model, data, how.dtype)
                        reestimate_batch_norms_(model, batches)
                        row["accuracy"] = accuracy(model, data, how.dtype)


if __name__ == "__main__":
    main()
