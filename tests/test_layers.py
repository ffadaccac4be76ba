"""Which layers are found, which are left dense, and that every one of those has its reason."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bisparse
from bisparse import Pattern, verify
from bisparse.layers import Layer, Skipped, find_layers, head_reason, matches, parse_layout
from bisparse.tiles import Layout, LayoutKind, to_matrices


class Transformer(nn.Module):
    """The names that models of transformers have, small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 16), "norm": nn.LayerNorm(8)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(8, 10, bias=False)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.bias = nn.Parameter(torch.randn(3, 8))


def found(model: nn.Module, **choice: object) -> dict[str, Layer]:
    layers, _ = find_layers(model, **choice)
    return {layer.name: layer for layer in layers}


def reasons(model: nn.Module, **choice: object) -> dict[str, str]:
    _, skipped = find_layers(model, **choice)
    assert all(isinstance(one, Skipped) and one.reason for one in skipped)
    return {one.name: one.reason for one in skipped}


def test_transformer_by_default() -> None:
    model = Transformer()
    assert list(found(model)) == [
        f"layers.{index}.{name}" for index in range(2) for name in ("attention.in_proj_weight", "attention.out_proj", "up")
    ]
    assert reasons(model) == {
        "embed_tokens": "embedding: looked up, not multiplied",
        "lm_head": "output head (its name ends in 'lm_head'); include it by name",
    }


def test_every_layer_with_a_weight_is_found_or_has_a_reason() -> None:
    model = nn.Sequential(
        Transformer(), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Bilinear(2, 3, 4),
        nn.LSTM(4, 4, 2), nn.GRU(4, 4), nn.RNNCell(4, 4),
    )  # fmt: skip
    weights = {name.removesuffix(".weight") for name, one in model.named_parameters() if one.ndim >= 2}
    assert weights <= found(model).keys() | reasons(model).keys()
    assert not found(model).keys() & reasons(model).keys()


def test_a_layer_gives_its_weight_its_key_and_its_layout() -> None:
    model = Transformer()
    layers = found(model)
    state = model.state_dict(keep_vars=True)
    for layer in layers.values():
        assert state[layer.parameter_name] is layer.weight
    assert layers["layers.0.up"].parameter_name == "layers.0.up.weight"
    assert layers["layers.0.attention.in_proj_weight"].parameter_name == "layers.0.attention.in_proj_weight"
    assert layers["layers.0.attention.in_proj_weight"].layout == Layout(LayoutKind.PACKED, parts=3)
    assert layers["layers.0.attention.out_proj"].layout == Layout(LayoutKind.LINEAR)


def test_the_model_may_be_one_layer() -> None:
    (layer,) = found(nn.Linear(4, 4)).values()
    assert (layer.name, layer.parameter_name) == ("", "weight")


def test_attention_with_projections_of_different_sizes() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    layers = found(attention)
    assert list(layers) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert layers["k_proj_weight"].weight.shape == (8, 4)
    assert layers["k_proj_weight"].layout == Layout(LayoutKind.LINEAR)


# ---- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "name", "meant"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.bc", False),
        ("a.*", "a.b.c", True),
        ("*.up", "layers.0.up", True),
        ("*.UP", "layers.0.up", False),
        ("layers.[01].up", "layers.2.up", False),
        ("re:layers\\.\\d+\\.up$", "layers.12.up", True),
        ("re:up", "layers.0.up", False),
        (["a", "b.*"], "b.c", True),
        ((), "a", False),
        (lambda name, module: isinstance(module, nn.Linear), "any", True),
        ([lambda name, module: name == "x", "y"], "y", True),
    ],
)
def test_names_globs_expressions_functions_and_lists(chosen: object, name: str, meant: bool) -> None:
    assert matches(chosen, name, nn.Linear(1, 1)) is meant


