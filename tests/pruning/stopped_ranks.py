"""What each of two ranks does for test_stopped_rank.py: the second stops itself in the middle of a job."""

from __future__ import annotations

import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bisparse
from bisparse import process_group
from bisparse.pruning import OtherRankError

TIMEOUT_S = 3


def main(rank: int, folder: Path, job: str) -> None:
    process_group.FIRST_NOTICE_S = 1.0
    logging.basicConfig(filename=folder / f"log{rank}.txt")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    data = [torch.randn(8, 16) for _ in range(4)]
    bisparse.solve(torch.rand(16, 16), "2:4-T")  # compiles
    file = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    passes = 0

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += 1
        if rank == 1 and passes == 3:
            (folder / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

    said = "nothing"
    try:
        if job == "prune_":
            model[1].register_forward_pre_hook(stop)
            bisparse.prune_(model, "2:4-T", "adaprune", data, group=dist.group.WORLD)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            bisparse.sparsify_(model, "2:4-T", refresh=1).attach(optimizer)
            before = {}
            model[1].register_forward_pre_hook(stop)
            for batch in data:
                optimizer.zero_grad()
                model(batch).square().sum().backward()
                optimizer.step()
    except OtherRankError as error:
        said = str(error)
    unchanged = all(torch.equal(before[name], one) for name, one in model.state_dict().items() if name in before)
    torch.save({"said": said, "unchanged": unchanged}, folder / f"rank{rank}.pt")
    os._exit(0)  # no destruction of a group whose other rank does not answer


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
