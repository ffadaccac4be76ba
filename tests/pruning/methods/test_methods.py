"""Every method with every pattern and kind of layer, and what each one promises beyond that."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bisparse.pruning.methods
from bisparse import Pattern, pruning, verify
from bisparse.pruning import (
    ALPS,
    AdaPrune,
    BiasCorrection,
    GradientAdaPrune,
    Magnitude,
    MatchMoments,
    MeanAbsorption,
    Method,
    Regrow,
    SparseGPT,
    Wanda,
    absorb_mean,
    parse_method,
    prune_,
)
from bisparse.solvers import Greedy

QUICK = {"alps": ALPS(iterations=6), "adaprune-gradient": GradientAdaPrune(steps=3)}
"""Instead of the defaults, which take minutes."""
SETTINGS: dict[str, Method] = {
    "sparsegpt refitted": SparseGPT(refit=True, correct_upstream=True),
    "adaprune fixed damping": AdaPrune(Magnitude(), damping=0.01, correct_upstream=False),
    "match-moments outputs": MatchMoments(what="outputs"),
}
METHODS: dict[str, Method] = {name: cls() for name, cls in pruning.METHODS.items()} | QUICK | SETTINGS
PATTERNS = ("2:4", "2:4-T", "3:8-T", "4:8-seq", "4:8-paired", "30%")


def test_every_method_file_has_its_line_in_the_table_of_methods() -> None:
    folder = Path(bisparse.pruning.methods.__file__).parent
    listed = set(pruning.METHODS.values())
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"bisparse.pruning.methods.{path.stem}") if path.stem != "__init__" else None
        for name, one in vars(module).items() if module else ():
            if inspect.isclass(one) and issubclass(one, Method) and one.__module__ == module.__name__ and one is not Method:
                assert one in listed, f"pruning/methods/__init__.py lacks a line for {name} of {path.name}"


@pytest.mark.parametrize("name", pruning.METHODS)
def test_a_method_is_a_frozen_value_with_a_name(name: str) -> None:
    method = parse_method(name)
    assert dataclasses.is_dataclass(method) and type(method) is pruning.METHODS[name]
    assert method == pruning.METHODS[name]() and hash(method) == hash(pruning.METHODS[name]())
    assert parse_method(method) is method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["wnada", "", None, 5, Wanda, ["wanda"]])
def test_what_is_no_method_is_refused_with_the_names_there_are(method: object) -> None:
    with pytest.raises(ValueError, match=r"method=.*expected a Method or one of 'magnitude', 'wanda'"):
        parse_method(method)  # type: ignore[arg-type]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16, bias=False)), (20,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 10, 1),
        ),
        (3, 8, 8),
    ),
    "attention": (Attention, (5, 16)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_conformance(name: str, pattern: str) -> None:
    method = METHODS[name]
    for kind, (make, shape) in MODELS.items():
        if kind == "attention" and pattern not in ("2:4", "3:8-T"):
            continue
        torch.manual_seed(3)
        model = make()
        model.eval()
        batches = [torch.randn(4, *shape) + 0.3 for _ in range(6)]
        twin = copy.deepcopy(model)
        report = prune_(model, pattern, method, batches, progress=False)
        assert len(report) >= 2
        for layer in report:
            weight = model.state_dict()[layer.parameter]
            verify(weight, pattern, layout=layer.layout, name=layer.name).check()
            assert bool(torch.isfinite(weight).all()) and bool(weight.any())
            assert layer.error is None or 0 <= layer.error < 10
        if pattern == "2:4-T":
            prune_(twin, pattern, method, batches, progress=False)
        else:
            twin = model
        assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items()), "not deterministic"
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("name", ["sparsegpt", "alps", "adaprune"])
def test_other_solvers_serve_as_well(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    prune_(model, "4:8-T", METHODS[name], [torch.randn(32, 16) for _ in range(5)], solver=Greedy())
    verify(model[0].weight, "4:8-T").check()


@pytest.fixture(scope="module")
def layer() -> tuple[nn.Module, list[Tensor], Tensor]:
    """A wide layer with correlated inputs, data to calibrate on and data to judge by."""
    torch.manual_seed(5)
    mixing = torch.randn(64, 64) / 8
    model = nn.Sequential(nn.Linear(64, 48))
    return model, [torch.randn(100, 64) @ mixing for _ in range(10)], torch.randn(2000, 64) @ mixing


def held_out_error(layer: tuple[nn.Module, list[Tensor], Tensor], pattern: str, method: Method) -> float:
    model, batches, judge = layer
    pruned = copy.deepcopy(model)
    prune_(pruned, pattern, method, batches)
    with torch.no_grad():
        goal = model(judge) - model[0].bias
        return float((pruned(judge) - model(judge)).norm() / goal.norm())


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T"])
def test_the_order_of_the_methods_on_data_they_have_not_seen(layer: tuple, pattern: str) -> None:
    error = {name: held_out_error(layer, pattern, METHODS[name]) for name in METHODS}
    assert error["adaprune"] < error["wanda"] < error["magnitude"]
    assert error["sparsegpt refitted"] < error["sparsegpt"] < error["wanda"]
    full = held_out_error(layer, pattern, ALPS())
    assert full < error["adaprune"] and full < error["sparsegpt refitted"]


def test_least_squares_has_less_error_than_adam_in_a_tenth_of_its_time(layer: tuple) -> None:
    model, batches, _ = layer
    results, seconds = {}, {}
    for name, method in {"a": GradientAdaPrune(), "b": AdaPrune(Magnitude(), correct_upstream=False)}.items():
        pruned = copy.deepcopy(model)
        # The processor's time for this thread, which other programs do not lengthen.
        started = time.thread_time()
        results[name] = prune_(pruned, "4:8", method, batches, order="parallel")["0"]
        seconds[name] = time.thread_time() - started
    assert results["b"].error < results["a"].error < results["a"].error_before
    assert seconds["b"] < seconds["a"] / 10


def reported_and_measured(model: nn.Module, method: Method, batches: list[Tensor], pattern: str = "2:4") -> tuple[float, float]:
    """What the report says the last layer's error is, and what the model's outputs say."""
    pruned = copy.deepcopy(model)
    report = prune_(pruned, pattern, method, batches)
    with torch.no_grad():
        x = torch.cat(batches)
        goal = model(x)
        bias = model[-1].bias if model[-1].bias is not None else 0.0
        measured = float((pruned(x) - goal).norm() / (goal - bias).norm())
    return report.layers[-1].error, measured


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"sparsegpt"}))
def test_the_reported_error_is_the_one_of_the_outputs(name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    batches = [torch.randn(50, 32) @ torch.randn(32, 32) / 6 + 0.5 for _ in range(10)]
    reported, measured = reported_and_measured(model, METHODS[name], batches)
    if reported is None:
        pytest.skip("measures no error")
    assert reported == pytest.approx(measured, rel=2e-3)


def test_correcting_upstream_restores_the_networks_output_not_only_the_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    mixing = torch.randn(48, 48) / 7
    batches = [torch.randn(100, 48) @ mixing for _ in range(20)]
    judge = torch.randn(2000, 48) @ mixing

    def error(method: Method, order: str) -> float:
        pruned = copy.deepcopy(model)
        prune_(pruned, "4:8-T", method, batches, order=order)
        with torch.no_grad():
            return float((pruned(judge) - model(judge)).norm() / model(judge).norm())

    blind, aware = error(AdaPrune(correct_upstream=False), "sequential"), error(AdaPrune(), "sequential")
    assert aware < 0.95 * blind
    reported, measured = reported_and_measured(model, AdaPrune(), batches)
    assert reported == pytest.approx(measured, rel=2e-3)


def test_wanda_at_n_m_is_the_selection_it_is_defined_as() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(10, 8) * torch.arange(1, 9)
    scores = model[0].weight.abs() * x.norm(dim=0)
    kept = scores.unflatten(1, (2, 4)).argsort(dim=2, descending=True)[..., :2]
    expected = torch.zeros(4, 2, 4, dtype=torch.bool).scatter_(2, kept, True).flatten(1)
    prune_(model, "2:4", Wanda(), [x])
    assert torch.equal(model[0].weight != 0, expected)


def test_sparsegpt_is_the_published_loop() -> None:
    """The inner loop of the paper's algorithm 1, written out with explicit inverses that shrink column by column."""
    torch.manual_seed(4)
    weight, x = torch.randn(6, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    gram = (x.T @ x / 200).double()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    w = weight.double().clone()
    mask = torch.zeros(6, 16, dtype=torch.bool)
    for j in range(16):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % 4 == 0:
            # Scores of a group use the diagonal as it will be when each of its columns comes first.
            diagonal = torch.stack([torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + 4)])
            kept = (w[:, j : j + 4].square() / diagonal).argsort(dim=1, descending=True)[:, :2]
            mask[:, j : j + 4] = torch.zeros(6, 4, dtype=torch.bool).scatter_(1, kept, True)
        error = w[:, j] * ~mask[:, j] / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        w[:, j] *= mask[:, j]
    model = nn.Sequential(nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    prune_(model, "2:4", SparseGPT(), [x])
    assert torch.equal(model[0].weight != 0, mask)
    torch.testing.assert_close(model[0].weight.double(), w, rtol=1e-3, atol=1e-3)


def test_a_singular_hessian_is_refused_by_name_and_the_model_is_unchanged() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0: its 16 x 16 input moments are singular at damping 0"):
        prune_(model, "2:4", SparseGPT(damping=0.0), [torch.randn(3, 16)])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_few_tokens_dead_inputs_and_zero_weights_leave_finite_weights(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].weight[:, 8:12] = 0
    x = torch.randn(3, 16)
    x[:, :4] = 0
    prune_(model, "4:8-T", METHODS[name], [x])
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert all(bool(verify(model[i].weight, "4:8-T")) for i in (0, 2))


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "adaprune", "alps"])
def test_subnormal_weights_are_pruned(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.mul_(2.0**-137)  # few bits are left
    report = prune_(model, "2:4-T", METHODS[name], [torch.randn(64, 16) for _ in range(3)])["0"]
    assert 0.4 < report.density <= 0.5 and verify(model, "2:4-T") and (report.error is None or 0 < report.error < 1)


@pytest.mark.parametrize("exponent", [-75, 75])
@pytest.mark.parametrize(
    "name", ["magnitude", "wanda", "sparsegpt", "adaprune", "alps", "adaprune-gradient", "bias-correction", *SETTINGS]
)
def test_the_size_of_weights_changes_neither_masks_nor_errors(name: str, exponent: int) -> None:
    batches = [torch.randn(64, 16) for _ in range(3)]
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for one in scaled.parameters():
            one.mul_(2.0**exponent)
    report, other = (prune_(one, "2:4-T", METHODS[name], batches)["0"] for one in (model, scaled))
    assert other.retained == report.retained
    if name == "adaprune-gradient":  # the paper's learning rates are absolute
        assert other.error == pytest.approx(report.error, rel=0.1)
        return
    assert other.error == report.error
    assert torch.equal(scaled[0].weight * 2.0**-exponent, model[0].weight)
    assert torch.equal(scaled[0].bias * 2.0**-exponent, model[0].bias)


@pytest.mark.parametrize(("exponent", "bias"), [(-126, 10.0), (-120, 300.0), (60, 1e-30)])
@pytest.mark.parametrize("name", ["sparsegpt", "adaprune", "alps", "adaprune-gradient", "bias-correction", "regrow"])
def test_a_bias_of_another_size_than_the_weights_is_kept(name: str, exponent: int, bias: float) -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[0].weight.mul_(2.0**exponent)
        model[0].bias.fill_(bias)
    kept = [torch.full((8,), bias)] if exponent < 0 or name == "sparsegpt" else []
    prune_(model, "2:4-T", METHODS[name], [torch.randn(64, 16) for _ in range(3)])
    assert bool(torch.isfinite(model[0].bias).all())
    assert all(torch.equal(model[0].bias, one) for one in kept)


@pytest.mark.parametrize("exponent", [-1000, -150, 130, 900])
@pytest.mark.parametrize(
    "name", ["sparsegpt", "adaprune", "alps", "mean-absorption", "match-moments", "bias-correction", "regrow"]
)
def test_float64_weights_beyond_float32_are_pruned_as_others(name: str, exponent: int) -> None:
    batches = [torch.randn(64, 16, dtype=torch.float64) for _ in range(3)]
    model = nn.Sequential(nn.Linear(16, 8)).double().eval()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for one in scaled.parameters():
            one.mul_(2.0**exponent)
    report, other = (prune_(one, "2:4-T", name, batches)["0"] for one in (model, scaled))
    assert other.density == report.density
    assert report.error is None or other.error == pytest.approx(report.error, rel=1e-5)
    assert torch.allclose(scaled[0].weight * 2.0**-exponent, model[0].weight, rtol=1e-5)


@pytest.mark.parametrize("exponent", [-24, -12, -6, 0, 20])
def test_gradient_steps_fit_weights_of_any_size(exponent: int) -> None:
    model = nn.Sequential(nn.Linear(13, 10)).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(2.0**exponent)
    report = prune_(model, "2:4", GradientAdaPrune(steps=200), [torch.randn(64, 13)])["0"]
    assert report.error < report.error_before


def test_gradient_steps_that_make_the_error_larger_are_not_taken() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    dense = model[0].weight.detach().clone()
    report = prune_(model, "2:4", GradientAdaPrune(steps=20, rate=10.0), [torch.randn(64, 16)])["0"]
    assert report.error == report.error_before < 1 and "made the error larger" in report.note
    assert torch.equal(model[0].weight, dense * (model[0].weight != 0))


def test_too_little_data_to_hold_any_out_is_said_and_damped() -> None:
    report = prune_(nn.Sequential(nn.Linear(16, 8)), "2:4", AdaPrune(), [torch.randn(3, 16)])
    assert report["0"].damping == 0.01 and "too little data" in report["0"].note


@pytest.mark.parametrize("name", pruning.METHODS)
@pytest.mark.parametrize("bad", [-1.5, 1.5, float("nan"), float("inf"), "x", [], True, -5])
def test_settings_that_cannot_work_are_refused_when_they_are_given(name: str, bad: object) -> None:
    """Every field refuses what its type has no use for, naming itself and what it was given."""
    fits = {
        "bool": lambda value: isinstance(value, bool),
        "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"),
    }
    for field in dataclasses.fields(pruning.METHODS[name]):
        kind = str(field.type).removesuffix(" | None")
        if kind in fits and fits[kind](bad):
            continue
        with pytest.raises(ValueError, match=rf"^{field.name}=.*expected"):
            parse_method(name, **{field.name: bad})


