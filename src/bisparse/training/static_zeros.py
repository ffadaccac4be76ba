"""`StaticZeros`: keeps the pruned weights of a static run at exactly zero.

Gradients are masked when they are accumulated, so that clipping uses the masked norm, and weights after each step. Other writes,
such as those of an optimizer that wraps the attached one, are undone by the next forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
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

    def attach(self, optimizers: Iterable[tuple[Optimizer, Optimizer]], modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
        """Install the hooks. Returns functions that remove them.

        Args:
            optimizers: each as it was given, and without its wrappers.
            modules: those whose forward pass checks that the zeros are still there.
        """
        # A wrapper, such as Lookahead, may write weights after the inner step.
        undo = [after_each_step(outer, self.restore) for outer, inner in optimizers if outer is not inner]
        self._hook.check = self._check
        self._hook.install(modules)
        for layer in self._layers():
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
        for one in held:
            one.layer.zero_pruned()
        self._hook.unchecked = True

    def restore(self) -> None:
        """Set all pruned weights to zero."""
        for layer in self._layers():
            layer.zero_pruned()

    def masks_changed(self) -> None:
        """Sample the pruned weights again."""
        self._sample.clear()

    @torch.no_grad()
    def _check(self) -> None:
        """Zero pruned weights again if a sample shows that something other than an attached optimizer has changed them."""
        if self._sample.any_nonzero(self._layers()):
            self.restore()

    def _detach(self) -> None:
        self._hook.check = None
