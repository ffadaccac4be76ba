"""Finds sparse layers whose module was replaced after `sparsify_`, such as by ``model.fc = nn.Linear(...)``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bisparse.training.layer import SparseLayer

__all__ = ["Links"]


class Links:
    """The path of modules from a model to its sparse layers, for a quick check that they are still part of the model.

    The links along the path are compared; the whole model is searched only if one has changed, such as by a wrapper around
    a layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._edges: list[tuple[nn.Module, str, nn.Module]] | None = None

    def missing(self, layers: Iterable[SparseLayer]) -> list[SparseLayer]:
        """The layers none of whose modules is still in the model."""
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
