"""`RunLayers`: which of a run's layers are still trained sparse, and what became of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from bisparse.layers import Skipped
from bisparse.results import LayerResult
from bisparse.training.facts import layer_facts
from bisparse.training.layer import SparseLayer
from bisparse.training.mask_search import Score
from bisparse.training.replaced import Links

__all__ = ["RunLayers"]


class RunLayers:
    """The sparse layers of a run: in training, finalized, or replaced by other modules.

    Args:
        layers: all layers that `sparsify_` has made sparse.
        model: the model that contains them.
    """

    def __init__(self, layers: list[SparseLayer], model: nn.Module) -> None:
        self.all = layers
        self.final: dict[str, LayerResult] = {}
        """By layer name, the figures at the time when it was finalized."""
        self.replaced: dict[str, str] = {}
        """By layer name, why it is no longer trained sparse."""
        self._links = Links(model)

    @property
    def active(self) -> list[SparseLayer]:
        """The layers that are neither finalized nor replaced."""
        gone = self.final | self.replaced
        return [layer for layer in self.all if layer.name not in gone and layer.active]

    @property
    def ended(self) -> bool:
        """Whether no layer is left."""
        return len(self.final | self.replaced) == len(self.all)

    def notice_replaced(self, stacklevel: int) -> None:
        """Warn once per layer whose module is no longer in the model, and leave it out from now on."""
        for layer in self._links.missing(self.active):
            reason = f"replaced after sparsify_: the new module {layer.name!r} has no mask and trains dense"
            self.replaced[layer.name] = reason
            warnings.warn(
                f"{layer.name}: {reason}. Replace modules before sparsify_; to make it sparse, call finalize_(model), "
                "sparsify_ it again, and give its parameters to the optimizer",
                stacklevel=stacklevel + 1,
            )

    def results(self, score: Score) -> tuple[LayerResult, ...]:
        """The figures of all layers that were not replaced: of the current weights, or from when they were finalized."""
        present = [layer for layer in self.all if layer.name not in self.replaced]
        return tuple(self.final.get(layer.name) or layer_facts(layer, score) for layer in present)

    def results_within(self, modules: Iterable[nn.Module], score: Score) -> dict[str, LayerResult]:
        """The figures of the layers in training that are among these modules, by name."""
        own = {id(module) for module in modules}
        return {layer.name: layer_facts(layer, score) for layer in self.active if id(layer.module) in own}

    def left_dense(self) -> tuple[Skipped, ...]:
        """The replaced layers, with reasons."""
        return tuple(Skipped(name, reason) for name, reason in self.replaced.items())