class TestWanda:
    def test_a_power_that_would_turn_scores_to_zero_is_refused_and_the_model_is_unchanged(self) -> None:
        model, batches = nn.Sequential(nn.Linear(64, 64)), [torch.randn(32, 64)]
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=r"^0: at power=300, \d+ of 4096 scores become 0 .* use a smaller power"):
            prune_(model, "2:4-T", Wanda(power=300.0), batches)
        assert torch.equal(model[0].weight, before)

    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e14])
    @pytest.mark.parametrize("power", [0.5, 2.0, 4.0])
    def test_the_mask_of_a_power_does_not_depend_on_the_unit_of_the_inputs(self, power: float, scale: float) -> None:
        model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(64, 16)
        scaled = copy.deepcopy(model)
        prune_(model, "4:8-T", Wanda(power), [x])
        prune_(scaled, "4:8-T", Wanda(power), [x * scale])
        assert torch.equal(model[0].weight != 0, scaled[0].weight != 0)
        verify(model[0].weight, "4:8-T").check()
        assert float((model[0].weight != 0).float().mean()) > 0.4

    def test_inputs_that_are_all_zero_are_noted(self) -> None:
        report = prune_(nn.Sequential(nn.Linear(16, 16)), "2:4", "wanda", [torch.zeros(8, 16)])
        assert "all inputs are 0" in report["0"].note and "magnitude" in report["0"].note


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.needs))
def test_calibration_data_of_zeros_leave_a_note(name: str) -> None:
    report = prune_(nn.Sequential(nn.Linear(16, 16)), "2:4", METHODS[name], [torch.zeros(8, 16) for _ in range(5)])
    assert report["0"].note


