"""What each of two ranks does for test_ranks.py: `pruning_ranks.py RANK FOLDER` writes rankN.pt there."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bisparse.pruning import ALPS, AdaPrune, CalibrationError, GradientAdaPrune, Magnitude, Method, OtherRankError, prune_
from bisparse.solvers import Greedy


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)) * self.gate(x))


class Experts(nn.Module):
    """Tokens go to one of 3 experts by their first number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = (x[:, 0] > 0).long() + (x[:, 0] > 1).long(), torch.zeros_like(x)
        for expert in range(3):
            out[chosen == expert] = x[chosen == expert] @ self.up_proj[expert].t()
        return x + out


JOBS: dict[str, tuple[Method, str]] = {
    "magnitude": (Magnitude(), "parallel"),
    "adaprune": (AdaPrune(), "sequential"),
    "adaprune, dense inputs": (AdaPrune(), "parallel"),
    "alps": (ALPS(iterations=8), "sequential"),
    "budget": (AdaPrune(), "sequential"),
    "budget, no data": (Magnitude(), "parallel"),
    "experts": (AdaPrune(), "sequential"),
    "raw inputs": (GradientAdaPrune(steps=5), "parallel"),
}


def build() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *(Block(16) for _ in range(3)), nn.Linear(16, 8))
    return model, [torch.randn(12, 8) for _ in range(7)]


def pruned(name: str, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    model, batches = build()
    method, order = JOBS[name]
    if name == "experts":
        model = nn.Sequential(nn.Linear(8, 16), Experts(16), Experts(16))
        prune_(model, "4:8-T", method, batches, order=order, group=group, layouts={"*.up_proj": "experts"})
    elif "budget" in name:
        data = None if "no data" in name else batches
        choices = ["2:8-T", "4:8-T", "6:8", "dense"]
        prune_(model, None, method, data, budget="60%", patterns=choices, order=order, group=group, include="*")
    else:
        prune_(model, "4:8-T", method, batches, order=order, group=group, include="*")
    return model.state_dict()


DIFFERENCES = {
    "pattern": "the pruning of 1.a is 4:8-T",
    "pattern of one layer": "the pruning of 2.b is 4:8-T",
    "method": "the pruning of 1.a is 4:8-T by AdaPrune",
    "solver": "solver=",
    "order": "order=",
    "data": "the digest of the data",
    "layers": "the pruning of 2.b is 4:8-T by AdaPrune",
    "weight": "the digest of 3.gate.weight",
    "bias": "the digest of 1.b.bias",
    "layer that is not pruned": "the digest of 4.weight",
    "no data": "AdaPrune needs the|adaprune needs the",
    "bad pattern": "rank 1 failed|5:4",
}
"""What rank 1 has otherwise than rank 0, and what the error names."""


def differing(name: str, rank: int) -> tuple[str, bool]:
    """The error, and whether the model is unchanged."""
    model, batches = build()
    pattern, how = "4:8-T", {"order": "sequential", "solver": None, "patterns": None, "exclude": ["0", "4"]}
    method: Method = Magnitude() if name in ("weight", "pattern") else AdaPrune()
    if rank == 1:
        if name == "pattern":
            pattern = "2:4-T"
        elif name == "pattern of one layer":
            how["patterns"] = {"2.b": "2:4"}
        elif name == "method":
            method = AdaPrune(damping=0.5)
        elif name == "solver":
            how["solver"] = Greedy()
        elif name == "order":
            how["order"] = "parallel"
        elif name == "data":
            batches[3] = batches[3] + 1e-6
        elif name == "layers":
            how["exclude"] = ["0", "4", "2.b"]
        elif name == "bad pattern":
            pattern = "5:4"
        elif name != "no data":
            with torch.no_grad():
                tensor = {"weight": model[3].gate.weight[:, 5], "bias": model[1].b.bias}.get(name, model[4].weight)
                tensor[3:4] += 1e-6
    before = copy.deepcopy(model.state_dict())
    data = None if method == Magnitude() or (name == "no data" and rank == 1) else batches
    try:
        prune_(model, pattern, method, data, group=dist.group.WORLD, **how)
        error = "none"
    except (ValueError, OtherRankError) as found:
        error = str(found)
    return error, all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Failing(AdaPrune):
    """Fails at a layer that rank 1 gets."""

    def prune(self, problem):
        if problem.name == "2.gate":
            raise CalibrationError("2.gate: on purpose")
        return super().prune(problem)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[str, object] = {name: pruned(name, dist.group.WORLD) for name in JOBS}
    model, batches = build()
    before = copy.deepcopy(model.state_dict())
    try:
        prune_(model, "4:8-T", Failing(), batches, group=dist.group.WORLD, include="*")
    except (CalibrationError, OtherRankError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["unchanged"] = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found["differing"] = {name: differing(name, rank) for name in DIFFERENCES}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
