"""`norms_after`: the batch norm after each layer, found by running the model on one batch."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bisparse.layers import Layer
from bisparse.pruning.calibration.hooks import call_model
from bisparse.pruning.example_run import extent_of, reads_numbers

__all__ = ["norms_after"]


def norms_after(
    model: nn.Module, layers: Iterable[Layer], batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, nn.Module]:
    """By layer, the batch norm that is all that reads the layer's output, found by running one batch, twice if there are any.

    Left out are norms of several inputs, layers that are called more than once, outputs that anything else reads, such as a
    skip connection, or keeps, such as the caller, an attribute or a hook, and norms of another axis than the layer's outputs,
    such as of the positions that a Linear layer is applied to. Reads by compiled or scripted code, in other threads and inside
    of `torch.vmap` are not seen.
    """
    if not any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules()):
        return {}  # running the model would keep the outputs of all layers in memory
    by_module = {id(layer.module): layer.name for layer in layers if layer.parameter == "weight"}
    with _evaluation(model):
        found = _pairs(model, by_module, batch, forward)
        if found:
            elsewhere = _OtherReads(model, {key: name for key, name in by_module.items() if name in found}, found)
            with elsewhere:
                returned = call_model(model, batch, forward)
            elsewhere.note(pytree.tree_leaves(returned))
            elsewhere.note_kept()
            del returned
            found = {name: norm for name, norm in found.items() if name not in elsewhere.names}
    return found


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _pairs(
    model: nn.Module, by_module: Mapping[int, str], batch: Any, forward: Callable[[nn.Module, Any], Any] | None
) -> dict[str, nn.Module]:
    """By layer, the batch norm that gets its output as its only input."""
    outputs: list[tuple[str, Tensor]] = []
    pairs: list[tuple[str, nn.Module]] = []
    calls: Counter[int] = Counter()
    per_output: set[str] = set()

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            name = by_module[id(module)]
            outputs.append((name, output))
            # A batch norm's axis is 1: channels, if a convolution has a batch; a Linear layer's outputs, of 2 axes only.
            axes = module.weight.ndim if isinstance(module, _ConvNd) else 2
            if output.ndim == axes:
                per_output.add(name)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[id(module)] += 1
        if args:
            pairs.extend((name, module) for name, output in outputs if output is args[0] and name in per_output)

    handles = []
    for module in model.modules():
        if id(module) in by_module:
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before))
    try:
        call_model(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    names = Counter(name for name, _ in pairs)
    called = Counter(name for name, _ in outputs)
    return {name: norm for name, norm in pairs if names[name] == 1 and calls[id(norm)] == 1 and called[name] == 1}


class _OtherReads(TorchFunctionMode):
    """Notes the layers whose output is read outside of the norm after it, for a pass inside its ``with`` block.

    Args:
        layers: names by the ids of modules.
        norms: by layer, the norm after it.
    """

    def __init__(self, model: nn.Module, layers: Mapping[int, str], norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._outputs: list[tuple[tuple[int, int], str, UntypedStorage]] = []
        """Their memory stays, so that no other tensor gets it."""
        self._running: nn.Module | None = None
        self._norms = norms
        self._hooked = [(module, layers.get(id(module))) for module in model.modules() if id(module) in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> _OtherReads:
        for module, name in self._hooked:
            self._handles.append(module.register_forward_hook(self._after(str(name))))
        for norm in self._norms.values():
            # The last before its forward pass and the first after it: other hooks do not belong to it.
            self._handles.append(norm.register_forward_pre_hook(self._entered))
            self._handles.append(norm.register_forward_hook(self._left, prepend=True, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def note(self, values: Iterable[Any]) -> None:
        """Note the layers of the outputs among some values, and of those whose memory they share."""
        for value in values:
            if not isinstance(value, Tensor) or (extent := extent_of(value)) is None:
                continue
            for (start, end), name, _ in self._outputs:
                if start < extent[1] and extent[0] < end and self._norms[name] is not self._running:
                    self.names.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_numbers(func):
            self.note(pytree.tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def _after(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, _: Any, output: Any) -> None:
            if (extent := extent_of(output)) is not None:
                self._outputs.append((extent, name, output.untyped_storage()))

        return after

    def note_kept(self) -> None:
        """Note the layers whose output is still held elsewhere after the pass, such as by what the caller got."""
        held = Counter(id(storage) for _, _, storage in self._outputs)
        kept = [name for _, name, storage in self._outputs if _uses(storage) > 1 or held[id(storage)] > 1]
        if kept:
            gc.collect()  # cycles that nothing holds
            kept = [name for _, name, storage in self._outputs if _uses(storage) > 1 or held[id(storage)] > 1]
        self.names.update(kept)

    def _entered(self, module: nn.Module, _: Any) -> None:
        self._running = module

    def _left(self, *_: Any) -> None:
        self._running = None


def _uses(storage: UntypedStorage) -> int:
    """How many tensors and other owners a storage has; this object is one of them."""
    return int(torch._C._storage_Use_Count(storage._cdata))
