"""What each of 3 gloo processes does in `test_groups.py`: ranks 1 and 2 train together, rank 0 something else.

A rank that waited for one that failed would be ended by the short timeout of its collective, which fails the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import batch, build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bisparse.training.mask_search as search
from bisparse import Sparsity, sparsify_
from bisparse.training.layer import local

Trained = tuple[nn.Module, torch.optim.Optimizer, Sparsity]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    inputs, labels = batch(number)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def ddp(rank: int, group: dist.ProcessGroup, **how: object) -> Trained:
    model = build(seed=rank)
    sparsity = sparsify_(model, "4:8-T", refresh=1, **how)  # type: ignore[arg-type]
    wrapped = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return wrapped, optimizer, sparsity.attach(optimizer, group=group)


def fsdp(mesh: DeviceMesh, pattern: str = "4:8-T") -> Trained:
    model = build()
    sparsity = sparsify_(model, pattern, refresh=1)
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return model, optimizer, sparsity.attach(optimizer)


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - what was raised is the result
        return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return "none"


def masks(sparsity: Sparsity) -> dict[str, torch.Tensor]:
    return {layer.name: layer.mask.clone() for layer in sparsity.layers}


def without_group(rank: int) -> str:
    """All three ranks are compared where nothing says that they hold different models."""
    sparsity = sparsify_(build(seed=rank), "4:8-T")
    return error_of(lambda: sparsity.attach(torch.optim.SGD([layer.weight for layer in sparsity.layers], lr=0.1)))


def groups(rank: int, group: dist.ProcessGroup, mesh: DeviceMesh, hybrid: DeviceMesh) -> dict[str, object]:
    result: dict[str, object] = {}
    solved: list[int] = []
    original = search.solve

    def counting(scores: torch.Tensor, *rest: object, **how: object) -> object:
        solved.append(scores.numel())
        return original(scores, *rest, **how)  # type: ignore[call-overload]

    search.solve = counting  # type: ignore[assignment]
    for name, (model, optimizer, sparsity) in {"ddp": ddp(rank, group), "fsdp": fsdp(mesh), "hsdp": fsdp(hybrid)}.items():
        assert sparsity.search.ranks is not None and sparsity.search.ranks.size == 2
        solved.clear()
        for number in range(3):  # the forward passes after the first two steps refresh
            step(model, optimizer, number)
        result[name] = {"masks": masks(sparsity), "solved": sum(solved)}
    search.solve = original  # type: ignore[assignment]
    return result


def failures(rank: int, group: dist.ProcessGroup, mesh: DeviceMesh) -> dict[str, str]:
    """What each rank raises where rank 2 alone has the cause; each case ends with an exchange that all must reach."""
    found: dict[str, str] = {}

    for pattern in ("4:8-T", "2:4", "50%"):
        model, optimizer, sparsity = fsdp(mesh, pattern)
        if rank == 2:
            local(sparsity.layers[1].weight.detach())[0, 0] = float("nan")
        found[f"fsdp weight {pattern}"] = error_of(sparsity.refresh)

    model, optimizer, sparsity = fsdp(mesh)
    inputs, labels = batch(0)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    if rank == 2:
        local(sparsity.layers[2].weight.grad)[0, 0] = float("inf")
    before = [layer.full_weight().clone() for layer in sparsity.layers]
    found["fsdp gradient"] = error_of(optimizer.step)
    assert all(torch.equal(one, layer.full_weight()) for one, layer in zip(before, sparsity.layers, strict=True))

    # DDP: the same weights everywhere, but rank 2 runs out of memory in its share.
    model, optimizer, sparsity = ddp(rank, group)
    original = search.solve

    def failing(*arguments: object, **how: object) -> object:
        raise MemoryError("no memory for the tiles")

    if rank == 2:
        search.solve = failing  # type: ignore[assignment]
    step(model, optimizer)
    found["ddp solver"] = error_of(lambda: step(model, optimizer))
    search.solve = original  # type: ignore[assignment]

    def score(name: str, weight: torch.Tensor) -> torch.Tensor:
        if rank == 2 and scores_fail and name == "2":
            raise KeyError(name)
        return weight.abs()

    scores_fail = False
    model, optimizer, sparsity = ddp(rank, group, score=score)
    scores_fail = True
    step(model, optimizer)
    found["ddp score"] = error_of(lambda: step(model, optimizer))

    model, optimizer, sparsity = ddp(rank, group)
    sparsity.layers[0].weight.detach()[-1] = float("nan")
    found["ddp weight"] = error_of(sparsity.refresh)

    sparsity.detach()
    weights = [layer.weight for layer in sparsity.layers]
    alone = torch.optim.SGD(weights[1:] if rank == 2 else weights, lr=0.1)
    found["optimizer"] = error_of(lambda: sparsity.attach(alone, group=group))
    dist.barrier(group=group)
    return found


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=60)
    store = dist.FileStore(str(folder / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timeout)
    results: dict[str, object] = {"without": without_group(rank)}
    group = dist.new_group([1, 2], timeout=timeout)
    hybrid = DeviceMesh("cpu", [[1], [2]], mesh_dim_names=("replicate", "shard"))  # all ranks make its groups
    if rank:
        mesh = DeviceMesh.from_group(group, "cpu")
        results["groups"] = groups(rank, group, mesh, hybrid)
        results["failures"] = failures(rank, group, mesh)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
