"""Changes to an exported ONNX graph: names of weights and axes, and int8 weights behind DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from bisparse.layers import memory_of
from bisparse.quantization import QuantizationReport, QuantizedLayer, parse_scheme, stored_values
from bisparse.tiles import LayoutKind

__all__ = ["TYPES", "check_quantizable", "initializer", "name_axes", "quantize_weights", "rename_weights", "tied_names"]

CHANNEL_AXIS = {LayoutKind.LINEAR: 0, LayoutKind.TRANSPOSED: 1, LayoutKind.CONV: 0}
"""The axis of output channels in a stored weight."""
TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int8: "INT8"}
"""ONNX's names of the dtypes of weights, scales and zero points; scales of DequantizeLinear cannot be float64."""
OPSET_OF_HALF_SCALES = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take scales of float16 and bfloat16."""
REMEDY = "convert the model to float32 by model.float() and quantise it again"


def initializer(name: str, value: Shaped[Tensor, "..."]) -> Any:
    """A tensor as an initializer of a graph."""
    from onnx import TensorProto

    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorProto(name=name, dims=value.shape, data_type=TensorProto.DataType.Value(TYPES[value.dtype]), raw_data=raw)


def rename_weights(proto: Any, prefix: str) -> None:
    """Remove a prefix from the names of all initializers, and where they are used."""
    renamed = {one.name: one.name.removeprefix(prefix) for one in proto.graph.initializer if one.name.startswith(prefix)}
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)} | {one.name for one in proto.graph.input}
    renamed = {name: new for name, new in renamed.items() if new not in taken}
    for one in (*proto.graph.initializer, *proto.graph.value_info):
        one.name = renamed.get(one.name, one.name)
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)


def name_axes(proto: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Rename the symbols of dynamic input axes throughout the graph."""
    symbols = {}
    for one in proto.graph.input:
        for axis, name in axes.get(one.name, {}).items():
            symbols[one.type.tensor_type.shape.dim[axis].dim_param] = name
    for one in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dimension in one.type.tensor_type.shape.dim:
            if dimension.dim_param in symbols:
                dimension.dim_param = symbols[dimension.dim_param]


def check_quantizable(report: QuantizationReport, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError if weights cannot be written as int8 behind DequantizeLinear nodes.

    Raises:
        ValueError: a scheme other than int8, a layer of several matrices, or a dtype that DequantizeLinear cannot return.
    """
    for layer in report:
        if (weight := weights.get(layer.parameter)) is not None and weight.dtype not in TYPES:
            raise ValueError(f"{layer.name} is {_name(weight.dtype)}, to which ONNX cannot dequantise int8 weights; {REMEDY}")
        if parse_scheme(layer.scheme).name != "int8":
            raise ValueError(f"{layer.name} is quantised to {layer.scheme}: ONNX files are written with int8 weights only")
        if layer.layout.kind not in CHANNEL_AXIS or layer.layout.groups > 1:
            raise ValueError(
                f"{layer.name} is stored as {layer.layout}: int8 weights of Linear layers and convolutions without groups are "
                "written; exclude it from the quantisation"
            )


def tied_names(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """By name of a weight, all names of it: several for a tied weight."""
    names: dict[Hashable, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(memory_of(weight), []).append(name)
    return {name: tuple(names[memory_of(weight)]) for name, weight in weights.items()}


def quantize_weights(proto: Any, report: QuantizationReport, weights: Mapping[str, Tensor]) -> dict[str, QuantizedLayer]:
    """Store quantised layers' weights as int8, with a scale per channel and zero point 0, and dequantise them in the graph.

    A layer that no output depends on, such as a pooler, is not in the graph, and is left out. Of the names of a tied weight, the
    graph may have another than the report.

    Returns:
        The layers stored as int8, by the names of their weights in the graph.

    Raises:
        ValueError: a layer's weight is not an initializer of its name, but one of another name may be it; or weights of float16
            or bfloat16 in a graph of an opset that has no such scales.
    """
    from onnx import helper

    places = {one.name: place for place, one in enumerate(proto.graph.initializer)}
    renamed = [sorted(one.dims) for one in proto.graph.initializer if one.name not in weights]
    tied, own = tied_names(weights), {layer.parameter for layer in report}
    nodes, written = [], {}
    for layer in report:
        present = [name for name in tied[layer.parameter] if name in places]
        if not present:
            if sorted(weights[layer.parameter].shape) in renamed:
                raise ValueError(f"{layer.name}: the exported graph has no initializer named {layer.parameter}")
            continue
        weight = weights[layer.parameter]
        opset = next(one.version for one in proto.opset_import if one.domain in ("", "ai.onnx"))
        if weight.dtype != torch.float32 and opset < OPSET_OF_HALF_SCALES:
            raise ValueError(
                f"{layer.name} is {_name(weight.dtype)}, but this version of torch writes opset {opset}, in which int8 "
                f"weights are dequantised to float32 only; {REMEDY}"
            )
        # The products after it take operands of one dtype.
        stored, scale = stored_values(weight, layer), layer.scale.flatten().to(weight.dtype)
        for name in present:
            if name in own and name != layer.parameter:
                continue  # a layer of the report in its own right
            written[name], result = layer, f"{name}_dequantized"
            for node in proto.graph.node:
                for place, given in enumerate(node.input):
                    if given == name:
                        node.input[place] = result
            proto.graph.initializer[places[name]].CopyFrom(initializer(name, stored))
            extra = {f"{name}_scale": scale, f"{name}_zero_point": torch.zeros(len(scale), dtype=torch.int8)}
            proto.graph.initializer.extend(initializer(key, value) for key, value in extra.items())
            axis = CHANNEL_AXIS[layer.layout.kind]
            nodes.append(
                helper.make_node("DequantizeLinear", [name, *extra], [result], name=f"{name}_DequantizeLinear", axis=axis)
            )
    others = [one for one in proto.graph.value_info if one.name not in written]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(others)
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    return written


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
