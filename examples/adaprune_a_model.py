"""Prune a model with calibration data by several methods, and compare how much each one changes the output.

python examples/adaprune_a_model.py [PATTERN]
"""

import copy
import sys

import torch
from torch import nn

import bisparse
from bisparse.pruning import GradientAdaPrune, MeanAbsorption


def data(batches: int, size: int = 64) -> list[torch.Tensor]:
    """Replace this with your calibration data: a few unlabelled batches of model inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) / 8
    return [torch.randn(size, 64, generator=generator) @ mixing for _ in range(batches)]


def main(pattern: str = "4:8-T") -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    *calibration, unseen = data(17)
    with torch.inference_mode():
        goal = model(unseen)

    methods: dict[str, bisparse.pruning.Method] = {
        "magnitude": bisparse.Magnitude(),
        "magnitude + mean absorption": MeanAbsorption(),
        "Wanda": bisparse.Wanda(),
        "SparseGPT": bisparse.SparseGPT(),
        "AdaPrune by gradient, as the paper": GradientAdaPrune(steps=200),
        "AdaPrune by least squares": bisparse.AdaPrune(),
        "ALPS": bisparse.ALPS(),
    }
    print(f"{pattern}: change of the output on unseen inputs, seconds")
    for name, method in methods.items():
        pruned = copy.deepcopy(model)
        # Layer by layer, each on the inputs from the layers pruned before it. All layers change or, on an error, none.
        report = bisparse.prune_(pruned, pattern, method, calibration)
        for layer in report:
            bisparse.verify(pruned.get_parameter(layer.parameter), pattern, layout=layer.layout).check()
        with torch.inference_mode():
            change = (pruned(unseen) - goal).norm() / goal.norm()
        print(f"{name:36} {change:.3f} {report.time_s:6.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