def test_include_leaves_out_the_others_and_overrides_the_defaults() -> None:
    model = Transformer()
    assert list(found(model, include=["lm_head", "layers.0.up"])) == ["layers.0.up", "lm_head"]
    assert reasons(model, include="lm_head")["layers.1.up"] == "not among the layers asked for"


def test_exclude_always_wins() -> None:
    model = Transformer()
    assert list(found(model, include="*.up", exclude="layers.1.*")) == ["layers.0.up"]
    assert reasons(model, exclude="re:layers")["layers.1.up"] == "excluded by the caller"
    assert found(model, exclude=lambda name, module: True) == {}


def test_a_filter_that_matches_nothing_is_a_mistake_to_be_told() -> None:
    with pytest.raises(ValueError, match=r"include='\*\.down' matches no layer of the model; its layers are \['embed_tokens'"):
        find_layers(Transformer(), include="*.down")
    for typed in ("fc9", ["fc9", "re:nothing"]):
        with pytest.raises(ValueError, match=r"exclude=.* matches nothing in the model"):
            find_layers(Transformer(), exclude=typed)
    for nothing in (None, [], lambda name, module: False):
        find_layers(Transformer(), exclude=nothing)


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize("chosen", [(one for one in "ab"), iter(["layers.0.up"]), torch.ones(2), torch.tensor(1), 3, [3], b"up"])
def test_a_filter_that_is_used_up_by_the_first_layer_or_selects_nothing_is_refused(where: str, chosen: object) -> None:
    with pytest.raises(TypeError, match="selects no layers: expected a name"):
        find_layers(Transformer(), **{where: chosen})  # type: ignore[arg-type]


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(ValueError, match="model must be a torch module, not dict"):
        find_layers({})  # type: ignore[arg-type]


def test_a_broken_expression_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression: missing \)"):
        find_layers(Transformer(), include="re:(")


# ---- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head", "model.classifier", "head", "fc", "fc.weight", "decoder.LM_HEAD", "_fc"])
def test_heads_go_by_name(name: str) -> None:
    assert (reason := head_reason(name)) and "output head" in reason


@pytest.mark.parametrize("name", ["layers.0.fc1", "heads", "head.0", "classifier_norm", "", "score_net", "_fc1"])
def test_the_last_linear_of_another_name_is_no_head(name: str) -> None:
    assert head_reason(name) is None


def test_only_the_first_convolution_stays_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv1d(8, 8, 3))
    assert list(found(model)) == ["1", "2"]
    assert reasons(model) == {"0": "first convolution; include it by name"}
    assert list(found(model, include="0")) == ["0"]


def test_grouped_convolutions_are_layers_and_depthwise_ones_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 16, 3, groups=8))
    assert found(model)["1"].layout == Layout(LayoutKind.CONV, groups=2)
    assert "depthwise convolution" in reasons(model)["2"]
    assert "depthwise convolution" in reasons(model, include=["1", "2"])["2"]


def test_a_depthwise_first_convolution_is_not_followed_by_another_exception() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    assert "depthwise" in reasons(model)["0"]
    assert list(found(model)) == ["1"]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_layers_whose_matrices_multiply_their_inputs(dimensions: int, groups: int) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    module = kind(8, 4, 1, groups=groups, bias=False)
    (layer,) = found(nn.Sequential(module)).values()
    # At a kernel of 1, each group's outputs are its matrix times its inputs.
    inputs = torch.randn(1, 8, *[1] * dimensions)
    matrices = to_matrices(layer.weight.detach(), layer.layout)
    expected = torch.cat([matrix @ part for matrix, part in zip(matrices, inputs.flatten().chunk(groups), strict=True)])
    torch.testing.assert_close(module(inputs).flatten(), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_layers_and_stay_usable(kind: type[nn.RNNBase]) -> None:
    model = kind(8, 16, num_layers=2, bidirectional=True)
    expected = [name for name, one in model.named_parameters() if one.ndim == 2]
    assert list(found(model)) == expected and len(expected) == 8
    report = bisparse.prune_(model, "2:4")
    assert [layer.parameter for layer in report] == expected
    assert verify(model, "2:4") and len(verify(model, "2:4").layers) == 8
    # The flat list that the forward pass reads is of the same parameters.
    inputs = torch.randn(3, 2, 8)
    again = kind(8, 16, num_layers=2, bidirectional=True)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(inputs)[0], again(inputs)[0])


