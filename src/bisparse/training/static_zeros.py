"""`StaticZeros`: keeps the pruned weights of a static run at exactly zero.

Gradients are masked when they are accumulated, so that clipping uses the masked norm, and weights after each step. Other writes,
such as those of `load_state_dict` or of an optimizer that wraps the attached one, are undone by the next forward pass: those that
torch counts exactly, and others, through ``.data`` or to sharded weights, if a sample shows them in the first pass after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bisparse.training.forward_hook import ZerosHook
from bisparse.training.gradient_rules import MaskedGradients
from bisparse.training.layer import SparseLayer
from bisparse.training.optimizer import Held, after_each_step
from bisparse.training.pruned_sample import PrunedSample

__all__ = ["StaticZeros"]


class StaticZeros:
    """Zeros at the pruned positions of some layers, in weights and gradients.

    Args:
        layers: a function that returns the layers in training; called at each use.
    """

    def __init__(self, layers: Callable[[], list[SparseLayer]]) -> None:
        self._layers = layers
        self._hook = ZerosHook()
        self._sample = PrunedSample()
        self._gradients = MaskedGradients()
        self._used: dict[int, list[SparseLayer]] = {}
        """By the module's id: the layers whose weights its forward pass uses."""
        self._versions: dict[str, tuple[int, int] | None] = {}
        """By layer: the weight and how often it had been written to, when its pruned weights were last known to be zero."""

    def attach(self, optimizers: Iterable[tuple[Optimizer, Optimizer]], modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
        """Install the hooks. Returns functions that remove them.

        Args:
            optimizers: each as it was given, and without its wrappers.
            modules: those whose forward pass checks that the zeros are still there; the first uses all layers.
        """
        # A wrapper, such as Lookahead, may write weights after the inner step.
        undo = [after_each_step(outer, self.restore) for outer, inner in optimizers if outer is not inner]
        called = list(modules)
        self._used = {id(called[0]): self._layers()}
        self._hook.check, self._hook.undo_writes = self._check, self._undo_writes
        self._hook.install(called)
        for layer in self._layers():
            for module in (layer.module, *layer.sharing):
                if module is not called[0]:
                    self._used.setdefault(id(module), []).append(layer)
            if layer.weight.requires_grad:
                undo.append(
                    layer.weight.register_post_accumulate_grad_hook(
                        lambda weight, own=layer: self._gradients.mask(own, weight)
                    ).remove
                )
        return [*undo, self._detach]

    def before_step(self, held: Iterable[Held]) -> None:
        """Mask the gradients that are not masked yet."""
        for one in held:
            self._gradients.mask(one.layer, one.weight)

    def after_step(self, held: Iterable[Held]) -> None:
        """Set the pruned weights to zero that an optimizer's step has written."""
        self._zero(one.layer for one in held)
        self._hook.unchecked = True

    def restore(self) -> None:
        """Set all pruned weights to zero."""
        self._zero(self._layers())

    def _zero(self, layers: Iterable[SparseLayer]) -> None:
        for layer in layers:
            layer.zero_pruned()
            self._versions[layer.name] = _version(layer)

    def _undo_writes(self, module: nn.Module) -> None:
        """Zero pruned weights that the module's forward pass would use and that have been written to."""
        written = [one for one in self._used.get(id(module), ()) if self._versions.get(one.name) != _version(one)]
        if written:
            self._zero(written)

    def masks_changed(self) -> None:
        """Zero the pruned weights of the next forward pass, whatever was known of them, and sample them again."""
        self._sample.clear()
        self._versions.clear()

    @torch.no_grad()
    def _check(self) -> None:
        """Zero pruned weights again if a sample shows that something other than an attached optimizer has changed them."""
        if self._sample.any_nonzero(self._layers()):
            self.restore()

    def _detach(self) -> None:
        self._hook.check = self._hook.undo_writes = None
        self._used.clear()


def _version(layer: SparseLayer) -> tuple[int, int] | None:
    """What identifies a weight's values: the parameter and torch's count of writes to it; None where there is no such count."""
    weight = layer.weight
    return None if isinstance(weight, DTensor) or weight.is_inference() else (id(weight), weight._version)
