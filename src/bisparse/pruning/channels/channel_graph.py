"""Which channels of a network may be permuted together, read from its graph.

A channel space is a set of activations whose channels are in the same order: the output of a layer, the results of element-wise
operations on it, and whatever is added to it. Permuting a space means permuting the rows of the weights that write it, the
columns of those that read it, and the vectors of the norms in between; the network's function stays the same. A space is frozen
if it meets an input or output of the graph, or an operation that this file does not know; or if the example shows a use of its
weights that the graph does not (`ExampleRun`).

Where torch.fx cannot trace the whole model, its submodules are traced separately, with their inputs and outputs frozen.
"""

from __future__ import annotations

import inspect
import io
import operator
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bisparse.layers.own_forward import has_own_forward
from bisparse.pruning.calibration.hooks import call_model
from bisparse.pruning.channels.known_modules import POOLING_MODULES, is_conv1d, is_elementwise
from bisparse.pruning.example_run import METADATA, ExampleRun, is_leaf

__all__ = ["ChannelSpace", "channel_spaces", "freeze_direct_reads"]

UNTRACEABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
"""Errors of code that needs concrete values when it is traced with symbols (fx's own TraceError is a ValueError)."""

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
    functional.avg_pool1d: 1, functional.adaptive_avg_pool1d: 1, functional.max_pool1d: 1,
    functional.avg_pool2d: 2, functional.adaptive_avg_pool2d: 2, functional.max_pool2d: 2, functional.adaptive_max_pool2d: 2,
}  # fmt: skip
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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

    def permute_(self, order: Tensor, only: Tensor | None = None) -> None:
        """Move channel ``order[i]`` to position i, in place, in all tensors or in one."""
        with torch.no_grad():
            for weight, dim in _distinct([*self.writers, *self.readers, *((vector, 0) for vector in self.vectors)]):
                if only is not None and weight is not only:
                    continue
                weight.copy_(weight.index_select(dim, order.to(weight.device)))