def weight_dropped(module: nn.Module, name: str) -> None:
    """As in AWD-LSTM: the layer reads a tensor that is computed from a parameter of another name."""
    raw = module._parameters.pop(name)
    module.register_parameter(f"{name}_raw", raw)
    setattr(module, name, nn.functional.dropout(raw, 0.5))


@pytest.mark.parametrize(
    "compute", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm, weight_dropped]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_recurrent_weight_that_is_computed_is_one_layer_and_refused(compute: Callable[..., object]) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8)})
    compute(model["rnn"], "weight_hh_l0")
    assert list(found(model)) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for change in (lambda: bisparse.prune_(model, "2:4"), lambda: bisparse.sparsify_(model, "2:4", mode="static")):
        with pytest.raises(ValueError, match=r"rnn\.weight_hh_l0"):
            change()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [layer.parameter for layer in bisparse.prune_(model, "2:4", exclude="*hh*")] == ["rnn.weight_ih_l0"]


def test_recurrent_cells_are_layers_and_bilinear_layers_are_not() -> None:
    assert list(found(nn.ModuleDict({"cell": nn.LSTMCell(8, 8)}))) == ["cell.weight_ih", "cell.weight_hh"]
    assert "bilinear" in reasons(nn.ModuleDict({"both": nn.Bilinear(8, 8, 8)}))["both"]


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return self._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), self.bias)


class Ternary(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Counting(nn.Linear):
    """Uses its weight as it is, counts its calls, draws a random number, drops in training."""

    calls = 0

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += torch.rand(1)
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (Standardised(8, 8, 3), "does not multiply by its weight unchanged"),
        (Ternary(8, 8), "does not multiply by its weight unchanged"),
        (TwoOutputs(8, 8), "with an output other than Linear's"),
    ],
)
@pytest.mark.parametrize("include", [None, "1"])
def test_a_subclass_that_changes_its_weight_is_left_dense_even_if_asked_for(
    module: nn.Module, word: str, include: str | None
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module)
    assert word in reasons(model, include=include)["1"]
    assert "1" in found(model, layouts={"1": "conv" if isinstance(module, nn.Conv2d) else "linear"})


class StandardisedInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True) if self.training else self.weight
        return nn.functional.linear(x, weight, self.bias)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True) if self.training else self.weight
        return self._conv_forward(x, weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 0.5, self.bias)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Normed(nn.Linear):
    """A batch norm of its own: other outputs in training mode, of the same product."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.BatchNorm1d(sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("module", "word"),
    [
        (StandardisedInTraining(16, 16), r"in training mode\): its outputs depend on inputs whose weights are zero"),
        (StandardisedConv(16, 16, 3), r"in training mode\): its outputs depend on inputs whose weights are zero"),
        (Scaled(16, 16), r"its output is that of 0\.5 times its weight\. Zeros of the weight were zeros of the product"),
        (Activated(16, 16), r"changes the output\)\. Zeros of the weight were zeros of the product"),
    ],
)
def test_a_subclass_is_tried_in_both_modes_and_refused_for_what_it_does(module: nn.Module, word: str, training: bool) -> None:
    assert re.search(word, reasons(nn.Sequential(nn.Conv2d(16, 16, 1), module.train(training)))["1"])


def test_outputs_that_training_mode_alone_changes_are_no_reason() -> None:
    module = Normed(16, 16)
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    assert "1" in found(nn.Sequential(nn.Identity(), module))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()) and module.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_trying_a_subclass_changes_nothing_and_runs_no_hook() -> None:
    model = nn.Sequential(Counting(8, 8))
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    state = torch.random.get_rng_state()
    assert list(found(model)) == ["0"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model[0].calls == 0 and model[0].training and not called and float(model[0].seen) == 0


class Constrained(nn.Linear):
    """Writes to its weight as it runs, in both of the ways there are."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


