"""Which channels of a network may be permuted together, read from its graph.

A channel space is a set of activations whose channels are in the same order: the output of a layer, the results of element-wise
operations on it, and whatever is added to it. Permuting a space means permuting the rows of the weights that write it, the
columns of those that read it, and the vectors of the norms in between; the network's function stays the same. A space is frozen
if it meets an input or output of the graph, or an operation that this file does not know.

Where torch.fx cannot trace the whole model, its submodules are traced separately, with their inputs and outputs frozen.
"""

from __future__ import annotations

import inspect
import io
import operator
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bisparse.pruning.calibration.hooks import call_model

__all__ = ["ChannelSpace", "channel_spaces"]

UNTRACEABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
"""Errors of code that needs concrete values when it is traced with symbols (fx's own TraceError is a ValueError)."""

ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.ELU,
    nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POOLING_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip
ELEMENTWISE = {
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.clamp, functional.relu, functional.relu6,
    functional.gelu, functional.silu, functional.sigmoid, functional.tanh, functional.hardswish, functional.hardsigmoid,
    functional.leaky_relu, functional.elu, functional.mish, functional.softplus, functional.dropout, functional.dropout2d,
    operator.neg, "relu", "relu_", "sigmoid", "tanh", "contiguous", "float", "to", "clone", "detach", "abs",
}  # fmt: skip
COMBINING = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul, torch.add, torch.sub,
    torch.mul, torch.div, "add", "sub", "mul", "div", "add_", "mul_", "sub_",
}  # fmt: skip
POOLING = {
    functional.avg_pool1d, functional.avg_pool2d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
    functional.max_pool1d, functional.max_pool2d, functional.adaptive_max_pool2d, functional.interpolate,
}  # fmt: skip
LOOKING = {getattr, "size", "dim", "ndimension"}
"""They read shapes only, which do not depend on the order of channels."""


@dataclass(eq=False)
class ChannelSpace:
    """Channels that must be permuted together."""

    size: int
    writers: list[tuple[Tensor, int]] = field(default_factory=list)
    """Weights and the dimension that writes the space."""
    readers: list[tuple[Tensor, int]] = field(default_factory=list)
    """Weights and the dimension that reads it."""
    vectors: list[Tensor] = field(default_factory=list)
    """Biases and the per-channel tensors of norms and depthwise convolutions, along dimension 0."""
    frozen: str = ""
    """Why it cannot be permuted; empty if it can."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that `permute_` writes to."""
        return [*(tensor for tensor, _ in [*self.writers, *self.readers]), *self.vectors]

    def permute_(self, order: Tensor) -> None:
        """Move channel ``order[i]`` to position i, in place."""
        with torch.no_grad():
            for weight, dim in _distinct([*self.writers, *self.readers, *((vector, 0) for vector in self.vectors)]):
                weight.copy_(weight.index_select(dim, order.to(weight.device)))


