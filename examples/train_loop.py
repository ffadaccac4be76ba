"""Train a small network from scratch with 4:8 transposable masks in a plain loop: two new lines, and one at the end."""

import torch
from torch import nn

import bisparse


def spirals(points: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two spirals, and which of them each point lies on."""
    label = torch.randint(0, 2, (points,), generator=generator)
    angle = 9 * torch.rand(points, generator=generator)
    turn = angle + torch.pi * label
    place = torch.stack([angle * torch.cos(turn), angle * torch.sin(turn)], dim=1) / 9
    return place + 0.01 * torch.randn(points, 2, generator=generator), label


def main(steps: int = 600) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsity = bisparse.sparsify_(model, "4:8-T", include=["2", "4"])  # new
    sparsity.attach(optimizer)  # new
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        inputs, labels = spirals(256, generator)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            flips = sparsity.metrics().get("sparsity/flip_rate", float("nan"))
            print(f"step {step + 1}: loss {loss:.3f}, flip rate {flips:.4f}")
    bisparse.finalize_(model)  # a plain model, whose weights hold their zeros
    inputs, labels = spirals(2000, generator)
    accuracy = float((model(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}; {bisparse.verify(model[2].weight, '4:8-T', name='layer 2').message}")
    return accuracy


if __name__ == "__main__":
    main()