def test_trying_a_subclass_that_writes_to_its_weight_leaves_the_weight_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Constrained(8, 8))
    before = model[1].weight.detach().clone()
    assert list(found(model)) == ["0"]
    assert torch.equal(model[1].weight, before)


class Small(nn.Module):
    """A network whose head has no name of a head."""

    def __init__(self, head: str, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 32))
        self.add_module(head, nn.Linear(32, classes))


@pytest.mark.parametrize("head", ["linear", "to_classes", "last", "out"])
def test_the_last_linear_is_a_head_whatever_its_name(head: str) -> None:
    assert list(found(Small(head))) == ["body.0", "body.2"]
    assert "output head" in reasons(Small(head))[head]
    assert list(found(Small(head), include=head)) == [head]


def test_a_last_linear_whose_outputs_another_layer_takes_is_no_head_by_flow() -> None:
    assert list(found(Small("down", 16))) == ["body.0", "body.2", "down"]


def test_routers_and_adapters_stay_dense_unless_asked_for() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    plain = nn.ModuleDict({"gate": nn.Linear(8, 8), "lora_A": nn.Linear(8, 4), "base": nn.Linear(8, 8)})
    model = nn.ModuleDict({"moe": block, "mlp": plain})
    assert "router" in reasons(model)["moe.gate"] and "adapter" in reasons(model)["mlp.lora_A"]
    assert list(found(model)) == [*(f"moe.experts.{i}" for i in range(4)), "mlp.gate", "mlp.base"]
    assert list(found(model, include="moe.gate")) == ["moe.gate"]


class Mixture(nn.Module):
    """Experts as transformers makes them; `flag` is what its modules say of their layout."""

    def __init__(self, up: tuple[int, ...], down: tuple[int, ...], flag: bool | None = None) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        if flag is not None:
            self.is_transposed = flag


@pytest.mark.parametrize(
    ("experts", "layout"),
    [
        (Mixture((2, 16, 8), (2, 8, 8)), LayoutKind.EXPERTS),
        (Mixture((2, 8, 32), (2, 16, 8)), LayoutKind.EXPERTS_TRANSPOSED),
        (Mixture((2, 8, 8), (2, 8, 8), True), LayoutKind.EXPERTS_TRANSPOSED),
        (Mixture((2, 8, 8), (2, 8, 8), False), LayoutKind.EXPERTS),
        (Mixture((2, 8, 8), (2, 8, 8)), None),
    ],
)
def test_experts_go_by_what_their_module_says_and_by_their_shapes(experts: nn.Module, layout: LayoutKind | None) -> None:
    model = nn.ModuleDict({"experts": experts})
    if layout is None:
        assert "nothing distinguishes inputs from outputs" in reasons(model)["experts.down_proj"]
        assert len(found(model, layouts={"experts.*": "experts-transposed"})) == 2
        return
    assert {one.layout.kind for one in found(model).values()} == {layout}
    bisparse.prune_(model, "2:4")
    for weight in (experts.gate_up_proj, experts.down_proj):
        along_inputs = weight if layout is LayoutKind.EXPERTS else weight.transpose(1, 2)
        assert bool(((along_inputs.reshape(2, along_inputs.shape[1], -1, 4) != 0).sum(-1) <= 2).all())


