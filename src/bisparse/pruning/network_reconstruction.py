"""Network reconstruction: fits the kept weights of all layers together to the outputs of the dense network.

After all layers, and blocks if asked, have been pruned, with T the dense network and x a calibration batch::

    min over W' of KL(softmax T(x) || softmax f(x; S * W'))       S the masks, fixed

for models whose output has logits; otherwise the squared error of the output, relative to its energy. Fits of layers and blocks
match hidden states, and the errors of one are not known to the fits before it; this fit weighs every error by its effect on the
output. Labels are not needed. Only weights on the masks, and biases of pruned layers, change. It gains most from data; more than
the layers get (``batches=``) takes no memory but that of the samples.
Guarantee: as for blocks, masks do not change, and the error on held-out batches (every fifth, at most 32; of fewer than five
batches all are fitted to and judged) does not grow; otherwise nothing is changed. Deterministic. With a journal (``resume=``)
the state is stored every ten minutes, 14 to 16 bytes per fitted weight, and an interrupted fit continues from there.
Cost: four forward passes of the network per epoch, one of them of the dense one; memory for a dense copy of the model, for the
activations of one batch, and for 21 to 25 bytes per fitted weight.
Source: distillation after pruning, as in Kurtic et al. 2023 (arXiv 2310.06927), without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.arguments import check_count, check_number, listed
from bisparse.layers import Layer
from bisparse.pruning.block_reconstruction import BlockReconstruction
from bisparse.pruning.calibration.collector import HOLD_OUT_EVERY
from bisparse.pruning.calibration.finished_block import BlockFit, FinishedBlock, StoredFit, split
from bisparse.pruning.calibration.hooks import call_model
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.pruning.kept_fit import fit_kept_
from bisparse.token_masks import TokenMasks

__all__ = ["NetworkReconstruction", "finished_network", "note_of", "parse_reconstruction", "tensor_of"]

HELD_OUT_AT_MOST = 32
"""Held-out batches of long fits."""


@dataclass(frozen=True)
class NetworkReconstruction:
    """Options of network reconstruction, for ``prune_(..., reconstruction=...)``.

    Args:
        epochs: maximum number of passes over the batches.
        learning_rate: largest step of Adam at first, as a fraction of the root mean square of a parameter's kept weights. The
            default suits a hundred sequences or so; a fit to a thousand can bear 0.003.
        worthwhile: after an epoch that reduces the held-out error by less than this fraction, the next ones take a quarter of the
            step, from the best weights; after another such epoch the fit ends.
        blocks: how each block is fitted before, when its layers are pruned; None: not at all.
        batches: data for this fit, of the kind that `prune_` takes as ``batches``; None: the calibration data. Each batch is one
            step, and of little data many small steps gain more than few large ones, down to one sequence of 512 tokens per step.
    """

    epochs: int = 2
    learning_rate: float = 0.001
    worthwhile: float = 0.01
    blocks: BlockReconstruction | None = None
    batches: Sequence[Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("worthwhile", self.worthwhile, least=0)
        if self.blocks is not None and not isinstance(self.blocks, BlockReconstruction):
            raise ValueError(f"blocks={self.blocks!r:.60}: expected a BlockReconstruction or None")
        if self.batches is not None:
            scalar = isinstance(self.batches, Tensor) and self.batches.ndim == 0
            if scalar or isinstance(self.batches, str | bytes | Mapping) or not isinstance(self.batches, Iterable):
                raise ValueError(f"batches={self.batches!r:.60}: expected batches as for prune_, such as a list, or None")
            if not (held := tuple(listed(self.batches))):
                raise ValueError("batches= has no batch: expected at least one, or None")
            object.__setattr__(self, "batches", held)

    def fit_(self, network: FinishedBlock) -> BlockFit:
        """Fit the kept weights, and biases, of the network's pruned layers, in place."""
        return fit_kept_(network, self.epochs, self.learning_rate, self.worthwhile)


def parse_reconstruction(given: object) -> tuple[BlockReconstruction | None, NetworkReconstruction | None]:
    """How blocks and the network are fitted, of the argument of `prune_`.

    Raises:
        ValueError: neither a reconstruction nor None.
    """
    if isinstance(given, NetworkReconstruction):
        return given.blocks, given
    if given is None or isinstance(given, BlockReconstruction):
        return given, None
    raise ValueError(f"reconstruction={given!r:.60}: expected a BlockReconstruction, a NetworkReconstruction or None")


def finished_network(
    model: nn.Module,
    dense: nn.Module,
    layers: Sequence[Layer],
    data: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    each: Callable[[Sequence[int], str], Iterable[int]] = lambda batches, what: batches,
    stored: StoredFit | None = None,
) -> FinishedBlock:
    """A pruned network and its dense copy, both in eval mode, as `NetworkReconstruction` compares them.

    Raises:
        CalibrationError: an output without a floating-point tensor.
    """

    def output(index: int) -> Tensor:
        return tensor_of(call_model(model, data[index], forward, index), index)[0]

    def target(index: int) -> Tensor:
        with torch.no_grad():
            return tensor_of(call_model(dense, data[index], forward, index), index)[0]

    with torch.no_grad():
        classes = tensor_of(call_model(dense, data[0], forward, 0), 0)[1]
    fit, judge = split(len(data), max(HOLD_OUT_EVERY, -(-len(data) // HELD_OUT_AT_MOST)))
    return FinishedBlock(
        "the whole network",
        model,
        tuple(layers),
        output,
        target,
        lambda index: TokenMasks.of_batch(model, data[index]).of(""),
        fit,
        judge,
        classes,
        each,
        stored,
    )


def note_of(network: FinishedBlock, fit: BlockFit) -> str:
    """What the report says of a fit of the network."""
    unit = "nats per position" if network.classes else "relative error"
    return (
        f"fitted the whole network to the dense one's outputs on {len(network.fit)} batches: {unit} on {len(network.judge)} "
        f"{'held-out' if set(network.fit).isdisjoint(network.judge) else 'of these'} batches {fit.error_before:.4g} before, "
        f"{fit.error:.4g} after{'' if fit.changed else ', so nothing was changed'}"
    )


def tensor_of(output: Any, index: int) -> tuple[Tensor, bool]:
    """What of a model's output is compared: its logits, else its first floating-point tensor; and whether these are logits."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim >= 2 and logits.shape[-1] > 1:
        return logits, True
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim]
    if not tensors:
        raise CalibrationError(
            f"batch {index}: the model returned no floating-point tensor to compare with the dense model's; pass "
            "forward=, which returns one, or leave out reconstruction of the network"
        )
    return tensors[0], False
