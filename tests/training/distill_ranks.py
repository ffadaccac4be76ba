"""What each of 2 gloo processes does with a teacher; `test_distill_ranks.py` starts them and judges the results."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bisparse import sparsify_
from bisparse.training import Distillation, FixedDecay, plain_state_dict


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def trained(kind: str, mode: str, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """The plain weights after 5 steps; on one rank with whole batches, or on two with halves."""
    model = build()
    teacher = Distillation(model, hidden=1.0, layers=["0", "2"], hidden_loss="cosine")
    sparsity = sparsify_(model, "4:8-T", mode=mode, refresh=2, decay=FixedDecay(0.1))
    outer: nn.Module = model
    if kind == "ddp":
        outer = DistributedDataParallel(model)
    elif kind.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if kind == "fsdp, both":
            fully_shard(teacher.teacher, mesh=mesh)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.2, momentum=0.9)
    sparsity.attach(optimizer)
    for number in range(5):
        inputs, labels = batch(number)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        teacher.loss(nn.functional.cross_entropy(outer(inputs[share]), labels[share])).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = plain_state_dict(model)
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    results = {}
    for mode in ("dynamic", "static"):
        for kind in ("ddp", "fsdp", "fsdp, both"):
            results[f"{kind} {mode}"] = trained(kind, mode, rank, 2)
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        Distillation(model)
    except ValueError as error:
        results["sharded"] = str(error)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
