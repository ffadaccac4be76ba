"""Convert a pruned model to another pattern, such as for different hardware, without training.

python examples/convert_a_model.py [FROM [TO]]
"""

import copy
import sys

import torch
from torch import nn

import bisparse
from bisparse.pruning import permute_


def main(origin: str = "4:8", to: str = "2:4") -> None:
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) / 8
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    batches = [torch.randn(64, 64) @ mixing for _ in range(10)]
    bisparse.prune_(model, origin, bisparse.AdaPrune(), batches)
    with torch.inference_mode():
        before = model(batches[0])

    for regrow in (False, True):
        converted = copy.deepcopy(model)
        # Pruned weights stay pruned, unless regrow=True and the new pattern has room.
        report = bisparse.convert_(converted, to, batches=batches, regrow=regrow)
        print(f"{origin} -> {to}{', places re-grown' if regrow else ''}")
        for layer in report:
            print(
                f"  {layer.name}: {layer.violated_groups:.1%} of groups overfull, {layer.violated_weights:.1%} of weights drop, "
                f"output error {layer.error_before:.3f} -> {layer.error:.3f}, {layer.time_s:.2f} s"
            )
            bisparse.verify(converted.get_parameter(layer.parameter), to, layout=layer.layout).check()
        with torch.inference_mode():
            print(f"  the model's output moved by {(converted(batches[0]) - before).norm() / before.norm():.3f}")

    # Before pruning, channels can be reordered so that the masks keep more. The model still computes the same function.
    dense = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    print(permute_(dense, to, batches[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
