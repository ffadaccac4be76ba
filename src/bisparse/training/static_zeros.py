"""`StaticZeros`: keeps the pruned weights of a static run at exactly zero.

Gradients are masked one by one as they are accumulated, so that clipping uses the masked norm, and hooks, optimizers that step
in the backward pass and DDP see masked ones; weights are masked together after each step. Other writes, such as those of
`load_state_dict` or of an optimizer that wraps the attached one, are undone by the next forward pass: those that torch counts
exactly, and others, through ``.data`` or to sharded weights, if a sample shows them in the first pass after a step.
Only the parameters that were attached are written to, not what `torch.func.functional_call` puts in their place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bisparse.training.bits import keep_only_each_
from bisparse.training.forward_hook import ZerosHook
from bisparse.training.gradient_rules import MaskedGradients
from bisparse.training.layer import SparseLayer, local
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
        self._names: frozenset[str] = frozenset()
        """Of the layers in training, at the last step."""
        self._inside: dict[int, list[SparseLayer]] = {}
        """By the id of a module that checks: the layers in it."""
        self._attached: dict[str, weakref.ref[Tensor]] = {}
        """By layer: the parameter that may be written to."""
        self._known: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        """By layer: the weight, and torch's count of writes to it, when its pruned weights were last known to be zero."""

    def attach(self, optimizers: Iterable[tuple[Optimizer, Optimizer]], modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
        """Install the hooks. Returns functions that remove them.

        Args:
            optimizers: each as it was given, and without its wrappers.
            modules: those whose forward pass checks that the zeros are still there.
        """
        # A wrapper, such as Lookahead, may write weights after the inner step.
        undo = [after_each_step(outer, self.restore) for outer, inner in optimizers if outer is not inner]
        layers, called = self._layers(), list(modules)
        self._names = frozenset(layer.name for layer in layers)
        self._attached = {layer.name: weakref.ref(layer.weight) for layer in layers}
        self._inside = {id(module): _layers_in(module, layers) for module in called}
        self._hook.check, self._hook.undo_writes = self._check, self._undo_writes
        self._hook.install(called)
        for layer in layers:
            weight = layer.weight
            if weight.is_inference():
                continue  # it is never trained
            trained = weight.requires_grad
            weight.requires_grad_(True)  # torch refuses the hook for a frozen weight, which may be thawed later
            undo.append(weight.register_post_accumulate_grad_hook(_gradient_hook(self, layer)).remove)
            weight.requires_grad_(trained)
        return [*undo, self._detach]

    def mask_gradient(self, layer: SparseLayer, weight: Tensor) -> None:
        """Mask the gradient of a layer's weight, if the layer is still in training."""
        if layer.name in self._names:
            self._gradients.mask([(layer, weight)])

    def before_step(self, held: Iterable[Held]) -> None:
        """Mask the gradients that are not masked yet."""
        self._gradients.mask((one.layer, one.weight) for one in held)

    def after_step(self, held: Iterable[Held]) -> None:
        """Set the pruned weights to zero that an optimizer's step has written."""
        self._names = frozenset(layer.name for layer in self._layers())
        self._zero(one.layer for one in held)
        self._hook.unchecked = True

    def restore(self) -> None:
        """Set all pruned weights to zero."""
        self._zero(self._layers())

    def masks_changed(self) -> None:
        """Zero the pruned weights of the next forward pass, whatever was known of them, and sample them again."""
        self._sample.clear()
        self._known.clear()

    def _zero(self, layers: Iterable[SparseLayer]) -> None:
        layers = list(layers)
        keep_only_each_((local(layer.weight.detach()), layer.local_mask) for layer in layers)
        for layer in layers:
            self._know(layer, self._own(layer))

    def _know(self, layer: SparseLayer, weight: Tensor | None) -> None:
        """Note that the pruned weights of a layer are zero as of now."""
        if weight is not None and (version := _version(weight)) is not None:
            self._known[layer.name] = weakref.ref(weight), version

    def _own(self, layer: SparseLayer) -> Tensor | None:
        """The layer's weight; None if another tensor is in its place for now."""
        weight = layer.module._parameters.get(layer.parameter)
        attached = self._attached.get(layer.name)
        if weight is None or attached is None:
            return None
        # FSDP2 has a different parameter in its place at different times.
        return weight if attached() is weight or isinstance(weight, DTensor) else None

    def _undo_writes(self, module: nn.Module) -> None:
        """Zero pruned weights that the module's forward pass may use and that have been written to."""
        for layer in self._inside.get(id(module), ()):
            weight = layer.module._parameters.get(layer.parameter)
            if (known := self._known.get(layer.name)) is not None and weight is not None:
                zeroed, version = known
                if weight is zeroed() and weight._version == version:
                    continue
            own = self._own(layer)
            if own is None or _version(own) is None or layer.name not in self._names or not layer.active:
                continue
            # Nothing is written without need: a backward pass may still use the weight as it is.
            if not own.is_meta and bool(own.detach().masked_fill(layer.mask, 0).any()):
                self._zero([layer])
            else:
                self._know(layer, own)

    @torch.no_grad()
    def _check(self) -> None:
        """Zero pruned weights again if a sample shows that something other than an attached optimizer has changed them."""
        layers = [layer for layer in self._layers() if self._own(layer) is not None]
        if self._sample.any_nonzero(layers):
            self._zero(layers)

    def _detach(self) -> None:
        self._hook.check = self._hook.undo_writes = None
        self._inside, self._attached, self._known = {}, {}, {}


def _layers_in(module: nn.Module, layers: Iterable[SparseLayer]) -> list[SparseLayer]:
    inner = {id(one) for one in module.modules()}
    return [layer for layer in layers if any(id(holder) in inner for holder in (layer.module, *layer.sharing))]


def _gradient_hook(zeros: StaticZeros, layer: SparseLayer) -> Callable[[Tensor], None]:
    """A hook of the weight without references to it, since no garbage collection would free a cycle of them."""
    owner, masked = weakref.ref(zeros), weakref.ref(layer)

    def hook(weight: Tensor) -> None:
        own, one = owner(), masked()
        if own is not None and one is not None:
            own.mask_gradient(one, weight)

    return hook


def _version(weight: Tensor | None) -> int | None:
    """Torch's count of writes to a weight; None where there is none."""
    return None if weight is None or isinstance(weight, DTensor) or weight.is_inference() else weight._version
