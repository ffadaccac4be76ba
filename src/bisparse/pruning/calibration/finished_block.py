"""A block, or a whole network, whose layers are all pruned: inputs and results of fitting it as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from bisparse.layers import Layer

__all__ = ["BlockFit", "BlockFitter", "FinishedBlock", "NetworkFitter", "StoredFit", "split"]


class StoredFit(Protocol):
    """The protocol of what stores a fit that is under way, so that an interrupted job continues it."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers as they were stored last; None: nothing was."""

    def store(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Replace what was stored."""


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
    classes: bool = False
    """Whether outputs are logits of classes, compared by their probabilities."""
    each: Callable[[Sequence[int], str], Iterable[int]] = lambda batches, what: batches
    """Iterates over batches; shows the progress of long fits, and what is done: "fitting" or "judging", and the name."""
    stored: StoredFit | None = None
    """Stores the state of long fits."""


@dataclass(frozen=True)
class BlockFit:
    """The result of a reconstruction: errors of the block's output on held-out batches, before and after.

    Relative errors or, of a network with logits, the divergence of the class probabilities in nats per position.
    """

    block: str
    error_before: float
    error: float

    @property
    def changed(self) -> bool:
        """Whether the fitted weights were kept."""
        return self.error < self.error_before


def split(batches: int, held_out_every: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the batches to fit to, and of those held out; with too few batches, all are in both."""
    judge = tuple(range(held_out_every - 1, batches, held_out_every)) or tuple(range(batches))
    return tuple(number for number in range(batches) if number not in judge) or tuple(range(batches)), judge


class BlockFitter(Protocol):
    """The protocol of methods that fit blocks or networks, such as `BlockReconstruction`."""

    def fit_(self, block: FinishedBlock) -> BlockFit:
        """Change the block's kept weights in place; returns its output error before and after."""


class NetworkFitter(BlockFitter, Protocol):
    """The protocol of `NetworkReconstruction`."""

    @property
    def batches(self) -> Sequence[Any] | None:
        """The data to fit on; None: the calibration data."""
