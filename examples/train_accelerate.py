"""Train with 4:8-T masks under accelerate: it wraps the optimizer, which attach() unwraps; its checkpoints keep the state."""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bisparse


def main(folder: Path, epochs: int = 2) -> bisparse.Sparsity:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    sparsity = bisparse.sparsify_(model, "4:8-T", refresh=10)
    inputs = torch.randn(512, 16)
    data = DataLoader(TensorDataset(inputs, (inputs[:, :8].sum(1) > 0).long()), batch_size=16, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01), data)
    sparsity.attach(optimizer)
    accelerator.register_for_checkpointing(sparsity)
    for _ in range(epochs):
        for batch, labels in data:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(str(folder))
    print(f"{sparsity.step} optimizer steps, loss {loss.item():.3f}, flip rate {sparsity.metrics()['sparsity/flip_rate']:.4f}")
    bisparse.finalize_(accelerator.unwrap_model(model))
    print(bisparse.verify(model, "4:8-T").message)
    return sparsity


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
