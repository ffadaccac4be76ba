"""ONNX models: each initializer is verified along the axis on which the graph sums."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import CheckpointError, detect_patterns, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source

onnx = pytest.importorskip("onnx")


def model(nodes: list[Any], initializers: dict[str, np.ndarray], opset: int = 21) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(kind: str, *inputs: str, out: str = "y", **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, list(inputs), [out], **attributes)


def sparse(*shape: int) -> Tensor:
    """2:4 along the second dimension, and along no other."""
    weight = torch.rand(shape) + 0.5
    return weight * bisparse.solve(weight, "2:4").mask


LINEAR = sparse(32, 16)  # (O, I)
CONV = sparse(16, 8, 3, 3)


@pytest.mark.parametrize(
    ("nodes", "weight"),
    [
        ([("MatMul", "x", "w")], LINEAR.t()),
        ([("MatMul", "w", "x")], LINEAR),
        ([("Gemm", "x", "w", "b", {"transB": 1})], LINEAR),
        ([("Gemm", "x", "w", "b", {})], LINEAR.t()),
        ([("Gemm", "w", "x", "b", {})], LINEAR),
        ([("Gemm", "w", "x", "b", {"transA": 1})], LINEAR.t()),
        ([("Transpose", "w", {"perm": [1, 0]}), ("MatMul", "x", "_0")], LINEAR),
        ([("Identity", "w", {}), ("Transpose", "_0", {}), ("MatMul", "x", "_1")], LINEAR),
        ([("Cast", "w", {"to": 10}), ("MatMul", "x", "_0")], LINEAR.t()),
        ([("Conv", "x", "w")], CONV),
        ([("ConvTranspose", "x", "w")], CONV.transpose(0, 1)),
        ([("ConvTranspose", "x", "w", {"group": 2})], torch.cat([CONV, CONV.roll(1, 0)], 1).transpose(0, 1)),
    ],
)
def test_the_axis_of_the_reduction_is_the_graphs(tmp_path: Path, nodes: list[Any], weight: Tensor) -> None:
    made = []
    for number, (kind, *inputs) in enumerate(nodes):
        attributes = inputs.pop() if isinstance(inputs[-1], dict) else {}
        made.append(node(kind, *inputs, out=f"_{number}", **attributes))
    for number, (values, holds) in enumerate([(weight, True), (weight.flip(0).roll(1, 0) * 0 + 1, False)]):
        path = tmp_path / f"{number}.onnx"
        onnx.save(model(made, {"w": values.contiguous().numpy(), "b": np.zeros(32, np.float32)}), path)
        assert bool(verify_checkpoint(path, "2:4")) == holds
    (detected,) = detect_patterns(tmp_path / "0.onnx")
    assert "2:4" in map(str, detected.notable) and "2:4-T" not in map(str, detected.notable) and detected.layer == "w"


def test_what_no_gemm_multiplies_by_is_no_layer(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x", "w", out="a"), node("Add", "a", "table", out="b"), node("Gather", "vocabulary", "ids", out="c"),
        node("Conv", "image", "depthwise", out="d", group=8), node("ConvTranspose", "image", "up", out="e", group=8),
        node("MatMul", "x", "both", out="f"), node("Gemm", "x", "both", out="g", transB=1),
        node("LSTM", "x", "lstm", "lstm", out="h"),
    ]  # fmt: skip
    dense = {
        "table": (8, 32), "vocabulary": (50, 16), "depthwise": (8, 1, 3, 3), "up": (8, 8, 2, 2), "both": (16, 16),
        "lstm": (1, 64, 16),
    }  # fmt: skip
    values = {name: np.ones(shape, np.float32) for name, shape in dense.items()}
    onnx.save(model(nodes, {"w": LINEAR.t().contiguous().numpy(), **values}), tmp_path / "m.onnx")
    result = verify_checkpoint(tmp_path / "m.onnx", "2:4")
    assert result and [one.layer for one in result.layers] == ["w"]
    said = {name: tensor.operand for name, tensor in open_source(tmp_path / "m.onnx").tensors.items()}
    assert "looked up" in said["vocabulary"] and "depthwise" in said["depthwise"] and "depthwise" in said["up"]
    assert "two ways" in said["both"] and "LSTM" in said["lstm"] and "no MatMul" in said["table"]


def test_heads_and_embeddings_are_left_out_by_name_as_in_other_files(tmp_path: Path) -> None:
    layers = [f"model.layers.0.{name}.weight" for name in ("q_proj", "up_proj")]
    untied = [node("Gather", "model.embed_tokens.weight", "ids", out="a"), node("Gemm", "a", layers[0], out="b", transB=1)]
    untied += [node("Gemm", "b", layers[1], out="c", transB=1), node("Gemm", "c", "lm_head.weight", transB=1)]
    tied = [*untied[:3], node("Gemm", "c", "model.embed_tokens.weight", transB=1)]
    for nodes, dense in ((untied, ["model.embed_tokens", "lm_head"]), (tied, ["model.embed_tokens"])):
        values = {name: sparse(16, 16).numpy() for name in layers}
        path = tmp_path / f"{len(dense)}.onnx"
        onnx.save(model(nodes, {**values, **{f"{name}.weight": np.ones((40, 16), np.float32) for name in dense}}), path)
        result = verify_checkpoint(path, "2:4")
        assert result and {one.layer for one in result.layers} == {name.removesuffix(".weight") for name in layers}
        assert result.unchecked == () and {one.name for one in result.left_out} == set(dense)
        assert not verify_checkpoint(path, "2:4", include=dense[-1])


@pytest.mark.parametrize(("point", "holds"), [(0, True), (3, False)])
def test_a_zero_point_that_is_not_zero_makes_zeros_unknown(tmp_path: Path, point: int, holds: bool) -> None:
    nodes = [node("DequantizeLinear", "w", "scale", "point", out="d"), node("MatMul", "x", "d")]
    quantized = (LINEAR.t() * 20).round().to(torch.int8).contiguous().numpy()
    values = {"w": quantized, "scale": np.array(0.05, np.float32), "point": np.array(point, np.int8)}
    onnx.save(model(nodes, values), tmp_path / "m.onnx")
    said = open_source(tmp_path / "m.onnx").tensors["w"].operand
    assert isinstance(said, str) != holds and (holds or "zero point" in str(said))


def test_constants_and_the_graphs_inside_a_graph_are_read(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    def branch(values: Tensor, name: str) -> Any:
        out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        weight = numpy_helper.from_array(values.contiguous().numpy(), "w")
        inner = helper.make_graph([node("MatMul", "x", "w", out=name)], "g", [], out, [weight])
        return inner

    constant = numpy_helper.from_array(LINEAR.numpy())
    nodes = [
        node("Constant", out="c", value=constant), node("MatMul", "c", "x", out="a"), node("MatMul", "outer", "x", out="b"),
        node("If", "x", out="y", then_branch=branch(LINEAR.t(), "t"), else_branch=branch(torch.ones(16, 32), "e")),
    ]  # fmt: skip
    onnx.save(model(nodes, {"outer": LINEAR.numpy()}), tmp_path / "m.onnx")
    result = verify_checkpoint(tmp_path / "m.onnx", "2:4")
    inner = {"w", "y.then_branch.w", "y.else_branch.w"}
    held = {one.layer: bool(one) for one in result.layers}
    assert held["outer"] and held["c"] and len(held) == 4 and held.keys() - {"outer", "c"} < inner
    assert sorted(ok for name, ok in held.items() if name in inner) == [False, True]
    assert result.violations == 16 // 4 * 32


@pytest.mark.filterwarnings("ignore")
def test_external_data_is_read_where_it_is(tmp_path: Path) -> None:
    proto = model([node("MatMul", "x", "w")], {"w": LINEAR.t().contiguous().numpy(), "other": np.ones((64, 64), np.float32)})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx_data", size_threshold=0)
    assert torch.equal(open_source(tmp_path / "m.onnx").tensors["w"].read().view(16, 32), LINEAR.t())
    assert verify_checkpoint(tmp_path / "m.onnx", "2:4")
    data = tmp_path / "m.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="ends before the data"):
        verify_checkpoint(tmp_path / "m.onnx", "2:4")
    data.unlink()
    with pytest.raises(CheckpointError, match=r"m\.onnx_data cannot be read"):
        verify_checkpoint(tmp_path / "m.onnx", "2:4")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/b", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    proto = model([node("MatMul", "x", "w")], {"w": LINEAR.t().contiguous().numpy()})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        verify_checkpoint(tmp_path / "m.onnx", "2:4")


def test_an_onnx_model_is_not_pruned_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model([node("MatMul", "x", "w")], {"w": LINEAR.t().contiguous().numpy()}), path)
    with pytest.raises(CheckpointError, match=r"is an ONNX model: it can be verified, but not pruned"):
        prune_checkpoint(path, tmp_path / "out", "2:4")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="truncated or no ONNX model"):
        verify_checkpoint(path, "2:4")


def _negative(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [-8, -8]


def _short(made: Any) -> None:
    made.graph.initializer[0].ClearField("raw_data")
    made.graph.initializer[0].float_data.extend([1.0] * 5)


def _group_is_a_text(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [8, 8, 1, 1]
    made.graph.node[0].CopyFrom(node("Conv", "x", "w", group="a"))


def _null(made: Any, location: str = "a\x00") -> None:
    first = made.graph.initializer[0]
    first.ClearField("raw_data")
    first.data_location = 1
    entry = first.external_data.add()
    entry.key, entry.value = "location", location


def _too_long(made: Any) -> None:
    _null(made, "x" * 5000)


@pytest.mark.parametrize("damage", [_negative, _short, _group_is_a_text, _null, _too_long])
def test_values_that_onnx_does_not_allow_are_errors_that_name_the_file(tmp_path: Path, damage: Any) -> None:
    made = model([node("MatMul", "x", "w")], {"w": np.ones((8, 8), np.float32)})
    damage(made)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(CheckpointError, match=r"m\.onnx"):
        verify_checkpoint(tmp_path / "m.onnx", "2:4")


def test_nodes_without_results_are_passed_over(tmp_path: Path) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    nodes = [
        onnx.helper.make_node("If", ["x"], [], then_branch=inner, else_branch=inner),
        onnx.helper.make_node("Identity", ["w"], []),
        node("MatMul", "x", "w"),
    ]
    made = model(nodes, {"w": LINEAR.t().numpy()})
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert verify_checkpoint(tmp_path / "m.onnx", "2:4")


@pytest.mark.filterwarnings("ignore")
def test_a_model_exported_by_torch(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 8, 1))
    bisparse.prune_(network, "2:4", include=["0", "2", "4"])
    path = tmp_path / "m.onnx"
    torch.onnx.export(network.eval(), (torch.randn(2, 16),), path, dynamo=False)
    result = verify_checkpoint(path, "2:4")
    assert result and len(result.layers) == 3
    assert not verify_checkpoint(path, "1:4")
