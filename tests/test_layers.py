"""Which layers are found, which are left dense, and that every one of those has its reason."""

import pytest
import torch
from torch import Tensor, nn

from bisparse import Pattern, verify
from bisparse.layers import Layer, Skipped, find_layers, head_reason, matches
from bisparse.tiles import Layout, LayoutKind


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
        "lm_head": "output head (its name ends in 'lm_head'); include it by name to prune it",
    }


def test_every_layer_with_a_weight_is_found_or_has_a_reason() -> None:
    model = nn.Sequential(
        Transformer(), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Bilinear(2, 3, 4),
        nn.LSTM(4, 4, 2), nn.GRU(4, 4), nn.RNNCell(4, 4),
    )  # fmt: skip
    matrices = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
    weights = {name for name, module in model.named_modules() if isinstance(module, matrices)}
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


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(ValueError, match="model must be a torch module, not dict"):
        find_layers({})  # type: ignore[arg-type]


def test_a_broken_expression_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is no regular expression: missing \)"):
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
    assert reasons(model) == {"0": "first convolution; include it by name to prune it"}
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


def test_transposed_convolutions_are_not_supported() -> None:
    assert reasons(nn.Sequential(nn.ConvTranspose2d(4, 4, 3))) == {"0": "transposed convolution: not supported"}


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


def test_verify_of_a_model_without_layers_does_not_hold() -> None:
    with pytest.raises(ValueError, match="nothing was verified"):
        verify(nn.Sequential(nn.ReLU()), "2:4")
