"""ONNX models: their initializers, and as what the graph multiplies by each.

TensorRT looks for 2:4 along the reduction axis of the initializers of MatMul, Gemm and Conv, as the GEMM does. An initializer
reaches these nodes directly or through nodes that keep its zeros: Identity, Cast, Transpose, and
DequantizeLinear with a zero point of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bisparse.checkpoint.input_file import InputFile, open_input
from bisparse.checkpoint.stored_tensor import DTYPES, FileTensor, StoredTensor
from bisparse.errors import CheckpointError
from bisparse.tiles import Layout, LayoutKind

__all__ = ["read_onnx"]

CODES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32", 13: "U64",
    14: "C64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ",
}  # fmt: skip
"""safetensors' name of each of onnx.TensorProto's data types that it has too."""
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
    """An ONNX model's initializers, each with the layout in which it is multiplied by or why it is not, and the files read.

    Raises:
        CheckpointError: the onnx package is missing, the model is damaged, or its external data is not in its folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise CheckpointError(
            file.path, "is an ONNX model, which needs the onnx package", "pip install 'bisparse[onnx]'"
        ) from error
    try:
        model = onnx.load_model_from_string(bytes(file.read(0, file.size)))
    except (DecodeError, ValueError) as error:
        raise CheckpointError(file.path, f"is truncated or no ONNX model ({error})", "fetch or export it again") from error
    tensors: dict[str, StoredTensor] = {}
    external: dict[Path, InputFile] = {}
    for initializer in model.graph.initializer:
        if (stored := _stored(initializer, file, external)) is not None:
            tensors[initializer.name] = stored
    operands = _operands(model.graph, tensors)
    said = {name: replace(tensor, operand=operands.get(name)) for name, tensor in tensors.items()}
    return said, (file, *external.values())


def _stored(initializer: Any, file: InputFile, external: dict[Path, InputFile]) -> StoredTensor | None:
    name, shape = initializer.name, tuple(initializer.dims)
    code = CODES.get(initializer.data_type)
    if code is None:
        return None  # strings, complex128 and four-bit integers
    if initializer.data_location == EXTERNAL:
        return _external(initializer, file, external, code)
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


def _external(initializer: Any, file: InputFile, external: dict[Path, InputFile], code: str) -> StoredTensor:
    name, shape = initializer.name, tuple(initializer.dims)
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


def _operands(graph: Any, tensors: dict[str, StoredTensor]) -> dict[str, Layout | str]:
    """For each initializer of two or more dimensions the layout in which it is multiplied by, or why it is no layer's weight."""
    source: dict[str, tuple[str, bool]] = {name: (name, False) for name in tensors}
    found: dict[str, Layout | str] = {
        name: "no MatMul, Gemm or Conv multiplies by it" for name, tensor in tensors.items() if len(tensor.shape) >= 2
    }
    for node in graph.node:
        if node.op_type in KEEPS_ZEROS and node.input and node.input[0] in source:
            name, transposed = source[node.input[0]]
            reason = _loses_zeros(node, tensors)
            if reason is not None:
                found[name] = reason
                continue
            swaps = node.op_type == "Transpose" and _permutation(node, len(tensors[name].shape)) == [1, 0]
            if node.op_type == "Transpose" and not swaps:
                found[name] = "transposed in more than two dimensions before it is multiplied by"
                continue
            source[node.output[0]] = (name, transposed != swaps)
    for node in graph.node:
        for name, layout in _multiplied(node, source, tensors):
            if name in found and isinstance(found[name], Layout) and found[name] != layout:
                layout = f"multiplied by in two ways: as {found[name]} and as {layout}"
            if name in found:
                found[name] = layout
    return found


def _loses_zeros(node: Any, tensors: dict[str, StoredTensor]) -> str | None:
    """Why a stored zero is no zero after a node; None if it is."""
    if node.op_type != "DequantizeLinear" or len(node.input) < 3 or not node.input[2]:
        return None
    point = tensors.get(node.input[2])
    if point is None or point.torch_dtype is None or bool((point.read().float() != 0).any()):
        return "quantised with a zero point that is not zero: a stored zero is no zero of the weight"
    return None


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _permutation(node: Any, dimensions: int) -> list[int]:
    return list(_attribute(node, "perm", range(dimensions - 1, -1, -1)))


def _multiplied(
    node: Any, source: dict[str, tuple[str, bool]], tensors: dict[str, StoredTensor]
) -> Iterator[tuple[str, Layout | str]]:
    """The initializers that a node multiplies by, and how."""
    rules: dict[str, Callable[[int], bool | None]] = {
        # Whether the operand is stored as (O, I). The second factor of a MatMul is (I, O), the first (O, I).
        "MatMul": lambda place: place == 0,
        "Gemm": lambda place: (
            None if place > 1 else not _attribute(node, "transA", 0) if place == 0 else bool(_attribute(node, "transB", 0))
        ),
    }
    for place, given in enumerate(node.input):
        if given not in source:
            continue
        name, transposed = source[given]
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
                yield name, "depthwise convolution: one input channel a filter, no reduction to make sparse"
            elif groups < 1 or shape[0] % groups:
                yield name, f"a convolution of {groups} groups, which do not divide its {shape[0]} outputs"
            else:
                yield name, replace(Layout(LayoutKind.CONV), groups=groups)
        elif node.op_type == "ConvTranspose" and place == 1:
            yield name, "transposed convolution: not supported"
        elif node.op_type in ("LSTM", "GRU", "RNN") and place in (1, 2):
            yield name, f"recurrent layer ({node.op_type}): not supported"
        elif node.op_type in ("Gather", "GatherElements") and place == 0:
            yield name, "embedding: looked up, not multiplied"
