"""A block whose layers are all pruned: inputs and results of fitting it as a whole."""

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
    """The block's current output on the pruned network's activations, by batch number."""
    target: Callable[[int], Tensor]
    """The dense block's output on the dense network's activations, by batch number."""
    keep: Callable[[int], Tensor | None]
    """Which positions of a batch are real tokens; None: all."""
    fit: tuple[int, ...]
    """Batches to fit to."""
    judge: tuple[int, ...]
    """Batches held out."""


@dataclass(frozen=True)
class BlockFit:
    """The result of a reconstruction: relative errors of the block's output on held-out batches."""

    block: str
    error_before: float
    error: float

    @property
    def changed(self) -> bool:
        """Whether the fitted weights were kept."""
        return self.error < self.error_before


class BlockFitter(Protocol):
    """The protocol of methods that fit blocks, such as `BlockReconstruction`."""

    def fit_(self, block: FinishedBlock) -> BlockFit:
        """Change the block's kept weights in place; returns its output error before and after."""
