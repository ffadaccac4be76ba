"""Run a transformer's MLPs on sparse tensor cores, in training and after it; without a GPU, by the reference."""

import sys

import torch
from torch import nn

import bisparse


class Block(nn.Module):
    """The MLP of a transformer, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.down(nn.functional.gelu(self.up(self.norm(inputs))))


def main(steps: int = 20, width: int = 128) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "auto" if device == "cuda" else "reference"
    torch.manual_seed(0)
    model = nn.Sequential(Block(width), Block(width)).to(device)

    sparsity = bisparse.sparsify_(model, "2:4-T", refresh=10)
    report = bisparse.accelerate_(model, backend)  # the only line that sparse training does not have
    print(f"training: {report}")
    for layer in report.left_dense:
        print(f"  {layer.name}: {layer.reason}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsity.attach(optimizer)
    for step in range(steps):
        inputs = torch.randn(256, width, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = nn.functional.mse_loss(model(inputs).float(), inputs.roll(1, -1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.detach():.3f}")

    bisparse.finalize_(model)  # plain Linears, whose weights hold their zeros
    print(bisparse.verify(model, "2:4-T").message)

    model.to(torch.bfloat16).eval()
    inputs = torch.randn(64, width, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(inputs)
        print(f"inference: {bisparse.accelerate_(model, backend)}")
        error = float((model(inputs) - expected).float().norm() / expected.float().norm())
    print(f"relative difference from masked dense: {error:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
