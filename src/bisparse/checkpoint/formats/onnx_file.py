"""Reads ONNX models: initializers and constants, including those of nested graphs, and how the graph multiplies by each.

TensorRT looks for 2:4 along the reduction axis of the weights of MatMul, Gemm and Conv, as the GEMM does; ConvTranspose sums over
its input channels, the first axis of its weight. A weight reaches these nodes directly or through nodes that keep its zeros:
Identity, Cast, Transpose, and DequantizeLinear with a zero point of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bisparse.checkpoint.input_file import InputFile, open_input
from bisparse.checkpoint.stored_tensor import DTYPES, FileTensor, StoredTensor
from bisparse.errors import CheckpointError, install_extra
from bisparse.tiles import Layout, LayoutKind

__all__ = ["read_onnx"]

CODES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32", 13: "U64",
    14: "C64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ",
}  # fmt: skip
"""Names in safetensors of those data types of onnx.TensorProto that it has."""
KEEPS_ZEROS = ("Identity", "Cast", "DequantizeLinear", "Transpose")
EXTERNAL = 1


@dataclass(frozen=True)
class _Bytes:
    """The data of an initializer inside the model file."""

    data: bytes

    def read(self, offset: int, length: int, tensor: str = "") -> bytearray:
        """`length` bytes from `offset` on."""
        return bytearray(self.data[offset : offset + length])


def read_onnx(file: InputFile) -> tuple[dict[str, StoredTensor], tuple[InputFile, ...]]:
    """(the initializers of an ONNX model, each with the layout of its product or why there is none, the files that were read).

    Raises:
        CheckpointError: the onnx package is missing, the model is damaged, or its external data is not in its folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise CheckpointError(file.path, "is an ONNX model, which needs the onnx package", install_extra("onnx")) from error
    try:
        model = onnx.load_model_from_string(bytes(file.read(0, file.size)))
    except (DecodeError, ValueError) as error:
        raise CheckpointError(file.path, f"is truncated or no ONNX model ({error})", "fetch or export it again") from error
    reading = _Reading(file)
    try:
        reading.read(model.graph, {}, "")
    except ValueError as error:  # attributes or data that do not fit their node or shape
        raise CheckpointError(file.path, f"is damaged or no valid ONNX model ({error})", "fetch or export it again") from error
    return reading.named(), (file, *reading.external.values())


Place = tuple[str, bool]
"""The name of a tensor, and whether a value of the graph is its transpose."""


class _Reading:
    """A pass over a graph and its nested graphs, whose nodes are in topological order."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.external: dict[Path, InputFile] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.found: dict[str, Layout | str] = {}

    def named(self) -> dict[str, StoredTensor]:
        """The tensors, each with the layout of its product, or why there is none."""
        unused = "no MatMul, Gemm, Conv or ConvTranspose multiplies by it"
        return {
            name: replace(tensor, operand=self.found.get(name, unused) if len(tensor.shape) >= 2 else None)
            for name, tensor in self.tensors.items()
        }

    def read(self, graph: Any, outer: Mapping[str, Place], prefix: str) -> None:
        """Add a graph's initializers and constants, and the products of its nodes with them and with those of outer graphs."""
        scope = dict(outer)
        for initializer in graph.initializer:
            self._add(initializer, initializer.name, scope, prefix)
        for node in graph.node:
            if node.op_type == "Constant" and len(node.output) == 1:
                value = _attribute(node, "value", None)
                if value is not None:
                    self._add(value, node.output[0], scope, prefix)
            elif node.op_type in KEEPS_ZEROS and node.input and node.output and node.input[0] in scope:
                self._follow(node, scope)
            for given, layout in _multiplied(node, scope, self.tensors):
                if isinstance(before := self.found.get(given), Layout) and before != layout:
                    layout = f"multiplied by in two ways: as {before} and as {layout}"
                self.found[given] = layout
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                    self.read(inner, scope, f"{prefix}{node.name or next(iter(node.output), node.op_type)}.{attribute.name}.")

    def _add(self, initializer: Any, value: str, scope: dict[str, Place], prefix: str) -> None:
        name = value if value not in self.tensors else f"{prefix}{value}"
        if name in self.tensors:
            raise CheckpointError(self.file.path, "is there twice", "export it again", tensor=name)
        if (stored := _stored(initializer, name, self.file, self.external)) is not None:
            self.tensors[name] = stored
            scope[value] = (name, False)

    def _follow(self, node: Any, scope: dict[str, Place]) -> None:
        """Map the result of a node to its input tensor, if the node keeps zeros."""
        name, transposed = scope[node.input[0]]
        point = scope.get(node.input[2]) if node.op_type == "DequantizeLinear" and len(node.input) > 2 and node.input[2] else None
        if point is not None and bool((self.tensors[point[0]].read().float() != 0).any()):
            self.found[name] = "quantised with a non-zero zero point, so a stored zero is not a zero weight"
        elif point is None and node.op_type == "DequantizeLinear" and len(node.input) > 2 and node.input[2]:
            self.found[name] = "quantised with a zero point that the graph computes"
        elif node.op_type != "Transpose":
            scope[node.output[0]] = (name, transposed)
        elif len(self.tensors[name].shape) == 2 and _attribute(node, "perm", [1, 0]) == [1, 0]:
            scope[node.output[0]] = (name, not transposed)
        else:
            self.found[name] = "transposed in more than two dimensions before it is multiplied by"


