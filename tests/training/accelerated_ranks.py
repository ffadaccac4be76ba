"""What each of 2 gloo processes does with accelerated layers, as a part of `ranks.py`."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bisparse import accelerate_, finalize_, prune_, sparsify_
from bisparse.training import plain_state_dict


def build() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None = None) -> None:
    """Five steps on this rank's half of the batches; on all of them without a rank."""
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        inputs, labels = torch.randn(16, 16, generator=generator), torch.randint(0, 8, (16,), generator=generator)
        share = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
        loss = nn.functional.cross_entropy(model(inputs[share]), labels[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accelerated(rank: int) -> dict[str, object]:
    """Weights and masks of a run under DDP and under FSDP2, and what is said of a model that was sharded before."""
    results: dict[str, object] = {}
    for kind in ("ddp", "fsdp"):
        model = build()
        sparsity = sparsify_(model, "2:4-T", refresh=2)
        assert len(accelerate_(model, "reference")) == 3
        wrapped: nn.Module = model
        if kind == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in (model[0], model[2], model[4]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
        sparsity.attach(optimizer)
        train(wrapped, optimizer, rank)
        results[f"{kind} masks"] = [layer.mask.clone() for layer in sparsity.layers]
        state = plain_state_dict(model) if kind == "fsdp" else finalize_(model).state_dict()
        results[kind] = {name: value.detach().clone() for name, value in state.items()}
    results["fixed"] = fixed()
    late = build()
    sparsify_(late, "2:4-T")
    fully_shard(late, mesh=init_device_mesh("cpu", (2,)))
    try:
        accelerate_(late)
    except ValueError as error:
        results["late"] = str(error)
    plain = build()
    fully_shard(plain, mesh=init_device_mesh("cpu", (2,)))
    results["late and plain"] = accelerate_(plain)["0"].reason
    return results


def fixed() -> dict[str, object]:
    """A sharded layer that trains on the zeros it has: the state it gives, once loaded, and what finalize_ says of it."""
    model = build()
    prune_(model, "2:4-T")
    accelerate_(model.train(), "reference")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    try:
        finalize_(model)
        said = ""
    except ValueError as error:
        said = str(error)
    return {"state": plain_state_dict(model), "said": said}