def test_a_bare_parameter_is_listed_and_pruned_once_its_layout_is_given() -> None:
    model = nn.ModuleDict({"custom": nn.Module(), "a": nn.Linear(8, 8)})
    model["custom"].kernel = nn.Parameter(torch.randn(8, 12))
    assert "it is not known how it is used" in reasons(model)["custom.kernel"]
    (layer,) = (one for name, one in found(model, layouts={"*.kernel": "transposed"}).items() if name == "custom.kernel")
    assert layer.layout == Layout(LayoutKind.TRANSPOSED)
    bisparse.prune_(model, "2:4", layouts={"*.kernel": "transposed"})
    assert verify(model["custom"].kernel.t(), "2:4")
    assert verify(model, "2:4", layouts={"*.kernel": "transposed"})


@pytest.mark.parametrize(
    ("text", "shape", "layout"),
    [
        ("linear", (8, 8), Layout()),
        ("groups:2", (8, 4, 3, 3), Layout(LayoutKind.CONV, groups=2)),
        ("parts:3", (24, 8), Layout(LayoutKind.PACKED, parts=3)),
        ("parts:q,k,v", (24, 8), Layout(LayoutKind.PACKED, parts=3)),
        ("parts:16,4,4", (24, 8), Layout(LayoutKind.PACKED, parts=6)),
        ("experts-transposed", (2, 8, 8), Layout(LayoutKind.EXPERTS_TRANSPOSED)),
    ],
)
def test_layouts_as_text(text: str, shape: tuple[int, ...], layout: Layout) -> None:
    assert parse_layout(text, shape, "a") == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lineal", "'lineal' is not a layout: expected one of linear"),
        ("groups:0", "is not a layout"),
        ("parts:", "is not a layout"),
        ("parts:0,0", "is not a layout"),
        ("parts:q", "is not a layout"),
        ("packed", "is not a layout"),
        ("conv", "a: a weight of shape .24, 8. cannot have the layout 'conv'"),
        ("parts:7", "a: 'parts:7' does not divide"),
        ("parts:8,8", "a: the parts of 'parts:8,8' have 16 outputs in total"),
    ],
)
def test_layouts_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layout(text, (24, 8), "a")


def test_a_layout_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layouts=\['b'\] match no layer of the model"):
        find_layers(nn.ModuleDict({"a": nn.Linear(4, 4)}), layouts={"b": "linear"})


@pytest.mark.transformers
def test_gpt2_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 8)
    (layer,) = found(nn.ModuleDict({"c_attn": conv1d})).values()
    assert layer.layout == Layout(LayoutKind.TRANSPOSED)


def test_experts_in_one_parameter() -> None:
    layers = found(nn.ModuleDict({"experts": Experts()}))
    assert list(layers) == ["experts.gate_up_proj"]
    assert layers["experts.gate_up_proj"].layout == Layout(LayoutKind.EXPERTS)
    assert layers["experts.gate_up_proj"].parameter_name == "experts.gate_up_proj"


def test_a_shared_weight_is_listed_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    assert list(found(model)) == ["a"]
    assert reasons(model) == {"b": "shares its weight with a"}


def test_a_shared_module_is_listed_once() -> None:
    layer = nn.Linear(8, 8)
    assert list(found(nn.ModuleList([layer, layer]))) == ["0"]


def test_a_weight_tied_to_an_embedding_stays_dense_unless_asked_for() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "out": nn.Linear(8, 8)})
    model["out"].weight = model["embed"].weight
    assert reasons(model)["out"] == "shares its weight with the embedding embed"
    assert list(found(model, include="out")) == ["out"]


def test_weights_that_are_not_floating_point_cannot_be_pruned() -> None:
    model = nn.ModuleDict({"packed": nn.Linear(8, 8), "empty": nn.Linear(0, 8), "plain": nn.Linear(8, 8)})
    model["packed"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    assert list(found(model)) == ["plain"]
    assert "torch.int8: quantised or packed weights cannot be pruned" in reasons(model)["packed"]
    assert reasons(model)["empty"] == "empty weight"


def test_a_weight_that_torch_has_not_made_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(8))
    assert found(model) == {}
    assert "no shape yet" in reasons(model)["0"]


