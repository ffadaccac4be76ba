"""Ranks of a distributed run: how many, and whether they hold the same masks and weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from bisparse.training.layer import SparseLayer

__all__ = ["check_ranks_agree", "is_sharded", "ranks"]


def ranks() -> int:
    """Number of processes of the default group; 1 without one."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def is_sharded(layer: SparseLayer) -> bool:
    """Whether the layer's weight is spread over ranks (FSDP2)."""
    return isinstance(layer.weight, DTensor)


def check_ranks_agree(layers: Iterable[SparseLayer]) -> None:
    """Compare layers, patterns, masks and replicated weights over all ranks (a collective call).

    Raises:
        ValueError: on every rank alike, naming the first layer that differs and the ranks that differ from rank 0.
    """
    if ranks() == 1:
        return
    own = [
        (
            layer.name,
            str(layer.pattern),
            tuple(layer.mask.shape),
            _checksum(layer.mask),
            None if is_sharded(layer) else _checksum(layer.weight.detach()),
        )
        for layer in layers
    ]
    everyone: list[list[tuple[object, ...]]] = [[] for _ in range(ranks())]
    torch.distributed.all_gather_object(everyone, own)
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        names, first_names = [entry[0] for entry in theirs], [entry[0] for entry in first]
        if names != first_names:
            different = sorted(set(map(str, names)) ^ set(map(str, first_names)))
            raise ValueError(
                f"rank {rank} has other sparse layers than rank 0 ({different[:3] or 'in another order'}): call sparsify_ with "
                "the same arguments on every rank"
            )
        for mine, others in zip(first, theirs, strict=True):
            for what, one, other in zip(("name", "pattern", "shape", "mask", "weight"), mine, others, strict=True):
                if one != other:
                    shown = f" ({other} against {one})" if what in ("pattern", "shape") else ""
                    raise ValueError(
                        f"{mine[0]}: the {what} on rank {rank} differs from rank 0{shown}. Start all ranks from the same seed or "
                        "checkpoint, or wrap the model in DistributedDataParallel (which copies rank 0's) before attach()"
                    )


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
