"""Two ranks save one state dict with torch.distributed.checkpoint: sharded by rows, by columns, unevenly, and replicated."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    state = {
        "rows.weight": (torch.randn(16, 32), Shard(0)),
        "columns.weight": (torch.randn(16, 32).bfloat16(), Shard(1)),
        "uneven.weight": (torch.randn(7, 8), Shard(0)),
        "whole.weight": (torch.randn(8, 16), Replicate()),
        "uneven.bias": (torch.randn(7), Shard(0)),
    }
    plain = {name: one for name, (one, _) in state.items()}
    sharded = {name: distribute_tensor(one, mesh, [how]) for name, (one, how) in state.items()}
    dcp.save({"model": sharded, "step": 3}, checkpoint_id=folder / "dcp")
    torch.save(plain, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