def _distinct(entries: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return list({(id(tensor), dim): (tensor, dim) for tensor, dim in entries}.values())


def channel_spaces(
    model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[list[ChannelSpace], dict[str, str]]:
    """The channel spaces that have a reader and a writer, frozen ones included; and submodules that were not read, with reasons.

    These are submodules that cannot be traced, and layers that the example does not reach.
    """
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: given.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            call_model(model, example, forward)
    finally:
        for handle in handles:
            handle.remove()
    spaces: list[ChannelSpace] = []
    skipped: dict[str, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if not any(True for _ in module.children()):
            return
        if name in given:  # a ModuleList is not called itself
            try:
                spaces.extend(_Reader(module, *given[name]).spaces())
                return
            except UNTRACEABLE as error:
                skipped[name or type(model).__name__] = (
                    f"torch.fx cannot trace it: {str(error).splitlines()[0] if str(error) else error!r}"
                )
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}  # never called
    for name, module in model.named_modules():
        if name not in given and id(module) not in inside and any(one.ndim > 1 for one in module.parameters(recurse=False)):
            skipped[name] = "the example does not reach it: if it reads channels of other layers, their order may have changed"
    shared = {tensor for tensor, uses in _uses(model).items() if uses > 1}
    for space in spaces:
        if any(id(tensor) in shared for tensor, _ in [*space.writers, *space.readers]):
            space.frozen = space.frozen or "a weight is shared between modules"
    return [space for space in spaces if space.writers and space.readers], skipped


def _uses(model: nn.Module) -> dict[int, int]:
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Place:
    """The channels of an activation: which space, along which dimension."""

    space: int
    dim: int


class _Reader:
    """Follows channels through one graph."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        graph = _LeafTracer().trace(module)
        traced = fx.GraphModule(module, graph)
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        values = [bound.arguments.get(node.target) for node in graph.nodes if node.op == "placeholder"]
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # it prints the traceback of an error
            ShapeProp(traced).propagate(*values)
        self.graph = traced.graph
        self.all: list[ChannelSpace] = []
        self.parent: list[int] = []
        self.places: dict[fx.Node, _Place] = {}
        self.written: dict[int, int] = {}
        self.read: dict[int, int] = {}

    def spaces(self) -> list[ChannelSpace]:
        for node in self.graph.nodes:
            place = self._follow(node)
            if place is not None:
                self.places[node] = place
        merged: dict[int, ChannelSpace] = {}
        for index, space in enumerate(self.all):
            root = self._root(index)
            whole = merged.setdefault(root, ChannelSpace(space.size))
            whole.writers += space.writers
            whole.readers += space.readers
            whole.vectors += space.vectors
            whole.frozen = whole.frozen or space.frozen
            if space.size != whole.size:
                whole.frozen = whole.frozen or "activations of different widths meet"
        return list(merged.values())

    def _root(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def _new(self, size: int, frozen: str = "") -> int:
        self.all.append(ChannelSpace(size, frozen=frozen))
        self.parent.append(len(self.all) - 1)
        return len(self.all) - 1

    def _join(self, a: int, b: int) -> None:
        self.parent[self._root(a)] = self._root(b)

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        meta = node.meta.get("tensor_meta")
        return tuple(meta.shape) if isinstance(meta, fx.passes.shape_prop.TensorMetadata) else None

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for argument in node.all_input_nodes:
            if argument in self.places:
                space = self.all[self.places[argument].space]
                space.frozen = space.frozen or reason

    def _follow(self, node: fx.Node) -> _Place | None:
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            self._freeze(node, "it is an output of the graph")
            return None
        if node.op == "call_module":
            return self._module(node, self.module.get_submodule(str(node.target)))
        return self._function(node)

    def _module(self, node: fx.Node, module: nn.Module) -> _Place | None:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        place = self.places.get(source) if source is not None else None
        shape = self._shape(source) if source is not None else None
        if len(node.all_input_nodes) == 1 and shape is not None:
            last = len(shape) - 1
            if isinstance(module, nn.Linear) and type(module).__name__.endswith("Linear"):
                return self._layer(module, place, shape, last, last, (0, 1))
            if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
                return self._layer(module, place, shape, last, last, (1, 0))
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(shape) == len(module.kernel_size) + 2:
                if module.groups == 1:
                    return self._layer(module, place, shape, 1, 1, (0, 1))
                if module.groups == module.in_channels == module.out_channels and place is not None and place.dim == 1:
                    return self._attach(place, module.weight, module.bias)
            if isinstance(module, _BatchNorm) and place is not None and place.dim == 1:
                return self._attach(place, module.weight, module.bias, module.running_mean, module.running_var)
            normed = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1
            if normed and place is not None and place.dim == last:
                return self._attach(place, module.weight, getattr(module, "bias", None))
            if isinstance(module, ELEMENTWISE_MODULES) or _is_activation(module):
                return place
            if isinstance(module, POOLING_MODULES) and (place is None or place.dim == 1):
                return place
            if isinstance(module, nn.Flatten) and place is not None:
                return self._flattened(node, place, shape)
        self._freeze(node, f"{type(module).__name__} may mix or reorder channels")
        return None

    def _attach(self, place: _Place, *vectors: Tensor | nn.Module | None) -> _Place:
        self.all[place.space].vectors += [vector for vector in vectors if isinstance(vector, Tensor)]
        return place

    def _layer(
        self, module: nn.Module, place: _Place | None, shape: tuple[int, ...], reads: int, writes: int, dims: tuple[int, int]
    ) -> _Place:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        if place is None or place.dim != reads:
            if place is not None:
                space = self.all[place.space]
                space.frozen = space.frozen or "a layer reads it along another dimension"
            source = self._new(shape[reads], "it is an input of the graph, or comes from an operation that is not known")
        else:
            source = place.space
        # The same layer called again reads and writes with the same weight: both uses are one space.
        if id(weight) in self.read:
            self._join(source, self.read[id(weight)])
        else:
            self.read[id(weight)] = source
            self.all[source].readers.append((weight, dims[1]))
        if id(weight) in self.written:
            return _Place(self.written[id(weight)], writes)
        target = self._new(weight.shape[dims[0]])
        self.written[id(weight)] = target
        self.all[target].writers.append((weight, dims[0]))
        if isinstance(bias, Tensor):
            self.all[target].vectors.append(bias)
        return _Place(target, writes)

    def _function(self, node: fx.Node) -> _Place | None:
        target: Any = node.target
        sources = [argument for argument in node.all_input_nodes if self._shape(argument) is not None]
        first = node.args[0] if node.args else None
        place = self.places.get(first) if isinstance(first, fx.Node) else None
        if target in LOOKING:
            return None
        if target in ELEMENTWISE and len(sources) == 1:
            return place
        if target in COMBINING:
            return self._combined(node, sources)
        if target in POOLING and (place is None or place.dim == 1):
            return place
        shape = self._shape(first) if isinstance(first, fx.Node) else None
        if place is not None and shape is not None:
            if target in (torch.mean, "mean"):
                return self._averaged(node, place, shape)
            if target in (torch.flatten, "flatten", "view", "reshape", torch.reshape, "squeeze", torch.squeeze):
                return self._flattened(node, place, shape)
        self._freeze(node, f"{getattr(target, '__name__', target)} may mix or reorder channels")
        return None

    def _combined(self, node: fx.Node, sources: list[fx.Node]) -> _Place | None:
        if len(sources) == 1:
            return self.places.get(sources[0])
        shape = self._shape(node)
        places = [self.places.get(source) for source in sources]
        known = [place for place in places if place is not None]
        if shape is None or len(known) < len(places):
            self._freeze(node, "it meets an activation whose channels are not known")
            return None
        first, *others = known
        for source, place in zip(sources, known, strict=True):
            own = self._shape(source)
            # Broadcasting is fine along any other dimension, as where a gate scales whole channels.
            if own is None or len(own) != len(shape) or place.dim != first.dim or own[place.dim] != shape[place.dim]:
                self._freeze(node, "it meets an activation of another shape")
                return None
        for place in others:
            self._join(place.space, first.space)
        return first

    def _averaged(self, node: fx.Node, place: _Place, shape: tuple[int, ...]) -> _Place | None:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        if dims is None:
            self._freeze(node, "it is averaged over all dimensions")
            return None
        averaged = {int(dim) % len(shape) for dim in (dims if isinstance(dims, tuple | list) else (dims,))}
        if place.dim in averaged:
            # An average over the channels is the same whatever their order.
            return None
        return place if keep else _Place(place.space, place.dim - sum(dim < place.dim for dim in averaged))

    def _flattened(self, node: fx.Node, place: _Place, shape: tuple[int, ...]) -> _Place | None:
        after = self._shape(node)
        size = shape[place.dim]
        rest = [one for dim, one in enumerate(shape) if dim > place.dim]
        # Only dimensions of size one go: the channels stay as they are.
        if (
            after is not None
            and place.dim == 1
            and all(one == 1 for one in rest)
            and after[:1] == shape[:1]
            and after[1:] == (size,)
        ):
            return _Place(place.space, 1)
        self._freeze(node, "it is reshaped together with other dimensions")
        return None


def _is_activation(module: nn.Module) -> bool:
    name = type(module).__name__
    plain = not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
    return plain and (name.endswith("Activation") or name in ("NewGELU", "QuickGELU", "Swish", "MemoryEfficientSwish"))