# ---- sizes that M does not divide ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "shape", "divides"),
    [
        ("2:4", (6, 8), True),
        ("2:4-T", (6, 8), False),
        ("2:4-T", (8, 6), False),
        ("2:4-T", (8, 8), True),
        ("4:8", (8, 12), False),
        ("50%", (5, 7), True),
        ("4:8-seq", (3, 8), True),
    ],
)
def test_remainder(pattern: str, shape: tuple[int, int], divides: bool) -> None:
    model = nn.ModuleDict({"good": nn.Linear(8, 8), "odd": nn.Linear(shape[1], shape[0])})
    structure = Pattern.parse(pattern)
    assert list(found(model, pattern=structure, remainder="pad")) == ["good", "odd"]
    if divides:
        assert list(found(model, pattern=structure, remainder="error")) == ["good", "odd"]
        return
    assert list(found(model, pattern=structure, remainder="dense")) == ["good"]
    (reason,) = reasons(model, pattern=structure, remainder="dense").values()
    assert reason == f"{structure.m} does not divide the sides of its {shape[0]} x {shape[1]} matrix"
    with pytest.raises(
        ValueError, match=rf"odd: {structure.m} does not divide .* pass remainder='pad' or 'dense', or exclude the layer"
    ):
        find_layers(model, pattern=structure, remainder="error")
    assert list(found(model, exclude="odd", pattern=structure, remainder="error")) == ["good"]


def test_remainder_looks_at_the_matrices_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    structure = Pattern(4, 8, transposable=True)
    assert list(found(model, pattern=structure, remainder="dense")) == ["2"]
    assert "4 x 4 matrix" in reasons(model, pattern=structure, remainder="dense")["1"]


def test_unknown_remainder_mode() -> None:
    with pytest.raises(ValueError, match="remainder='crop': expected 'pad', 'dense' or 'error'"):
        find_layers(nn.Linear(4, 4), remainder="crop")


# ---- the judge sees the same layers ----------------------------------------------------------------------------------


def checkerboard(rows: int, columns: int) -> Tensor:
    return ((torch.arange(rows)[:, None] + torch.arange(columns)) % 2).float()


def test_verify_looks_at_every_layer_and_names_the_first_that_breaks() -> None:
    model = Transformer()
    with torch.no_grad():
        for layer in found(model).values():
            layer.weight.copy_(checkerboard(*layer.weight.shape))
    assert verify(model, "2:4-T")
    assert [one.layer for one in verify(model, "2:4-T").layers] == list(found(model))
    with torch.no_grad():
        model.layers[1]["up"].weight[5, 4:8] = 1.0
    verification = verify(model, "2:4-T")
    assert not verification
    assert verification.first is not None
    assert str(verification.first) == "layers.1.up: W, row 5, group 1 keeps 4"
    assert verification.violations == 1 + 2


def test_verify_of_a_model_names_the_layers_that_it_left_out_by_default() -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "head": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    bisparse.prune_(model, "2:4", include=["body", "head", "other"])
    model["head"].weight.data.fill_(1.0)
    found = bisparse.verify(model, "2:4", exclude="other")
    assert found and {one.name for one in found.left_out} == {"head", "other"}
    assert found.message == (
        "2:4 holds on 64 groups; 1 left out: head (output head (its name ends in 'head'); include it by name)"
    )
    whole = bisparse.verify(model, "2:4", include=["body", "head", "other"])
    assert not whole and whole.left_out == () and "left out" not in whole.message
    left = bisparse.accelerate_(model.eval(), "reference").left_dense
    assert not [one for one in left if "prune" in one.reason]


def test_verify_of_a_model_without_layers_does_not_hold() -> None:
    with pytest.raises(ValueError, match="nothing was verified"):
        verify(nn.Sequential(nn.ReLU()), "2:4")