def _stored(initializer: Any, name: str, file: InputFile, external: dict[Path, InputFile]) -> StoredTensor | None:
    shape = tuple(initializer.dims)
    if any(side < 0 for side in shape):
        raise CheckpointError(file.path, f"has the shape {shape}", "export it again", tensor=name)
    code = CODES.get(initializer.data_type)
    if code is None:
        return None  # strings, complex128 and four-bit integers
    if initializer.data_location == EXTERNAL:
        return _external(initializer, name, file, external, code)
    if initializer.HasField("raw_data"):
        data = initializer.raw_data
    else:
        from onnx import numpy_helper

        data = np.ascontiguousarray(numpy_helper.to_array(initializer)).tobytes()
    size = _size(code) * math.prod(shape)
    if len(data) != size:
        raise CheckpointError(
            file.path, f"has {len(data):,} bytes, its shape {shape} needs {size:,}", "export it again", tensor=name
        )
    return FileTensor(name, code, shape, file.path, size, 0, _Bytes(data))


def _external(initializer: Any, name: str, file: InputFile, external: dict[Path, InputFile], code: str) -> StoredTensor:
    shape = tuple(initializer.dims)
    said = {entry.key: entry.value for entry in initializer.external_data}
    location = said.get("location", "")
    size = _size(code) * math.prod(shape)
    offset = int(said.get("offset") or 0) if said.get("offset", "0").isdecimal() else -1
    if Path(location).name != location or not location or offset < 0:
        raise CheckpointError(
            file.path, f"has its data at {location!r}, outside the model's folder", "export it again", tensor=name
        )
    path = file.path.parent / location
    if path not in external:
        external[path] = open_input(path)
    if offset + size > external[path].size:
        raise CheckpointError(path, "ends before the data of a tensor", "fetch it again", tensor=name)
    return FileTensor(name, code, shape, path, size, offset, external[path])


def _size(code: str) -> int:
    return DTYPES[code].itemsize


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _multiplied(node: Any, scope: Mapping[str, Place], tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Layout | str]]:
    """Yield the initializers that a node multiplies by, and their layouts."""
    rules: dict[str, Callable[[int], bool | None]] = {
        # Whether the operand is stored as (O, I). The first factor of a MatMul is (O, I), the second (I, O).
        "MatMul": lambda place: place == 0,
        "Gemm": lambda place: (
            None if place > 1 else not _attribute(node, "transA", 0) if place == 0 else bool(_attribute(node, "transB", 0))
        ),
    }
    for place, given in enumerate(node.input):
        if given not in scope:
            continue
        name, transposed = scope[given]
        shape = tensors[name].shape
        if node.op_type in rules:
            if len(shape) != 2:
                if len(shape) > 2 and place < 2:
                    yield name, f"a batch of matrices of {len(shape)} dimensions: not supported"
                continue
            outputs_first = rules[node.op_type](place)
            if outputs_first is not None:
                yield name, Layout(LayoutKind.LINEAR if outputs_first != transposed else LayoutKind.TRANSPOSED)
        elif node.op_type == "Conv" and place == 1 and len(shape) in (3, 4, 5) and not transposed:
            groups = int(_attribute(node, "group", 1))
            if shape[1] == 1 and groups > 1:
                yield name, "depthwise convolution: one input channel per filter, no reduction to make sparse"
            elif groups < 1 or shape[0] % groups:
                yield name, f"a convolution of {groups} groups, which do not divide its {shape[0]} outputs"
            else:
                yield name, replace(Layout(LayoutKind.CONV), groups=groups)
        elif node.op_type == "ConvTranspose" and place == 1 and len(shape) in (3, 4, 5) and not transposed:
            groups = int(_attribute(node, "group", 1))
            if groups == shape[0]:
                yield name, "depthwise convolution: one input channel per filter, no reduction to make sparse"
            elif groups < 1 or shape[0] % groups:
                yield name, f"a transposed convolution of {groups} groups, which do not divide its {shape[0]} inputs"
            else:
                yield name, replace(Layout(LayoutKind.CONV_TRANSPOSED), groups=groups)
        elif node.op_type in ("LSTM", "GRU", "RNN") and place in (1, 2):
            yield name, f"recurrent layer ({node.op_type}): not supported"
        elif node.op_type in ("Gather", "GatherElements") and place == 0:
            yield name, "embedding: looked up, not multiplied"
