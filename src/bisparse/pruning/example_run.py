"""What a network does with its weights and layers while it runs on an example, where its graph does not show it.

The graph of torch.fx shows calls of layers. It does not show weights that other code reads, such as `F.linear(x,
self.layer.weight.t())` in a hook or in a part that cannot be traced, and it holds only one branch of the code.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["METADATA", "ExampleRun", "extent_of", "is_leaf", "reads_numbers"]

METADATA = {
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "dtype", "device", "layout", "requires_grad",
    "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes", "element_size", "get_device",
    "is_floating_point", "is_complex", "is_contiguous", "is_inference", "grad_fn", "__len__", "__hash__",
}  # fmt: skip
"""What functions and attributes read of a tensor that does not depend on the order of its numbers."""


class ExampleRun(TorchFunctionMode):
    """Records, for the passes inside its ``with`` block, direct reads of weights and the calls of modules.

    Attributes:
        given: the arguments of each module's first call, by name.
        direct: ids of the parameters and buffers that a function got outside the forward pass of the module that holds them,
            themselves or by a tensor that shares their memory; with the first such name.
        shared: ids of the parameters and buffers that share memory with one that has another name.
        calls: how often each module was called, by id.
        within: how often during a call of another module, by the ids of both.
        as_leaf: the same, without calls by a module in between that `is_leaf`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.direct: dict[int, str] = {}
        self.calls: Counter[int] = Counter()
        self.within: Counter[tuple[int, int]] = Counter()
        self.as_leaf: Counter[tuple[int, int]] = Counter()
        self._model = model
        self._leaves = {id(module) for module in model.modules() if is_leaf(module)}
        self._running: list[nn.Module] = []
        held = [
            (tensor, module, f"{name}.{key}" if name else key)
            for name, module in model.named_modules()
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        ]
        self._by_id: dict[int, list[tuple[int, nn.Module, str]]] = {}
        for tensor, module, name in held:
            self._by_id.setdefault(id(tensor), []).append((id(tensor), module, name))
        placed = [(*extent, (id(tensor), module, name)) for tensor, module, name in held if (extent := extent_of(tensor))]
        placed.sort(key=lambda one: one[:2])
        self._placed = placed
        self._starts = [start for start, _, _ in placed]
        self._ends = list(accumulate((end for _, end, _ in placed), max))
        """The last address of all up to this one: where a search by address can stop."""
        self.shared = {id(tensor) for tensor, _, _ in held if len({name for _, _, name in self._holders(tensor)}) > 1}

    def __enter__(self) -> ExampleRun:
        self._handles: list[Any] = []
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no such hooks, and its code is not seen
            # After all other hooks before the pass, and before all others after it: those are not part of the forward pass.
            before, after = self._entered(name), self._left
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, prepend=True, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._running.clear()
        for handle in self._handles:
            handle.remove()

    def _entered(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.given.setdefault(name, (args, kwargs))
            callers = [id(caller) for caller in self._running]
            self.calls[id(module)] += 1
            self.within.update({(id(module), caller) for caller in callers})
            deepest = max((depth for depth, caller in enumerate(callers) if caller in self._leaves), default=0)
            self.as_leaf.update({(id(module), caller) for caller in callers[deepest:]})
            self._running.append(module)

        return entered

    def _left(self, module: nn.Module, *_: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_numbers(func):
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    for key, module, full_name in self._holders(leaf):
                        if not self._running or self._running[-1] is not module:
                            self.direct.setdefault(key, full_name)
        return func(*args, **(kwargs or {}))

    def _holders(self, tensor: Tensor) -> Iterator[tuple[int, nn.Module, str]]:
        """Parameters and buffers that are the tensor or share memory with it: id, module and name."""
        yield from self._by_id.get(id(tensor), ())
        extent = extent_of(tensor)
        if extent is None:
            return
        index = bisect_left(self._starts, extent[1]) - 1
        while index >= 0 and self._ends[index] > extent[0]:
            if self._placed[index][1] > extent[0]:
                yield self._placed[index][2]
            index -= 1


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph shows a call of the module, instead of what the module calls."""
    return not any(True for _ in module.children()) or fx.Tracer().is_leaf_module(module, "")


def reads_numbers(function: Any) -> bool:
    """Whether a function that a `TorchFunctionMode` sees may read more of its tensors than `METADATA`."""
    name = getattr(function, "__name__", "")
    if name == "__get__":  # of an attribute
        name = getattr(function.__self__, "__name__", "")
    return name not in METADATA


def extent_of(tensor: Tensor) -> tuple[int, int] | None:
    """The first address of a tensor's memory and the one after its last; None if it has none."""
    if tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # such as tensors that only wrap others
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.element_size()) if start else None
