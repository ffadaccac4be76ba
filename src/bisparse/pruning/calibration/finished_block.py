"""A block whose layers are all pruned, and what fitting it as a whole takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from bisparse.layers import Layer

__all__ = ["BlockFit", "BlockFitter", "FinishedBlock"]


@dataclass(frozen=True)
class FinishedBlock:
    """A block whose layers are all pruned, before the activations go on to the next one. It may still be changed."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    output: Callable[[int], Tensor]
    """What the block, as it is when called, makes of the pruned network's activations, by number of the batch."""
    target: Callable[[int], Tensor]
    """What the dense block makes of the dense network's."""
    keep: Callable[[int], Tensor | None]
    """Which positions of a batch are real tokens; None: all."""
    fit: tuple[int, ...]
    """Batches to fit to."""
    judge: tuple[int, ...]
    """Batches held out."""


@dataclass(frozen=True)
class BlockFit:
    """What a reconstruction did to a block, in relative errors of the block's output on held-out batches."""

    block: str
    error_before: float
    error: float

    @property
    def changed(self) -> bool:
        """Whether the fitted weights were kept."""
        return self.error < self.error_before


class BlockFitter(Protocol):
    """What fits blocks, such as `BlockReconstruction`."""

    def fit_(self, block: FinishedBlock) -> BlockFit:
        """Change the block's kept weights in place, and say by how much its output error fell."""
