"""Block reconstruction: fits the kept weights of a whole block together to the dense block's output.

After the layers of a block have been pruned one by one, with x the block's inputs in the pruned network and z in the dense one::

    min over W' of sum over tokens of weight * |dense block(z) - block(x; S * W')|^2       S the masks, fixed

Unlike a fit per layer, this takes the softmax of attention and the gate of an MLP into account, and lets one layer compensate
for another. It uses Adam, since a block is not linear, with steps relative to the size of each parameter.
Guarantee: masks do not change, and the error on held-out batches (every fifth) does not grow; otherwise the block is left
unchanged. Deterministic.
Cost: about three forward passes of the block per epoch, and float32 copies and moments of one block's parameters.
Source: the objective is that of BRECQ (Li et al., ICLR 2021, arXiv 2102.05426), for pruned models EBFT (Guo et al., 2024, arXiv
2402.12419). Departures: held-out data decides; tokens of very high energy count less, as in all statistics here.
"""

from __future__ import annotations

from dataclasses import dataclass

from bisparse.arguments import check_count, check_number
from bisparse.pruning.calibration.finished_block import BlockFit, FinishedBlock
from bisparse.pruning.kept_fit import fit_kept_

__all__ = ["BlockReconstruction"]


@dataclass(frozen=True)
class BlockReconstruction:
    """Options of block reconstruction, for ``prune_(..., reconstruction=...)``.

    Args:
        epochs: maximum number of passes over the calibration batches. Each batch is one step: of little data, small
            batches gain more.
        learning_rate: largest step of Adam at first, as a fraction of the root mean square of a parameter's kept weights.
        worthwhile: after an epoch that reduces the held-out error by less than this fraction, the next ones take a quarter of the
            step, from the best weights; after another such epoch the fit ends. The first blocks improve for many epochs, and
            all later blocks inherit their error; later blocks soon stop improving.
    """

    epochs: int = 8
    learning_rate: float = 0.02
    worthwhile: float = 0.03

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("worthwhile", self.worthwhile, least=0)

    def fit_(self, block: FinishedBlock) -> BlockFit:
        """Fit the kept weights, and biases, of the block's pruned layers, in place."""
        return fit_kept_(block, self.epochs, self.learning_rate, self.worthwhile)