class TestMeanAbsorption:
    def test_it_keeps_the_sum_of_every_group_with_something_kept(self) -> None:
        dense = torch.randn(3, 8, 22)
        mask = torch.rand(3, 8, 22) < 0.4
        mask[0, 0, 8:16] = False
        pattern = Pattern(4, 8)
        absorbed = absorb_mean(dense * mask, dense, mask, pattern)
        assert bool(torch.isfinite(absorbed).all()) and not absorbed[~mask].any()
        for start in range(0, 22, 8):
            group = slice(start, min(start + 8, 22))
            some = mask[..., group].any(-1)
            torch.testing.assert_close(absorbed[..., group].sum(-1)[some], dense[..., group].sum(-1)[some], rtol=1e-4, atol=1e-5)
        assert not absorbed[0, 0, 8:16].any()

    def test_it_is_taken_where_it_helps_and_left_where_it_hurts(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64))
        common, centred = [torch.rand(200, 64) * 0.2 + 1], [torch.randn(200, 64)]
        taken = prune_(copy.deepcopy(model), "4:8", MeanAbsorption(), common)["0"]
        assert taken.note == "absorbed in 64 of 64 rows" and taken.error < taken.error_before / 2
        left = prune_(copy.deepcopy(model), "4:8", MeanAbsorption(), centred)["0"]
        assert int(left.note.split()[2]) <= 6 and left.error <= left.error_before
        always = prune_(copy.deepcopy(model), "4:8", MeanAbsorption(always=True), centred)
        assert always["0"].error is None


