"""Inputs of quantised layers in int8: their ranges by calibration, and the same rounding in torch and in an ONNX graph.

Each layer has one symmetric scale, the largest magnitude of its inputs divided by 127. QuantizeLinear and DequantizeLinear before
the layer's product, with the weight behind a DequantizeLinear of its own, are what TensorRT and other runtimes turn into an int8
product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.export.onnx_graph import TYPES, initializer
from bisparse.user_errors import error_in_one_line

__all__ = ["input_scales", "quantize_inputs", "rounded_inputs"]

LARGEST = 127
PRODUCTS = {"MatMul", "Gemm", "Conv"}
BETWEEN = {"Transpose", "Cast", "Identity"}
"""Operators between a weight and its product."""


def input_scales(
    model: nn.Module, weights: Mapping[str, Sequence[str]], examples: Iterable[Sequence[Tensor]], call: Callable[..., Any]
) -> dict[str, float]:
    """The scale of each layer's inputs, by the name of its weight; one for all modules that share a weight.

    Args:
        weights: by the name of a weight, all its names in the model.
        examples: tensors for `call`, a function that runs the model.

    Raises:
        ValueError: no examples, some that the model does not take, inputs that are NaN or infinite, or a layer that is not a
            module with a weight.
    """
    largest: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}

    def record(name: str, given: Tensor) -> None:
        dtypes[name] = given.dtype
        most = given.detach().abs().amax().float() if given.numel() else given.new_zeros((), dtype=torch.float32)
        largest[name] = torch.maximum(largest[name], most) if name in largest else most

    with _before(model, weights, record):
        count = 0
        for example in examples:
            try:
                call(*example)
            except (RuntimeError, TypeError, IndexError) as error:
                reason = error_in_one_line(error)
                raise ValueError(f"the model cannot be called with an example of int8_inputs: {reason}") from error
            count += 1
    if count == 0:
        raise ValueError("int8_inputs has no examples: pass inputs of the model, as many as are typical")
    if unseen := [name for name in weights if name not in largest]:
        raise ValueError(f"{unseen[0]}: no example of int8_inputs reaches the layer, so its inputs have no range")
    if wrong := [name for name, most in largest.items() if not bool(torch.isfinite(most))]:
        raise ValueError(f"{wrong[0]}: the layer's inputs are NaN or infinite")
    return {name: _scale(float(most), dtypes[name]) for name, most in largest.items()}


def _scale(most: float, dtype: torch.dtype) -> float:
    """The scale of inputs of a largest magnitude, as a number of their dtype, in which the graph has it."""
    if most == 0:
        return 1.0
    return max(float(torch.tensor(most / LARGEST, dtype=dtype)), torch.finfo(dtype).tiny)


@contextmanager
def rounded_inputs(model: nn.Module, scales: Mapping[str, float], weights: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """A context manager in which layers round their inputs as the ONNX file does.

    Args:
        weights: by the name of a weight, all its names in the model.
    """

    def rounded(name: str, given: Tensor) -> Tensor:
        scale = scales[name]
        return ((given.float() / scale).round().clamp(-LARGEST - 1, LARGEST) * scale).to(given.dtype)

    with _before(model, {name: weights[name] for name in scales}, rounded):
        yield


@contextmanager
def _before(
    model: nn.Module, weights: Mapping[str, Sequence[str]], function: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call a function with each input of the modules that use these weights; what it returns replaces the input."""
    handles = []
    try:
        for name, tied in weights.items():
            for module in dict.fromkeys(_module(model, one) for one in tied):
                if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    continue  # looked up, not multiplied

                def hook(
                    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], name: str = name
                ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
                    if given:
                        made = function(name, given[0])
                        return None if made is None else ((made, *given[1:]), named)
                    first = next((one for one in signature(module.forward).parameters if one in named), None)
                    if first is None:
                        raise ValueError(
                            f"{name}: its module is called without inputs, which cannot be rounded to int8; exclude it"
                        )
                    made = function(name, named[first])
                    return None if made is None else (given, {**named, first: made})

                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(model: nn.Module, name: str) -> nn.Module:
    """The module of a weight.

    Raises:
        ValueError: the name is not that of a module's weight.
    """
    module = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(f"{name} is not the weight of a module, so its inputs cannot be rounded to int8; exclude it")
    return module


def quantize_inputs(proto: Any, scales: Mapping[str, float]) -> tuple[str, ...]:
    """Round the inputs of products with quantised weights to int8; returns the names of the weights.

    Raises:
        ValueError: a weight that is in the graph, but in no product.
    """
    from onnx import helper

    dtypes = {one.name.removesuffix("_scale"): one.data_type for one in proto.graph.initializer if one.name.endswith("_scale")}
    consumers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for given in node.input:
            consumers.setdefault(given, []).append(node)
    found: dict[int, tuple[int, float, int]] = {}
    written = []
    for name, scale in scales.items():
        start = f"{name}_dequantized"
        if start not in consumers:
            continue
        products = list(_products(consumers, start, dtypes[name]))
        if not products:
            raise ValueError(f"{name}: the exported graph has no product with it, whose inputs could be rounded")
        found |= {id(node): (place, scale, dtype) for node, place, dtype in products}
        written.append(name)
    nodes: list[Any] = []
    made: dict[tuple[str, float, int], str] = {}
    for node in proto.graph.node:
        if id(node) in found:
            place, scale, dtype = found[id(node)]
            given = node.input[place]
            if (given, scale, dtype) not in made:
                made[given, scale, dtype] = key = f"{given}_int8_{len(made)}"
                values = {f"{key}_scale": _number(scale, dtype), f"{key}_zero_point": torch.tensor(0, dtype=torch.int8)}
                proto.graph.initializer.extend(initializer(one, value) for one, value in values.items())
                nodes.append(helper.make_node("QuantizeLinear", [given, *values], [key], name=f"{key}_QuantizeLinear"))
                dequantized = [f"{key}_dequantized"]
                nodes.append(helper.make_node("DequantizeLinear", [key, *values], dequantized, name=f"{key}_DequantizeLinear"))
            node.input[place] = f"{made[given, scale, dtype]}_dequantized"
        nodes.append(node)
    copied = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copied)
    return tuple(written)


def _number(value: float, dtype: int) -> Tensor:
    """A number as a tensor of one of ONNX's dtypes."""
    from onnx import TensorProto

    named = {name: one for one, name in TYPES.items()}
    return torch.tensor(value, dtype=named.get(TensorProto.DataType.Name(dtype), torch.float32))


def _products(consumers: Mapping[str, Sequence[Any]], name: str, dtype: int) -> Iterator[tuple[Any, int, int]]:
    """The products that a tensor reaches through transpositions, each with the place of its other operand and its dtype."""
    for node in consumers.get(name, ()):
        if node.op_type in BETWEEN:
            cast = next((one.i for one in node.attribute if node.op_type == "Cast" and one.name == "to"), dtype)
            yield from _products(consumers, node.output[0], cast)
        elif node.op_type in PRODUCTS:
            yield node, 0 if node.op_type == "Conv" or node.input[1] == name else 1, dtype