class WithAdapter(nn.Linear):
    """As loralib's Linear: the sum of the weight and of a product that is zero at the start."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(8, 8)
        self.lora_A, self.lora_B, self.scale = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2)), scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T * self.scale


class WithAdapterModule(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class ZeroBiased(nn.Linear):
    """Parameters that are zero, and harmless: a second bias and the log of a factor."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.shift, self.log_factor = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.log_factor.exp() + self.shift


@pytest.mark.parametrize("module", [WithAdapter(), WithAdapterModule()], ids=lambda one: type(one).__name__)
def test_a_sum_with_an_adapter_that_is_still_zero_is_found(module: nn.Module) -> None:
    before = {name: one.clone() for name, one in module.state_dict().items()}
    model = nn.Sequential(nn.Linear(8, 8), module)
    assert "does not multiply by its weight unchanged" in reasons(model)["1"]
    assert all(torch.equal(before[name], one) for name, one in module.state_dict().items())


def test_parameters_that_are_zero_and_change_no_zero_of_the_product_are_no_reason() -> None:
    assert "1" in found(nn.Sequential(nn.Linear(8, 8), ZeroBiased()))


def test_a_forward_of_a_single_module_is_tried_as_one_of_a_class_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(4, 4, 3))
    centred, wrapped, doubled = model[0], model[1], model[3]
    centred.forward = lambda x: nn.functional.linear(x, centred.weight - centred.weight.mean(), centred.bias)
    plain = wrapped.forward
    wrapped.forward = lambda *inputs: plain(*inputs)  # as accelerate's hooks do
    doubled.forward = lambda x: nn.functional.conv2d(x, doubled.weight, doubled.bias) * 2
    before = {name: one.clone() for name, one in model.state_dict().items()}
    held, modes = dict(model.named_parameters()), [one.training for one in model.modules()]
    assert set(found(model)) == {"1", "2"}
    assert (
        "zeros of the weight have no effect" in reasons(model)["0"] and "2 times its weight" in reasons(model, include="3")["3"]
    )
    assert all(held[name] is one and torch.equal(before[name], one) for name, one in model.named_parameters())
    assert [one.training for one in model.modules()] == modes


def overlapping(kind: str) -> nn.Module:
    model, memory = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(24, 16)
    first, second = {
        "rows": (memory[:8, :8], memory[3:11, :8]),
        "transposed": (memory[:8, :8], memory[:8, :8].t()),
        "columns": (memory[:8, :8], memory[:8, 4:12]),
        "expanded": (memory[:1, :8].expand(8, 8), memory[8:16, :8]),
    }[kind]
    model[0].weight, model[1].weight = nn.Parameter(first), nn.Parameter(second)
    return model


@pytest.mark.parametrize("kind", ["rows", "transposed", "columns", "expanded"])
def test_weights_that_share_a_part_of_their_memory_are_left_dense_even_if_asked_for(kind: str) -> None:
    for include in (None, "*"):
        model = overlapping(kind)
        left = reasons(model, include=include)
        assert set(left) == ({"0"} if kind == "expanded" else {"0", "1"})
        assert all("memory" in reason and ".clone()" in reason for reason in left.values())
    before = model.state_dict()["0.weight"].clone()
    report = bisparse.prune_(model, "2:4-T")
    assert (
        torch.equal(model[0].weight, before) and bisparse.verify(model[2].weight, "2:4-T") and "2" in [one.name for one in report]
    )


def test_slices_of_one_tensor_without_a_common_element_are_layers() -> None:
    model, memory = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(16, 16)
    model[0].weight, model[1].weight, model[2].weight = (
        nn.Parameter(memory[:8, :8]), nn.Parameter(memory[:8, 8:]), nn.Parameter(memory[8:, ::2]),
    )  # fmt: skip
    bisparse.prune_(model, "2:4-T")
    assert bisparse.verify(model, "2:4-T") and bool((memory[8:, 1::2] != 0).all())


def test_a_weight_that_is_the_embeddings_memory_is_tied_to_it() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.data)
    assert "shares its weight with the embedding 0" in reasons(model)["2"] and "1" in found(model)
