"""What each of 2 gloo processes does in the distributed tests; `test_distributed.py` starts them and judges the results."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerated_ranks import accelerated
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bisparse
import bisparse.training.mask_search as search
from bisparse import finalize_, sparsify_
from bisparse.process_group import OtherRankError
from bisparse.training import FixedDecay, plain_state_dict

STEPS = 5


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # 20 rows in two shards of 10: an 8-tile straddles them. 36 rows, 40 columns: padded.
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 8))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, rank: int = 0, world: int = 1) -> list[float]:
    losses = []
    for number in numbers:
        inputs, labels = batch(number)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = nn.functional.cross_entropy(model(inputs[share]), labels[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def full(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone() for name, value in state.items()
    }


def ddp(rank: int, mode: str, pattern: str) -> dict[str, object]:
    model = build(seed=rank)  # ranks start differently; DDP copies rank 0's weights and masks
    sparsity = sparsify_(model, pattern, mode=mode, refresh=2)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    sparsity.attach(optimizer)
    solved: list[int] = []
    original = search.solve
    search.solve = lambda scores, *rest, **how: solved.append(scores.numel()) or original(scores, *rest, **how)  # type: ignore[assignment]
    train(wrapped, optimizer, range(STEPS), rank, 2)
    search.solve = original  # type: ignore[assignment]
    masks = {layer.name: layer.mask.clone() for layer in sparsity.layers}
    finalize_(model)
    return {
        "state": full(model.state_dict()),
        "masks": masks,
        "solved": sum(solved),
        "step": sparsity.step,
        "history": sparsity.state_dict()["history"],
    }


def fsdp(rank: int, mode: str, pattern: str) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2,))
    model = build()
    sparsity = sparsify_(model, pattern, mode=mode, refresh=2)
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparsity.attach(optimizer)
    train(model, optimizer, range(STEPS), rank, 2)
    result: dict[str, object] = {
        "plain": plain_state_dict(model),
        "masks": {one.name: one.mask.clone() for one in sparsity.layers},
        "history": sparsity.state_dict()["history"],
    }
    if mode == "dynamic":
        try:
            finalize_(model)
        except ValueError as error:
            result["finalize"] = str(error)
    return result


def fsdp_resume(rank: int, folder: Path) -> dict[str, object]:
    """Train 4 steps; save sharded after 2; a fresh model loads that and does the last 2."""

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, bisparse.Sparsity]:
        model = build(seed)
        sparsity = sparsify_(model, "4:8-T", refresh=1)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        return model, optimizer, sparsity.attach(optimizer)

    model, optimizer, sparsity = start(0)
    train(model, optimizer, range(2), rank, 2)
    dcp.save({"model": model.state_dict(), "sparsity": sparsity}, checkpoint_id=folder)
    train(model, optimizer, range(2, 4), rank, 2)
    fresh, other, resumed = start(7)
    state = {"model": fresh.state_dict(), "sparsity": resumed}
    dcp.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state["model"])
    step = resumed.step
    train(fresh, other, range(2, 4), rank, 2)
    prices = {name: entry["u"].clone() for name, entry in resumed.state_dict()["layers"].items()}
    expected = {name: entry["u"].clone() for name, entry in sparsity.state_dict()["layers"].items()}
    histories = resumed.state_dict()["history"], sparsity.state_dict()["history"]
    states = {"whole": full(model.state_dict()), "resumed": full(fresh.state_dict())}
    return states | {"step": step, "prices": (prices, expected), "histories": histories}


def sharded_first(rank: int) -> dict[str, object]:
    """A static mask for a model that is sharded already; a dynamic one is refused."""
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    result: dict[str, object] = {}
    try:
        sparsify_(model, "4:8-T")
    except ValueError as error:
        result["refused"] = str(error)
    sparsity = sparsify_(model, "4:8-T", mode="static")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    sparsity.attach(optimizer)
    train(model, optimizer, range(3), rank, 2)
    finalize_(model)
    return result | {"state": full(model.state_dict())}


def disagreement(rank: int) -> dict[str, object]:
    messages = {}
    settings: dict[str, object]
    for what, pattern, settings, seed in (
        ("mask", "4:8-T", {}, rank),
        ("pattern", "2:4" if rank else "4:8-T", {}, 0),
        ("layers", "4:8-T", {"include": "0" if rank else "*"}, 0),
        ("refresh", "4:8-T", {"refresh": 7 if rank else 5}, 0),
        ("steps", "4:8-T", {"steps": 11 if rank else 10}, 0),
        ("decay", "4:8-T", {"decay": {"0": FixedDecay(0.1)} if rank else None}, 0),
        ("run length", "4:8-T", {"decay": 3.0 if rank else None}, 0),
    ):
        model = build(seed)
        sparsity = sparsify_(model, pattern, **{"include": "*"} | settings)  # type: ignore[arg-type]
        try:
            sparsity.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        except (ValueError, OtherRankError) as error:
            messages[what] = str(error)
    return messages


def large_prune(rank: int) -> dict[str, object]:
    """One-shot pruning of a sharded model, its mask search shared over the ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sparsify_(model, "8:16-T", mode="static")
    finalize_(model)
    return {"dense": dense, "state": full(model.state_dict())}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    results = {}
    for mode, pattern in (("dynamic", "4:8-T"), ("static", "4:8-T"), ("dynamic", "2:4")):
        results[f"ddp {mode} {pattern}"] = ddp(rank, mode, pattern)
        results[f"fsdp {mode} {pattern}"] = fsdp(rank, mode, pattern)
    results["fsdp resume"] = fsdp_resume(rank, folder / "checkpoint")
    results["sharded first"] = sharded_first(rank)
    results["disagreement"] = disagreement(rank)
    results["large prune"] = large_prune(rank)
    results["accelerated"] = accelerated(rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
