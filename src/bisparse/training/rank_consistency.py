"""Consistency of ranks in a distributed run: which train together, whether masks and weights agree, and joint errors."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from bisparse.process_group import OtherRankError, Ranks
from bisparse.training.layer import SparseLayer

__all__ = ["check_ranks_agree", "is_sharded", "raise_together", "ranks_of"]


def ranks_of(layers: Iterable[SparseLayer], group: ProcessGroup | None = None) -> Ranks:
    """The ranks that have these layers: those of `group`, otherwise of the weights' device mesh, otherwise all.

    Raises:
        ValueError: the weights are sharded over meshes of different ranks, or `group` is no process group.
    """
    if group is not None:
        return Ranks(group)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Ranks()
    meshes = {
        tuple(sorted(weight.device_mesh.mesh.flatten().tolist())): weight.device_mesh
        for layer in layers
        if isinstance(weight := layer.weight, DTensor)
    }
    if len(meshes) > 1:
        raise ValueError(
            f"the sparse layers are sharded over different ranks, {' and '.join(map(str, meshes))}: call sparsify_ on each part "
            "of the model that shares a mesh, and attach() each separately"
        )
    for own, mesh in meshes.items():
        if len(own) < torch.distributed.get_world_size():
            # A mesh of several dimensions has one group per dimension, but none for all of its ranks.
            return Ranks(mesh.get_group() if mesh.ndim == 1 else torch.distributed.new_group(own, use_local_synchronization=True))
    return Ranks(torch.distributed.group.WORLD)


def is_sharded(layer: SparseLayer) -> bool:
    """Whether the layer's weight is sharded over ranks (FSDP2)."""
    return isinstance(layer.weight, DTensor)


def raise_together(ranks: Ranks, error: Exception | None, doing: str) -> None:
    """Raise on every rank if any of them failed (a collective call); `error` is this rank's own failure.

    Raises:
        OtherRankError: on the ranks that did not fail, naming one that did; ranks that failed raise their own error.
    """
    failures = ranks.all(None if error is None else f"{type(error).__name__}: {error}")
    failed = {ranks.name(rank): message for rank, message in enumerate(failures) if message is not None}
    if error is not None:
        if ranks.size > 1:
            error.add_note(f"while rank {ranks.name(ranks.rank)} was {doing}")
        raise error
    for rank, message in failed.items():
        raise OtherRankError(f"rank {rank} failed while {doing}: {message}")


def check_ranks_agree(layers: Sequence[SparseLayer], ranks: Ranks, settings: Mapping[str, object]) -> None:
    """Check that layers, settings, patterns, masks and replicated weights agree over the ranks (a collective call).

    Masks that differ although the weights are equal, since DistributedDataParallel copied the first rank's weights, are
    replaced by the first rank's.

    Args:
        settings: by the name of the argument, what was given to `sparsify_`; compared as text.

    Raises:
        ValueError: on every rank, naming the first layer or setting that differs and a rank that differs from the first.
    """
    if ranks.size == 1:
        return
    everyone = ranks.all(
        [
            (
                layer.name,
                str(layer.pattern),
                tuple(layer.mask.shape),
                _checksum(layer.mask),
                None if is_sharded(layer) else _checksum(layer.weight.detach()),
            )
            for layer in layers
        ]
    )
    first, first_rank = everyone[0], ranks.name(0)
    settings_of_all = ranks.all({name: _text(value) for name, value in settings.items()})
    for number, theirs in enumerate(everyone):
        rank = ranks.name(number)
        names, first_names = [entry[0] for entry in theirs], [entry[0] for entry in first]
        if names != first_names:
            different = sorted(set(names) ^ set(first_names))
            raise ValueError(
                f"rank {rank} has other sparse layers than rank {first_rank} ({different[:3] or 'in another order'}): call "
                "sparsify_ with the same arguments on every rank. If ranks are meant to have different layers, pass the group of "
                "those that have the same: attach(..., group=)"
            )
        for name, value in settings_of_all[0].items():
            if (given := settings_of_all[number][name]) != value:
                raise ValueError(
                    f"{name} is {given:.200} on rank {rank} and {value:.200} on rank {first_rank}: call sparsify_ with the same "
                    "arguments on every rank, since ranks that refresh at different steps wait for each other"
                )
        for mine, others in zip(first, theirs, strict=True):
            if mine[-1] is not None and mine[:3] == others[:3] and mine[-1] == others[-1]:
                continue
            for what, one, other in zip(("name", "pattern", "shape", "mask", "weight"), mine, others, strict=True):
                if one != other:
                    shown = f" ({other} against {one})" if what in ("pattern", "shape") else ""
                    raise ValueError(
                        f"{mine[0]}: the {what} on rank {rank} differs from rank {first_rank}{shown}. Start all ranks from the "
                        "same seed or checkpoint, or wrap the model in DistributedDataParallel (which copies one rank's) before "
                        "attach(); if DistributedDataParallel has a process_group, pass it: attach(..., group=)"
                    )
    unequal = {mine[0] for theirs in everyone for mine, others in zip(first, theirs, strict=True) if mine[3] != others[3]}
    for layer in layers:
        if layer.name in unequal:
            mask = layer.mask.to(torch.uint8).contiguous()
            ranks.broadcast_(mask, 0)
            layer.mask.copy_(mask)
            layer.mask_changed()


def _text(value: object) -> str:
    """A setting as text; the default text of an object contains its address, so that only the name of its class counts."""
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
