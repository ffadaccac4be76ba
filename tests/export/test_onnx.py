"""ONNX files have the model's weights and outputs, at any batch size and length, and are verified on the file."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import CheckpointError, verify_checkpoint
from bisparse.checkpoint.reader import open_source
from bisparse.export import export_onnx
from bisparse.quantization import quantize_
from bisparse.verification import PatternError

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("operators_listed_once")


class Network(nn.Module):
    """A convolution with a batch norm behind it, which exporters like to merge, and Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu())).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


def network() -> tuple[nn.Module, dict[str, str]]:
    torch.manual_seed(0)
    model = Network().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2)
    return model, {one.name: one.pattern for one in bisparse.prune_(model, "2:4")}


def run(path: Path, **inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: one.numpy() for name, one in inputs.items()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
def test_a_network_has_equal_weights_and_outputs(tmp_path: Path, quantised: bool) -> None:
    model, patterns = network()
    done = quantize_(model, "int8") if quantised else None
    made = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 12, 12), pattern=patterns, quantized=done)
    assert made.verified == {"2:4": len(patterns)} and made.unmatched == ()
    assert made.difference is not None and made.difference < 1e-5 < 1e-2 < (made.largest or 0)
    images = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(run(made.path, input=images), model(images), atol=1e-5)
    tensors = open_source(made.path).tensors
    for name in ("conv.weight", "hidden.weight"):
        weight, stored = model.state_dict()[name], tensors[name]
        assert stored.dtype == ("I8" if quantised else "F32")
        assert torch.equal(stored.read().view(stored.shape) == 0, weight == 0)
    assert verify_checkpoint(made.path, "2:4", include=list(patterns))
    if quantised:
        kinds = [node.op_type for node in onnx.load(made.path).graph.node]
        assert done is not None and kinds.count("DequantizeLinear") == len(done)


@pytest.mark.parametrize("kind", ["network", "sequence"])
def test_int8_inputs_are_rounded_by_their_largest_magnitude(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "network":
        model, patterns = network()
        examples = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    else:  # three dimensions, which the exporter writes as MatMul
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
        patterns = {one.name: one.pattern for one in bisparse.prune_(model, "2:4", include=["0", "2"])}
        examples = [torch.randn(4, 5, 16) for _ in range(3)]
    done = quantize_(model, "int8")
    made = export_onnx(model, tmp_path / "m.onnx", examples[0], pattern=patterns, quantized=done, int8_inputs=examples)
    assert made.int8_inputs == len(done) and made.difference is not None and made.difference < 1e-4 < (made.largest or 0)
    initializers = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(made.path).graph.initializer}
    scales = sorted(float(one) for name, one in initializers.items() if name.endswith("_scale") and one.ndim == 0)
    seen: dict[str, float] = {}
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, given, name=layer.name: seen.update({name: max(seen.get(name, 0.0), float(given[0].abs().max()))})
        )
        for layer in done
    ]
    with torch.no_grad():
        for one in examples:
            model(one)
    for handle in handles:
        handle.remove()
    assert scales == pytest.approx(sorted(most / 127 for most in seen.values()), rel=1e-6)
    kinds = [node.op_type for node in onnx.load(made.path).graph.node]
    assert kinds.count("QuantizeLinear") == len(done) and kinds.count("DequantizeLinear") == 2 * len(done)
    exact = run(made.path, input=examples[0])
    with torch.no_grad():
        assert 0 < float((exact - model(examples[0])).abs().max()) < 0.1 * float(exact.abs().max())


class ByKeyword(nn.Module):
    """A layer whose input is passed by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(input=x)


def test_inputs_that_are_passed_by_keyword_are_rounded_to_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = ByKeyword().eval(), torch.randn(4, 32)
    done = quantize_(model, "int8", include="a")
    made = export_onnx(model, tmp_path / "m.onnx", x, quantized=done, int8_inputs=[x])
    assert made.int8_inputs == 1 and made.difference is not None and made.difference < 1e-5
    with torch.no_grad():
        assert 0 < float((run(made.path, input=x) - model(x)).abs().max()) < 0.1


class Tied(nn.Module):
    """Two layers with one weight, of which the second has much larger inputs, and a head that is tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.a, self.b, self.head = (nn.Linear(32, side, bias=False) for side in (32, 32, 48))
        self.b.weight = self.a.weight
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embedding(ids)) * 100.0))


