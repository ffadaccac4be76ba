"""A sample of pruned weights, which shows whether something other than an attached optimizer has written to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bisparse.training.layer import SparseLayer, local
from bisparse.training.parametrizations import sample_step

__all__ = ["PrunedSample"]


class PrunedSample:
    """Positions of some pruned weights per layer."""

    def __init__(self) -> None:
        self._positions: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the positions, because the masks have changed."""
        self._positions.clear()

    def any_nonzero(self, layers: Iterable[SparseLayer]) -> bool:
        """Whether a sampled weight of any layer is not zero; layers on the meta device are left out."""
        values = []
        for layer in layers:
            weight = local(layer.weight.detach())
            if weight.is_meta:
                continue
            if layer.name not in self._positions:
                pruned = (~layer.local_mask).flatten().nonzero().flatten()
                self._positions[layer.name] = pruned[:: sample_step(pruned.numel())]
            values.append(weight.take(self._positions[layer.name].to(weight.device)))
        return bool(values) and bool(torch.cat([one.to(values[0].device) for one in values]).any())