class TestBias:
    def test_correction_restores_the_mean_of_every_output(self) -> None:
        model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16))
        batches = [torch.rand(100, 32) for _ in range(4)]
        x = torch.cat(batches)
        with torch.no_grad():
            goal = model(x).mean(0)
        prune_(model, "2:4", BiasCorrection(), batches)
        torch.testing.assert_close(model(x).mean(0), goal, rtol=1e-3, atol=1e-4)

    def test_without_a_bias_the_running_mean_of_the_norm_behind_takes_it(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        model.eval()
        model[2].running_mean.normal_()
        batches = [torch.rand(20, 3, 9, 9) for _ in range(4)]
        x = torch.cat(batches)
        with torch.no_grad():
            goal = model[:3](x).mean((0, 2, 3))
        prune_(model, "2:4", BiasCorrection(), batches)
        torch.testing.assert_close(model[:3](x).mean((0, 2, 3)), goal, rtol=1e-3, atol=1e-4)
        assert model[1].bias is None and set(model.state_dict()) >= {"2.running_mean"}

    def test_a_layer_with_neither_says_so(self) -> None:
        report = prune_(nn.Sequential(nn.Linear(16, 8, bias=False)), "2:4", BiasCorrection(), [torch.randn(9, 16)])
        assert report["0"].note == "no bias to correct"

    def test_matching_weights_gives_each_channel_its_dense_mean_and_deviation(self) -> None:
        model = nn.Sequential(nn.Linear(64, 8))
        dense = model[0].weight.detach().clone()
        prune_(model, "4:8", MatchMoments())
        for row, old in zip(model[0].weight.detach(), dense, strict=True):
            kept = row[row != 0]
            assert float(kept.mean()) == pytest.approx(float(old.mean()), abs=1e-5)
            assert float(kept.std(unbiased=False)) == pytest.approx(float(old.std(unbiased=False)), rel=1e-3)

    def test_matching_outputs_gives_each_output_its_dense_mean_and_deviation(self) -> None:
        model, batches = nn.Sequential(nn.Linear(32, 8)), [torch.rand(500, 32)]
        with torch.no_grad():
            goal = model(batches[0])
        prune_(model, "2:4", MatchMoments(what="outputs"), batches)
        now = model(batches[0])
        torch.testing.assert_close(now.mean(0), goal.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(now.std(0), goal.std(0), rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match="what="):
            MatchMoments(what="biases")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [AdaPrune, GradientAdaPrune, MeanAbsorption, BiasCorrection, MatchMoments, Regrow])
def test_a_method_inside_a_method_may_be_given_by_its_name(kind: type[Method]) -> None:
    (argument,) = {"selection", "of"} & {field.name for field in dataclasses.fields(kind)}
    name, expected = ("adaprune", AdaPrune()) if kind is Regrow else ("wanda", Wanda())
    assert kind(**{argument: name}) == kind(**{argument: expected})
    for wrong in ("wunda", 3, None, Wanda):
        with pytest.raises(ValueError, match=f"{argument}="):
            kind(**{argument: wrong})


def test_settings_beyond_what_torch_holds_are_refused() -> None:
    for make in (lambda: Wanda(power=10**60), lambda: AdaPrune(damping=10**5000), lambda: ALPS(rho=2**63)):
        with pytest.raises(ValueError, match="more than 63 bits"):
            make()
    Wanda(power=2**62)


@pytest.mark.parametrize(
    "changes",
    [
        {"kept": torch.ones(4, 8)},
        {"mask": torch.ones(8, 4, dtype=torch.bool)},
        {"mask": torch.ones(4, 4).to(torch.float8_e4m3fn)},
        {"mask": torch.ones(4, 4)},
        {"dense": torch.ones(4, 4).to(torch.float8_e4m3fn)},
        {"dense": torch.ones(4, 4, dtype=torch.int64)},
        {"kept": torch.ones(4, 4, dtype=torch.complex64)},
        {"pattern": "5:4"},
        {name: torch.ones((), dtype=torch.bool if name == "mask" else None) for name in ("kept", "dense", "mask")},
    ],
)
def test_mean_absorption_refuses_what_does_not_fit(changes: dict[str, Any]) -> None:
    good = {"kept": torch.ones(4, 4), "dense": torch.ones(4, 4), "mask": torch.ones(4, 4, dtype=torch.bool), "pattern": "2:4"}
    with pytest.raises(ValueError):
        absorb_mean(**good | changes)