def test_tied_weights_are_int8_under_the_name_that_the_graph_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    done = quantize_(model, "int8", include=["a", "head"])
    ids = torch.randint(0, 48, (2, 7))
    for given in (None, [ids]):
        made = export_onnx(model, tmp_path / "m.onnx", ids, quantized=done, int8_inputs=given, overwrite=True)
        graph = onnx.load(made.path).graph
        assert {one.data_type for one in graph.initializer if len(one.dims) == 2} == {onnx.TensorProto.INT8}
        assert made.unmatched == () and made.int8_inputs == (0 if given is None else 2)
        assert made.difference is not None and made.difference < 1e-4 * (made.largest or 0)
    with torch.no_grad():
        most = float((model.a(model.embedding(ids)) * 100.0).abs().max())
    scales = [float(onnx.numpy_helper.to_array(one)) for one in graph.initializer if "_scale" in one.name and not one.dims]
    assert pytest.approx(most / 127, rel=1e-5) in scales  # the range has the inputs of both layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_weights_and_inputs_are_dequantised_to_the_dtype_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype).eval()
    images = torch.randn(4, 32).to(dtype)
    done = quantize_(model, "int8")
    for given in (None, [images]):
        made = export_onnx(model, tmp_path / "m.onnx", images, quantized=done, int8_inputs=given, overwrite=True)
        onnx.checker.check_model(str(made.path), full_check=True)
        scales = [one for one in onnx.load(made.path).graph.initializer if one.name.endswith("_scale")]
        meant = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
        assert len(scales) == (1 if given is None else 2) * len(done) and {one.data_type for one in scales} == {meant}
        if dtype == torch.float16:  # onnxruntime has no products of bfloat16 on CPUs
            assert made.difference is not None and made.difference < 0.01 < (made.largest or 0)


def test_a_graph_that_onnx_does_not_allow_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).double().eval()
    with pytest.raises(ValueError, match=r"is float64, .* convert the model to float32"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 32).double(), quantized=quantize_(model, "int8"))
    model = nn.Sequential(nn.Conv2d(4, 4, 1)).bfloat16().eval()
    with pytest.raises(ValueError, match="not valid ONNX; convert the model to float32"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 3, 3).bfloat16(), dynamic_axes={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "has no examples"),
        ([torch.full((2, 16), torch.nan)], "NaN or infinite"),
        ([torch.randn(2, 3)], "cannot be multiplied"),
    ],
)
def test_int8_inputs_that_give_no_range_are_refused(tmp_path: Path, examples: list[Tensor], message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    done = quantize_(model, "int8")
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 16), quantized=done, int8_inputs=examples)
    with pytest.raises(ValueError, match="needs quantized="):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 16), int8_inputs=examples)
    assert not list(tmp_path.iterdir()) and not model[0]._forward_pre_hooks


def test_the_pattern_of_every_layer_that_prune_takes_by_default_is_checked_or_said_not_to_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 16, 1)
    model = nn.Sequential(*convolutions, nn.Flatten(2), nn.LSTM(64, 8)).eval()
    patterns = {one.name: one.pattern for one in bisparse.prune_(model, "2:4")}
    assert {"1", "3", "5.weight_ih_l0"} <= set(patterns)
    made = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 6, 6), pattern=patterns, dynamic_axes={})
    assert made.verified == {"2:4": 2}
    assert {one.name for one in made.unverified} == {name for name in patterns if name.startswith("5")}


def test_one_pattern_is_checked_for_the_layers_that_prune_takes_by_default(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*convolutions, nn.Linear(32, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    model[6].weight = model[5].weight  # the graph may have either name
    done = bisparse.prune_(model, "2:4")
    assert "0" not in {one.name for one in done}
    made = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 8, 8), pattern="2:4")
    assert made.verified == {"2:4": len(done)} and made.unverified == ()


