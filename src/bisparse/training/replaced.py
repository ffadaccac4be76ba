"""Sparse layers whose module was put out of the model after `sparsify_`, as by ``model.fc = nn.Linear(...)``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bisparse.training.layer import SparseLayer

__all__ = ["Links"]


class Links:
    """Which modules a model consists of, for a quick check that sparse layers are still among them.

    The links from the model to its layers are remembered and compared; only where one has changed, as by a wrapper around a
    layer, is the whole model looked through.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._edges: list[tuple[nn.Module, str, nn.Module]] | None = None

    def missing(self, layers: Iterable[SparseLayer]) -> list[SparseLayer]:
        """The layers of which no module is in the model any more."""
        if self._edges is not None and all(parent._modules.get(name) is child for parent, name, child in self._edges):
            return []
        layers = list(layers)
        present = {id(module) for module in self.model.modules()}
        gone = [layer for layer in layers if not any(id(one) in present for one in (layer.module, *layer.sharing))]
        if not gone:
            self._remember(layers)
        return gone

    def _remember(self, layers: list[SparseLayer]) -> None:
        wanted = {id(one) for layer in layers for one in (layer.module, *layer.sharing)}
        above = {id(module) for module in self.model.modules() if any(id(inner) in wanted for inner in module.modules())}
        self._edges = [
            (module, name, child)
            for module in self.model.modules()
            for name, child in module._modules.items()
            if child is not None and id(child) in above
        ]
