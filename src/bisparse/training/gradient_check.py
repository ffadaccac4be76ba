"""Checks gradients for non-finite numbers before an optimizer step uses them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed

from bisparse.process_group import Ranks
from bisparse.training.layer import SparseLayer, local
from bisparse.training.rank_consistency import is_sharded

__all__ = ["check_gradients"]


def check_gradients(layers: Iterable[SparseLayer], ranks: Ranks | None, step: int) -> None:
    """Raise ValueError, naming layer and ranks, if a gradient has NaN or infinite numbers.

    With sharded weights all ranks must call it.

    Args:
        step: the number of the optimizer step, for the message.
    """
    layers = list(layers)
    gradients = {layer.name: local(layer.weight.grad) for layer in layers if layer.weight.grad is not None}
    if not gradients:
        return
    sums = [gradient.sum(dtype=torch.float32) for gradient in gradients.values()]
    wrong = (~torch.isfinite(torch.stack([one.to(sums[0].device) for one in sums]))).any().int()
    # A replicated weight has the same gradient on every rank; that of a shard exists on its own rank only.
    ranks = ranks if any(is_sharded(layer) for layer in layers) else None
    if ranks is not None and ranks.size > 1:
        with ranks.exchange():
            torch.distributed.all_reduce(wrong, group=ranks.group)
    if not bool(wrong):
        return
    own = {name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())}
    everyone = [own] if ranks is None else ranks.all(own)
    for name in gradients:
        holders = [rank for rank, found in enumerate(everyone) if name in found]
        if holders:
            where = "" if ranks is None else f" on rank {', '.join(str(ranks.name(rank)) for rank in holders)}"
            raise ValueError(
                f"the gradient of {name} holds NaN or infinite numbers{where} at optimizer step {step}; the step "
                "was not taken. Skip such steps (torch.amp.GradScaler does), lower the learning rate, or clip gradients."
            )