class Unused(nn.Module):
    """A network with a layer that its output does not depend on, like BERT's pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.pooler, self.out = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.hidden(x).relu()
        return self.out(x), self.pooler(x)


def test_a_layer_that_no_output_depends_on_is_left_out_and_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Unused().eval()
    bisparse.prune_(model, "2:4", include=["hidden", "pooler"])
    done = quantize_(model, "int8", include=["hidden", "pooler"])
    made = export_onnx(
        model, tmp_path / "model.onnx", torch.randn(2, 16), pattern={"hidden": "2:4", "pooler": "2:4"}, quantized=done
    )
    assert "pooler.weight" in made.unmatched and made.verified == {"2:4": 1}
    stored = {name for name, tensor in open_source(made.path).tensors.items() if tensor.dtype == "I8"}
    assert stored == {"hidden.weight", "hidden.weight_zero_point"}


def test_an_initializer_that_may_be_the_weight_under_another_name_is_an_error() -> None:
    from onnx import helper, numpy_helper

    from bisparse.export.onnx_graph import quantize_weights

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    done = quantize_(model, "int8", include="0")
    weight = model[0].weight.detach()
    given, made = (helper.make_tensor_value_info(name, 1, None) for name in ("x", "y"))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "val_0"], ["y"])],
        "g",
        [given],
        [made],
        [numpy_helper.from_array(weight.T.numpy(), "val_0")],
    )
    with pytest.raises(ValueError, match=r"no initializer named 0\.weight"):
        quantize_weights(helper.make_model(graph), done, {"0.weight": weight})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_transformer_takes_any_batch_and_length(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False).eval()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    patterns = {one.name: one.pattern for one in bisparse.prune_(model, "2:4")}
    ids = torch.randint(0, 96, (2, 9))
    made = export_onnx(model, tmp_path / "m.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pattern=patterns)
    assert made.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert made.verified == {"2:4": len(patterns)} and made.difference is not None and made.difference < 1e-4
    for batch, length in ((1, 1), (3, 30)):
        ids = torch.randint(0, 96, (batch, length))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            meant = model(input_ids=ids, attention_mask=mask)[0]
        assert torch.allclose(run(made.path, input_ids=ids, attention_mask=mask), meant, atol=1e-4)


@pytest.mark.slow
def test_a_weight_that_breaks_its_pattern_leaves_no_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    bisparse.prune_(model, "2:4")
    with torch.no_grad():
        model[0].weight[3] = 1
    with pytest.raises(PatternError, match="2:4"):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 16), pattern="2:4")
    assert not list(tmp_path.iterdir())


def test_refusals_come_before_anything_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("the graph is traced"))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    (tmp_path / "there.onnx").write_text("x")
    for bad in (
        tmp_path / f"{'n' * 300}.onnx",
        tmp_path.joinpath(*99 * ["long" * 20], "m.onnx"),
        tmp_path / "there.onnx" / "m.onnx",
    ):
        with pytest.raises(CheckpointError):
            export_onnx(model, bad, torch.randn(2, 32))
    with pytest.raises(CheckpointError, match="exists already"):
        export_onnx(model, tmp_path / "there.onnx", torch.randn(2, 32))
    for what, path in {"is a folder": tmp_path, "is a device": Path(os.devnull)}.items():  # overwrite= would not help
        with pytest.raises(ValueError, match=what):
            export_onnx(model, path, torch.randn(2, 32))
    with pytest.raises(ValueError, match="int8 weights only"):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 32), quantized=quantize_(model, "int4-g32"))
    with pytest.raises(ValueError, match="cannot be called with 1 tensors by position"):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 5))
    bisparse.prune_(model, "2:4")
    bisparse.accelerate_(model.bfloat16(), backend="reference")
    with pytest.raises(ValueError, match="finalize_"):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 32, dtype=torch.bfloat16))
    assert [one.name for one in tmp_path.iterdir()] == ["there.onnx"]


def test_a_layer_that_no_example_reaches_has_no_range() -> None:
    from bisparse.export.int8_inputs import input_scales

    torch.manual_seed(0)
    model = Unused().eval()
    report = quantize_(model, "int8", include=["hidden", "pooler"])
    examples = [[torch.randn(2, 16)]]
    weights = {one.parameter: [one.parameter] for one in report}
    with pytest.raises(ValueError, match=r"pooler\.weight: no example of int8_inputs reaches the layer"):
        input_scales(model, weights, examples, lambda x: model.out(model.hidden(x)))
    assert set(input_scales(model, weights, examples, model)) == {"hidden.weight", "pooler.weight"}


def test_axes_that_no_input_has_and_examples_without_elements_are_refused(tmp_path: Path) -> None:
    layer, x, path = nn.Linear(8, 4), torch.randn(3, 8), tmp_path / "model.onnx"
    for axes in ({"inputs": {0: "batch"}}, {"input": {2: "batch"}}, {"input": {-2: "batch"}}):
        with pytest.raises(ValueError, match="dynamic_axes"):
            export_onnx(layer, path, x, dynamic_axes=axes)
    with pytest.raises(ValueError, match="no elements"):
        export_onnx(layer, path, x[:0])
    assert not os.listdir(tmp_path)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


def test_an_input_without_axes_has_no_batch(tmp_path: Path) -> None:
    model, x = Scaled(), torch.randn(3, 8)
    export_onnx(model, tmp_path / "model.onnx", {"x": x, "scale": torch.tensor(2.0)})
    found = run(tmp_path / "model.onnx", x=x[:2], scale=torch.tensor(3.0))
    assert torch.allclose(found, model(x[:2], torch.tensor(3.0)), atol=1e-5)


class Half(nn.Module):
    """Its exported form differs: onnxruntime is given a logarithm of negative numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 1).log() if torch.compiler.is_exporting() else x


def test_outputs_that_are_nan_in_the_file_alone_do_not_pass_for_equal_ones(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), Half())
    assert export_onnx(model, tmp_path / "model.onnx", torch.randn(3, 8)).difference == float("inf")


def test_a_weight_with_nan_is_exported_with_its_bits(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    made = export_onnx(model, tmp_path / "model.onnx", torch.randn(3, 8))
    assert made.weights == 1 and made.difference is not None and made.difference < 1e-5
