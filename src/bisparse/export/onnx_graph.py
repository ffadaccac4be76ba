"""Changes to an exported ONNX graph: names of weights and axes, and int8 weights behind DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from bisparse.quantization import QuantizationReport, QuantizedLayer, parse_scheme, stored_values
from bisparse.tiles import LayoutKind

__all__ = ["check_quantizable", "name_axes", "quantize_weights", "rename_weights"]

CHANNEL_AXIS = {LayoutKind.LINEAR: 0, LayoutKind.TRANSPOSED: 1, LayoutKind.CONV: 0}
"""The axis of output channels in a stored weight."""


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


def check_quantizable(report: QuantizationReport) -> None:
    """Raise ValueError if weights cannot be written as int8 behind DequantizeLinear nodes.

    Raises:
        ValueError: a scheme other than int8, or a layer of several matrices.
    """
    for layer in report:
        if parse_scheme(layer.scheme).name != "int8":
            raise ValueError(f"{layer.name} is quantised to {layer.scheme}: ONNX files are written with int8 weights only")
        if layer.layout.kind not in CHANNEL_AXIS or layer.layout.groups > 1:
            raise ValueError(
                f"{layer.name} is stored as {layer.layout}: int8 weights of Linear layers and convolutions without groups are "
                "written; exclude it from the quantisation"
            )


def quantize_weights(proto: Any, report: QuantizationReport, weights: Mapping[str, Tensor]) -> dict[str, QuantizedLayer]:
    """Store quantised layers' weights as int8, with a scale per channel and zero point 0, and dequantise them in the graph.

    A layer that no output depends on, such as a pooler, is not in the graph, and is left out.

    Returns:
        The layers stored as int8, by the names of their weights.

    Raises:
        ValueError: a layer's weight is not an initializer of its name, but one of another name may be it.
    """
    from onnx import helper, numpy_helper

    places = {one.name: place for place, one in enumerate(proto.graph.initializer)}
    renamed = [sorted(one.dims) for one in proto.graph.initializer if one.name not in weights]
    nodes, written = [], {}
    for layer in report:
        if layer.parameter not in places:
            if sorted(weights[layer.parameter].shape) in renamed:
                raise ValueError(f"{layer.name}: the exported graph has no initializer named {layer.parameter}")
            continue
        written[layer.parameter] = layer
        stored, scale = _stored(weights[layer.parameter], layer)
        name, result = layer.parameter, f"{layer.parameter}_dequantized"
        for node in proto.graph.node:
            for place, given in enumerate(node.input):
                if given == name:
                    node.input[place] = result
        proto.graph.initializer[places[name]].CopyFrom(numpy_helper.from_array(stored, name))
        extra = {f"{name}_scale": scale, f"{name}_zero_point": np.zeros(len(scale), dtype=np.int8)}
        proto.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in extra.items())
        axis = CHANNEL_AXIS[layer.layout.kind]
        nodes.append(helper.make_node("DequantizeLinear", [name, *extra], [result], name=f"{name}_DequantizeLinear", axis=axis))
    others = [one for one in proto.graph.value_info if one.name not in written]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(others)
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    return written


def _stored(weight: Tensor, layer: QuantizedLayer) -> tuple[Shaped[np.ndarray, "..."], Shaped[np.ndarray, " O"]]:
    stored = stored_values(weight, layer).cpu().numpy()
    return stored, layer.scale.flatten().float().cpu().numpy()
