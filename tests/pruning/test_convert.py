"""From one mask type to another."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from bisparse import verify
from bisparse.pruning import AdaPrune, Magnitude, Wanda, convert_, fitting_patterns, prune_, violation

ROUTES = [
    ("100%", "4:8-T"),
    ("50%", "4:8"),
    ("4:8", "2:4"),
    ("2:4", "2:4-T"),
    ("4:8", "4:8-T"),
    ("4:8", "4:8-paired"),
    ("4:8", "4:8-seq"),
]


def network() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    mixing = torch.randn(32, 32) / 6
    model = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 24))
    return model, [torch.randn(40, 32) @ mixing for _ in range(10)]


@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
@pytest.mark.parametrize(("origin", "to"), ROUTES)
def test_every_route_ends_in_the_pattern_within_what_was_kept(origin: str, to: str, data: bool) -> None:
    model, batches = network()
    prune_(model, origin)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    report = convert_(model, to, batches=batches if data else None)
    for layer in report:
        weight, old = model.state_dict()[layer.parameter], before[layer.parameter]
        verify(weight, to).check()
        assert not ((weight != 0) & (old == 0)).any(), "nothing may re-grow"
        assert layer.violated_groups is not None and layer.time_s > 0
        if data:
            assert layer.error is not None and layer.error <= layer.error_before + 1e-6
        else:
            kept = weight != 0
            assert torch.equal(weight[kept], old[kept])


def test_the_report_holds_the_violation_of_the_mask_as_it_was() -> None:
    model, _ = network()
    prune_(model, "4:8")
    expected = {name: violation(model.get_submodule(name).weight, "2:4") for name in ("0", "2")}
    report = convert_(model, "2:4")
    for layer in report:
        assert (layer.violated_weights, layer.violated_groups) == (expected[layer.name].weights, expected[layer.name].groups)
        assert layer.violated_weights > 0
        found = expected[layer.name]
        assert (layer.unstructured_weights, layer.unstructured_groups) == (found.predicted_weights, found.predicted_groups)
        assert (layer.origin, layer.origin_weights) == (
            "4:8",
            pytest.approx(9 / 70),
        ) and layer.origin_groups == found.origin_groups
        assert layer.fitted == "3:4"
    again = convert_(model, "2:4")
    assert all(layer.violated_weights == 0 and layer.density == report[layer.name].density for layer in again)


@pytest.mark.parametrize("to", ["4:8-paired", "2:4-seq", "30%"])
def test_the_violation_is_told_at_every_structure(to: str) -> None:
    model, _ = network()
    prune_(model, "50%")
    kept = {name: int((model.get_submodule(name).weight != 0).sum()) for name in ("0", "2")}
    for layer in convert_(model, to):
        dropped = 1 - layer.density * layer.size / kept[layer.name]
        assert layer.violated_weights == pytest.approx(dropped, abs=0.02) and layer.violated_weights > 0.05
        assert (layer.unstructured_weights is None) == (to == "30%") and layer.origin == ""


def test_conversion_without_violation_and_without_data_changes_nothing() -> None:
    model, _ = network()
    prune_(model, "2:4")
    before = copy.deepcopy(model.state_dict())
    convert_(model, "4:8")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["wanda", "adaprune", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["50%", "2:4", "2:4-T", "16:32-T", "4:8-seq", "4:8-paired"])
def test_weights_of_dead_inputs_are_kept_where_the_pattern_allows_them(pattern: str, method: str) -> None:
    """Their scores are zero, as those of weights that were pruned before."""
    model, batches = network()
    with torch.no_grad():
        model[0].bias[:18] = -1e3
    prune_(model, pattern)
    before = [model[number].weight != 0 for number in (0, 2)]
    convert_(model, pattern, method, batches)
    for number, kept in zip((0, 2), before, strict=True):
        assert int(((model[number].weight != 0) ^ kept).sum()) == 0
    convert_(model, "1:4", method, batches)
    verify(model[2].weight, "1:4").check()
    assert not bool(((model[2].weight != 0) & ~before[1]).any())


@pytest.mark.parametrize("to", ["2:4", "2:4-T", "4:8-paired"])
def test_regrowth_keeps_what_is_kept_fills_free_places_and_lowers_the_error(to: str) -> None:
    model, batches = network()
    prune_(model, "30%", Wanda(), batches)
    plain, grown = copy.deepcopy(model), copy.deepcopy(model)
    without = convert_(plain, to, AdaPrune(damping=0.01), batches, order="parallel")
    with_ = convert_(grown, to, AdaPrune(damping=0.01), batches, order="parallel", regrow=True)
    for name in ("0", "2"):
        old, new = plain.get_submodule(name).weight, grown.get_submodule(name).weight
        verify(new, to).check()
        assert with_[name].density > without[name].density
        assert not ((old != 0) & (new == 0)).any()
        assert with_[name].error < without[name].error
        assert "re-grown" in with_[name].note


def test_regrowth_needs_data_and_a_method_that_fits() -> None:
    model, batches = network()
    with pytest.raises(ValueError, match="requires batches"):
        convert_(model, "2:4", regrow=True)
    with pytest.raises(ValueError, match="AdaPrune"):
        convert_(model, "2:4", Magnitude(), batches, regrow=True)
    with pytest.raises(ValueError, match="pass batches"):
        convert_(model, "2:4", Wanda())


def test_layers_get_the_sparsest_pattern_they_fit() -> None:
    model, batches = network()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.08)
    patterns = fitting_patterns(model, 4, confidence=0.9)
    assert set(patterns) == {"0"}
    report = convert_(model, "2:4", batches=batches, patterns=patterns)
    assert report["0"].pattern == str(patterns["0"]) and report["2"].pattern == "2:4"
    verify(model[0].weight, patterns["0"]).check()


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, batches = network()
    before = copy.deepcopy(model.state_dict())
    batches[3][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        convert_(model, "2:4", batches=batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_arguments_come_in_the_order_of_prune() -> None:
    own, others = ([*inspect.signature(one).parameters] for one in (convert_, prune_))
    assert [name for name in own if name in others] == [name for name in others if name in own]
    assert own[:4] == others[:4] == ["model", "pattern", "method", "batches"]


def test_prune_and_convert_take_names_and_say_how_much_of_the_model_they_pruned() -> None:
    for function in (prune_, convert_):
        model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 16))
        report = function(model, "4:8-T", "magnitude", solver="greedy")
        assert report["1"].pattern == "4:8-T" and "1 layers (1.6% of all parameters)" in str(report)
