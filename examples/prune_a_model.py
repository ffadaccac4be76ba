"""Prune a model in memory, print a report per layer, and save it as a plain model.

python examples/prune_a_model.py [PATTERN]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import bisparse


class Classifier(nn.Module):
    """Replace this with your model: attention, convolution and linear layers are found automatically."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.encoder = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.smooth = nn.Sequential(nn.Conv1d(128, 128, 3, padding=1), nn.GELU(), nn.Conv1d(128, 128, 3, padding=1))
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.encoder(self.embedding(tokens))
        return self.head(self.smooth(states.transpose(1, 2)).mean(2))


def main(pattern: str = "4:8-T") -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    tokens = torch.randint(1000, (32, 20))
    with torch.inference_mode():
        before = model(tokens)

    # N of N:M is what is KEPT. Filters are names, globs, "re:..." or a function of (name, module).
    report = bisparse.prune_(model, pattern)

    for layer in report:
        print(
            f"{layer.name:32} {layer.shape!s:18} {layer.pattern}  density {layer.density:.3f}  kept {layer.retained:.1%} of |w|"
        )
    for skipped in report.left_dense:
        print(f"{skipped.name:32} dense: {skipped.reason}")

    # Checks the GEMM operands W and W^T; .check() raises an error with the first violation, if any.
    for layer in report:
        bisparse.verify(model.get_parameter(layer.parameter), pattern, layout=layer.layout, name=layer.name).check()

    with torch.inference_mode():
        change = (model(tokens) - before).norm() / before.norm()
    print(f"{report}\nrelative change of the output: {change:.2f}")

    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        Classifier().load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True), strict=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