def _distinct(entries: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return list({(id(tensor), dim): (tensor, dim) for tensor, dim in entries}.values())


def channel_spaces(
    model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[list[ChannelSpace], dict[str, str]]:
    """The channel spaces that have a reader and a writer, frozen ones included; and submodules that were not read, with reasons.

    These are submodules that cannot be traced or whose graph is not what the example does, and layers that it does not reach.
    """
    run = ExampleRun(model)
    with torch.no_grad(), run:
        call_model(model, example, forward)
    spaces: list[ChannelSpace] = []
    skipped: dict[str, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if not any(True for _ in module.children()):
            return
        if name in run.given:  # a ModuleList is not called itself
            try:
                reader = _Reader(module, *run.given[name])
                if not reader.calls_differ(run):
                    spaces.extend(reader.spaces())
                    return
                skipped[name or type(model).__name__] = "its layers are not called as in its graph, or by other parts as well"
            except UNTRACEABLE as error:
                skipped[name or type(model).__name__] = (
                    f"torch.fx cannot trace it: {str(error).splitlines()[0] if str(error) else error!r}"
                )
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}  # never called
    for name, module in model.named_modules():
        if name not in run.given and id(module) not in inside and any(one.ndim > 1 for one in module.parameters(recurse=False)):
            unseen = (
                "it is compiled by torch.jit" if isinstance(module, torch.jit.ScriptModule) else "the example does not reach it"
            )
            skipped[name] = f"{unseen}: if it reads channels of other layers, their order may have changed"
    for space in spaces:
        if any(id(tensor) in run.shared for tensor in space.tensors):
            space.frozen = space.frozen or "a weight is shared between modules"
    freeze_direct_reads(spaces, run)
    return [space for space in spaces if space.writers and space.readers], skipped


def freeze_direct_reads(spaces: list[ChannelSpace], run: ExampleRun) -> None:
    """Freeze spaces with a weight that was read directly: the order that such code expects is not known."""
    for space in spaces:
        names = [run.direct[id(tensor)] for tensor in space.tensors if id(tensor) in run.direct]
        if names:
            space.frozen = space.frozen or f"{names[0]} is also read directly, not by its layer"


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


@dataclass(frozen=True)
class _Place:
    """The channels of an activation: which space, along which dimension."""

    space: int
    dim: int


class _Reader:
    """Follows channels through one graph."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        attributes = set(vars(module))
        try:
            graph = _LeafTracer().trace(module)
            traced = fx.GraphModule(module, graph)
        finally:
            for constant in set(vars(module)) - attributes:  # torch.fx leaves them in the module
                delattr(module, constant)
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
        self.attached: dict[int, int] = {}
        self.not_followed: set[int] = set()
        """Ids of the tensors of modules that have a call that is not followed."""

    def calls_differ(self, run: ExampleRun) -> bool:
        """Whether layers are called by other code than that of the graph, or not as often."""
        called = [str(node.target) for node in self.graph.nodes if node.op == "call_module"]
        graph, own = Counter(id(self.module.get_submodule(name)) for name in called), id(self.module)
        leaves = [id(one) for one in self.module.modules() if one is not self.module and is_leaf(one)]
        return any(
            run.as_leaf[leaf, own] != run.calls[own] * graph[leaf] or run.within[leaf, own] != run.calls[leaf] for leaf in leaves
        )

    def spaces(self) -> list[ChannelSpace]:
        for node in self.graph.nodes:
            place = self._follow(node)
            if place is not None:
                self.places[node] = place
                shape, space = self._shape(node), self.all[place.space]
                if shape is not None and (len(shape) <= place.dim or shape[place.dim] != space.size):
                    space.frozen = space.frozen or "activations of different widths meet"
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
        for whole in merged.values():
            if any(id(tensor) in self.not_followed for tensor in whole.tensors):
                whole.frozen = whole.frozen or "a layer is also called where its channels are not known"
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
            last, own = len(shape) - 1, has_own_forward(module)
            plain = not own and _holds_only(module, "weight", "bias")
            if plain and isinstance(module, nn.Linear) and type(module).__name__.endswith("Linear"):
                return self._layer(module, place, shape, last, last, (0, 1))
            if is_conv1d(module) and _holds_only(module, "weight", "bias"):
                return self._layer(module, place, shape, last, last, (1, 0))
            conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(shape) == len(module.kernel_size) + 2
            if conv and plain:
                if module.groups == 1:
                    return self._layer(module, place, shape, 1, 1, (0, 1))
                if module.groups == module.in_channels == module.out_channels and place is not None and place.dim == 1:
                    return self._attach(module, place)
            batch_norm = not own and isinstance(module, _BatchNorm) and _holds_only(module, "weight", "bias", *STATISTICS)
            norm = plain and isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1
            if place is not None and ((batch_norm and place.dim == 1) or (norm and place.dim == last)):
                return self._attach(module, place)
            if is_elementwise(module, shape):
                return place
            pooled = any(isinstance(module, kinds) and len(shape) == dims + 2 for dims, kinds in POOLING_MODULES.items())
            if not own and (pooled or isinstance(module, nn.Upsample)) and (place is None or place.dim == 1):
                return place
            if not own and isinstance(module, nn.Flatten) and place is not None:
                return self._flattened(node, place, shape)
        own_code = " has its own forward pass, and" if has_own_forward(module) else ""
        self._freeze(node, f"{type(module).__name__}{own_code} may mix or reorder channels")
        self.not_followed |= {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
        return None

    def _attach(self, module: nn.Module, place: _Place) -> _Place:
        if id(module) in self.attached:  # called again: one order for both
            self._join(place.space, self.attached[id(module)])
            return place
        self.attached[id(module)] = place.space
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        self.all[place.space].vectors += [tensor for tensor in tensors if tensor.ndim]
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
        tracked = [argument for argument in node.all_input_nodes if argument in self.places]
        if not tracked or target in METADATA or (target is getattr and node.args[1] in METADATA):
            return None
        sources = [argument for argument in node.all_input_nodes if self._shape(argument) is not None]
        if target in COMBINING:
            return self._combined(node, sources)
        place, shape = self.places[tracked[0]], self._shape(tracked[0])
        if sources == tracked[:1] and shape is not None:
            if target in ELEMENTWISE:
                return place
            if (POOLING.get(target) == len(shape) - 2 or target is functional.interpolate) and place.dim == 1:
                return place
            if target in (torch.mean, "mean"):
                return self._averaged(node, place, shape)
            if target in (torch.flatten, "flatten", "view", "reshape", torch.reshape, "squeeze", torch.squeeze):
                return self._flattened(node, place, shape)
        self._freeze(node, f"{getattr(target, '__name__', target)} may mix or reorder channels")
        return None

    def _combined(self, node: fx.Node, sources: list[fx.Node]) -> _Place | None:
        if len(sources) == 1 and sources[0] in self.places:
            return self.places[sources[0]]
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


def _holds_only(module: nn.Module, *names: str) -> bool:
    """Whether its tensors are these and no others; one of these that is computed from another would be permuted in vain."""
    held = {**module._parameters, **module._buffers}
    return set(held) <= set(names) and all(name in held or getattr(module, name, None) is None for name in names)
