"""prune_ by magnitude: the best mask of each layer, in place, for all layers or for none."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bisparse import AdaPrune, Pattern, Wanda, convert_, prune_, solve, verify
from bisparse.layers import find_layers
from bisparse.pruning import Method
from bisparse.results import PruneReport
from bisparse.solvers import Greedy
from bisparse.tiles import Layout, LayoutKind


class Conv1D(nn.Module):
    """GPT-2's, which stores (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Zoo(nn.Module):
    """One layer of every layout, and one of everything that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.conv = nn.Conv2d(16, 24, 3)
        self.grouped = nn.Conv2d(24, 32, 1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.attention = nn.MultiheadAttention(16, 2)
        self.linear = nn.Linear(20, 12)
        self.c_fc = Conv1D(24, 16)
        self.norm = nn.LayerNorm(24)
        self.embedding = nn.Embedding(10, 16)
        self.head = nn.Linear(24, 10)


PRUNED = {"conv", "grouped", "attention.in_proj_weight", "attention.out_proj", "linear", "c_fc"}


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "4:8-T", "3:8-seq", "4:8-paired", "30%"])
def test_every_layer_gets_the_best_mask_and_nothing_else_changes(pattern: str) -> None:
    model = Zoo()
    before = copy.deepcopy(model)
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    report = prune_(model, pattern)
    assert {layer.name for layer in report} == PRUNED
    dense, sparse = before.state_dict(), model.state_dict()
    for name, weight in sparse.items():
        if name not in {layer.parameter for layer in report}:
            assert torch.equal(weight, dense[name]), name
    for layer in find_layers(model)[0]:
        weight, old = layer.weight.detach(), dense[layer.parameter_name]
        result = report[layer.name]
        best = solve(old.abs(), pattern, layout=layer.layout)
        assert float(weight.abs().double().sum()) == pytest.approx(best.value, rel=1e-12)
        assert verify(weight, pattern, layout=layer.layout)
        kept = weight != 0
        assert torch.equal(weight[kept], old[kept]), "kept weights keep their bits"
        assert weight.data_ptr() == addresses[layer.parameter_name], "in place: an optimizer still holds them"
        assert result.density == pytest.approx(float(kept.double().mean()), abs=1e-12)
        assert result.value == pytest.approx(float(weight.abs().double().sum()), rel=1e-12)
        assert result.retained == pytest.approx(float(weight.abs().double().sum() / old.abs().double().sum()), rel=1e-12)
        assert result.gap is not None and 0 <= result.gap < 1e-6
        assert result.layout == layer.layout and result.shape == tuple(weight.shape) and result.pattern == pattern


def test_every_layer_left_dense_has_its_reason() -> None:
    reasons = {left.name: left.reason for left in prune_(Zoo(), "2:4").left_dense}
    assert set(reasons) == {"stem", "depthwise", "embedding", "head"}
    for name, word in {"stem": "first", "depthwise": "depthwise", "embedding": "looked up", "head": "head"}.items():
        assert word in reasons[name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_in_the_last_layer_leaves_the_model_as_it_was(bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[2].weight[3, 5] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^2: .*\(.*3, 5\)"):
        prune_(model, "2:4-T")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.isfinite(), before[name].isfinite())
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name


def test_patterns_of_single_layers() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    report = prune_(model, "2:4", patterns={"1": "4:8-T", "re:[12]": Pattern(1, 4)})
    assert [layer.pattern for layer in report] == ["2:4", "4:8-T", "1:4"]
    assert [bool(verify(model[i].weight, p)) for i, p in enumerate(("2:4", "4:8-T", "1:4"))] == [True] * 3
    assert report.patterns == {"1": "4:8-T", "re:[12]": "1:4"}
    with pytest.raises(ValueError, match="nothing"):
        prune_(model, "2:4", patterns={"nothing": "4:8"})


def test_include_overrules_and_exclude_wins() -> None:
    model = Zoo()
    report = prune_(model, "2:4", include=["head", "conv", "lin*"], exclude="conv")
    assert {layer.name for layer in report} == {"head", "linear"}
    assert {left.name: left.reason for left in report.left_dense}["conv"] == "excluded by the caller"
    with pytest.raises(ValueError, match="no_such"):
        prune_(model, "2:4", include="no_such_layer")


@pytest.mark.parametrize(("remainder", "pruned"), [("pad", True), ("dense", False)])
def test_sides_that_m_does_not_divide(remainder: str, pruned: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10))
    report = prune_(model, "4:8-T", remainder=remainder)
    assert ("1" in {layer.name for layer in report}) is pruned
    assert bool((model[1].weight == 0).any()) is pruned
    if not pruned:
        assert "8 does not divide" in {left.name: left.reason for left in report.left_dense}["1"]


def test_remainder_error_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"1: 8 does not divide the sides of its 10 x 16"):
        prune_(model, "4:8-T", remainder="error")
    assert equal(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_half_and_double_precision_keep_their_dtype(dtype: torch.dtype) -> None:
    model = nn.Linear(32, 32).to(dtype)
    old = model.weight.detach().clone()
    report = prune_(model, "4:8-T")
    assert model.weight.dtype == dtype and report.layers[0].dtype == str(dtype).removeprefix("torch.")
    best = solve(old.double().abs(), "4:8-T")
    assert float(model.weight.detach().double().abs().sum()) == pytest.approx(best.value, rel=1e-6)


def test_a_shared_weight_is_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    report = prune_(model, "2:4")
    assert [layer.name for layer in report] == ["0"]
    assert "shares its weight with 0" in report.left_dense[0].reason
    assert verify(model[1].weight, "2:4")


def test_a_parametrized_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    before = copy.deepcopy(model[0].weight)
    with pytest.raises(ValueError, match="1: its weight is computed by a parametrization"):
        prune_(model, "2:4")
    assert torch.equal(model[0].weight, before)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="meta device"):
        prune_(model, "2:4")


def test_a_solver_without_a_certificate_reports_no_gap() -> None:
    report = prune_(nn.Linear(32, 32), "4:8-T", solver=Greedy())
    assert report.layers[0].gap is None and report.gap is None
    assert "Greedy" in report.solver


def test_the_report_adds_up() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32))
    dense = [layer.weight.detach().clone() for layer in model]
    report = prune_(model, "1:4")
    assert isinstance(report, PruneReport) and len(report) == 2 and report.weights == 64 + 256
    kept = sum(int((layer.weight != 0).sum()) for layer in model)
    assert report.density == pytest.approx(kept / 320)
    shares = [float(layer.weight.detach().abs().sum() / old.abs().sum()) for layer, old in zip(model, dense, strict=True)]
    assert report.retained == pytest.approx((64 * shares[0] + 256 * shares[1]) / 320, rel=1e-6)
    assert report["1"].layout == Layout(LayoutKind.LINEAR)
    with pytest.raises(KeyError):
        report["2"]


@pytest.mark.parametrize("method", [None, AdaPrune()])
def test_the_density_is_that_of_the_weights_where_a_mask_keeps_zeros(method: Method | None) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(32, 32) < 0.9, 0)
    report = prune_(model, "2:4", method, [torch.randn(64, 32) for _ in range(5)])
    found = float((model[0].weight != 0).double().mean())
    assert report.density == found and (method is not None or found < 0.2)


@pytest.mark.parametrize("job", [prune_, convert_])
@pytest.mark.parametrize(
    ("model", "choice", "reason"),
    [
        (nn.Sequential(nn.ReLU()), {}, "none that a pattern applies to"),
        (nn.ModuleDict({"lm_head": nn.Linear(16, 16)}), {}, "lm_head: output head"),
        (nn.Linear(15, 15), {"remainder": "dense"}, "4 does not divide"),
    ],
)
def test_nothing_to_prune_is_an_error_with_the_reason(
    job: Callable[..., PruneReport], model: nn.Module, choice: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"has no layer to prune \(.*{reason}"):
        job(model, "2:4", **choice)


def test_a_pattern_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="5:4"):
        prune_(nn.Linear(8, 8), "5:4")


def test_names_serve_where_methods_and_solvers_do() -> None:
    models = [nn.Sequential(nn.Linear(16, 16)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    batches = [torch.randn(32, 16) for _ in range(5)]
    reports = [
        prune_(models[0], "4:8-T", "wanda", batches, solver="greedy"),
        prune_(models[1], "4:8-T", Wanda(), batches, solver=Greedy()),
    ]
    converted = convert_(models[2], "4:8-T", "wanda", batches, solver="greedy")
    assert reports[0].method == reports[1].method == converted.method == "wanda"
    assert reports[0].solver == reports[1].solver == converted.solver == repr(Greedy())
    assert torch.equal(models[0][0].weight, models[1][0].weight) and torch.equal(models[0][0].weight, models[2][0].weight)


@pytest.mark.parametrize("job", [prune_, convert_])
@pytest.mark.parametrize(
    ("method", "hint"), [("Wanda_", "did you mean 'wanda'"), (Wanda, r"did you mean Wanda\(\)"), (3, "expected a Method")]
)
def test_what_is_no_method_is_refused(job: Callable[..., PruneReport], method: object, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        job(nn.Sequential(nn.Linear(16, 16)), "4:8-T", method, [])


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T"])
@pytest.mark.parametrize("kind", ["tensors", "function"])
def test_masks_by_scores_of_the_callers_keep_the_largest_total_score(kind: str, pattern: str) -> None:
    model = Zoo()
    before = copy.deepcopy(model)
    scores = {layer.name: torch.rand_like(layer.weight.detach()) for layer in find_layers(model)[0]}

    def function(name: str, weight: torch.Tensor) -> torch.Tensor:
        assert torch.equal(weight, dict(before.named_parameters())[weights[name]])
        weight.zero_()  # a copy
        return scores[name]

    weights = {layer.name: layer.parameter_name for layer in find_layers(model)[0]}
    report = prune_(model, pattern, scores=scores if kind == "tensors" else function)
    assert {layer.name for layer in report} == PRUNED and report.method == "scores"
    layouts = {layer.name: layer.layout for layer in find_layers(before)[0]}
    for name, own in scores.items():
        mask = solve(own, pattern, layout=layouts[name]).mask
        dense, pruned = (dict(one.named_parameters())[weights[name]] for one in (before, model))
        assert torch.equal(pruned, dense * mask)


def test_scores_are_named_by_layer_or_by_parameter() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2))
    by_parameter = {name: torch.rand(one.shape) for name, one in model.named_parameters() if one.ndim == 2}
    by_layer = {name.removesuffix(".weight"): one for name, one in by_parameter.items()}
    other = copy.deepcopy(model)
    prune_(model, "2:4", scores=by_parameter, include=["*"])
    prune_(other, "2:4", scores=by_layer, include=["*"])
    assert equal(model, other)
    with pytest.raises(ValueError, match=r"names \['0'\] twice"):
        prune_(model, "2:4", scores=by_parameter | {"0": by_parameter["0.weight"]}, include=["*"])


def test_a_layer_whose_own_name_ends_like_a_parameter() -> None:
    model = nn.ModuleDict({"weight": nn.Linear(16, 16)})
    for name in ("weight", "weight.weight"):
        prune_(model, "2:4", scores={name: torch.rand(16, 16)}, include=["*"])


BAD_SCORES = {
    "of another shape": (
        lambda name, weight: weight[:1].abs(),
        r"scores= gives a tensor of shape .* expected .* shape \(16, 16\)",
    ),
    "no tensor": (lambda name, weight: 1.0, "scores= gives a float"),
    "negative": (lambda name, weight: -torch.ones_like(weight), "0"),
    "NaN": (lambda name, weight: torch.full_like(weight, torch.nan), "0"),
    "complex": (lambda name, weight: weight.to(torch.complex64), "0"),
    "for a layer that is not there": ({"0": torch.ones(16, 16), "1": torch.ones(16, 16), "9": torch.ones(2)}, r"names \['9'\]"),
    "for some layers only": ({"0": torch.ones(16, 16)}, r"has none for \['1'\]"),
    "neither": (torch.ones(16, 16), "expected a dict"),
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_scores_that_do_not_fit_are_refused_and_the_model_is_unchanged(kind: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = copy.deepcopy(model)
    scores, message = BAD_SCORES[kind]
    with pytest.raises(ValueError, match=message):
        prune_(model, "2:4", scores=scores)
    with pytest.raises(ValueError, match="leave out one of them"):
        prune_(model, "2:4", "magnitude", scores=lambda name, weight: weight.abs())
    assert equal(before, model)
