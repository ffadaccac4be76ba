"""A budget over layers: what each gets, that the total holds, and what is refused."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bisparse
from bisparse import prune_, verify
from bisparse.checkpoint import read_sidecar, save, verify_checkpoint
from bisparse.layers import find_layers
from bisparse.pruning import AdaPrune, Budget
from bisparse.pruning.sensitivity import output_sensitivity

PATTERNS = ["2:4-T", "4:8-T", "6:8-T", "dense"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)
    )
    with torch.no_grad():
        model[2].weight[torch.rand(64, 64) < 0.6] *= 1e-3  # loses little at half the weights
    return model.eval()


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    scale = torch.rand(32) * 3
    return [torch.randn(64, 32) * scale for _ in range(6)]


def lost(model: nn.Module, dense: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    """By layer, the fraction of its output energy that its zeros lose on the dense network's inputs."""
    found, x = {}, inputs
    for number, layer in enumerate(dense):
        if isinstance(layer, nn.Linear):
            mask = model[number].weight != 0
            found[str(number)] = float(
                ((layer.weight.detach() * ~mask) @ x.T).double().square().sum()
                / (layer.weight.detach() @ x.T).double().square().sum()
            )
        x = layer(x)
    return found


def kept(model: nn.Module) -> float:
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    return sum(int((one != 0).sum()) for one in weights) / sum(one.numel() for one in weights)


@pytest.mark.parametrize("fraction", [0.5, 0.6, 0.8])
def test_budget_holds_and_each_layer_obeys_its_pattern(fraction: float) -> None:
    model = network()
    report = prune_(model, budget=fraction, patterns=PATTERNS, include=["*"])
    assert kept(model) <= fraction
    for layer in report:
        verify(model.get_parameter(layer.parameter), layer.pattern, name=layer.name).check()
        assert f"{layer.pattern} under the budget of {100 * fraction:.4g} % of the weights" in layer.note
    dense = {one.name: one.reason for one in report.left_dense}
    assert len(report) + len(dense) == 4 and all("dense under the budget" in reason for reason in dense.values())
    assert "proved optimal" in report.notes[0]


def test_a_budget_without_room_is_said_and_one_with_sparser_patterns_uses_it() -> None:
    assert "add sparser patterns" in prune_(network(), budget="50%", patterns=["2:4", "6:8", "dense"], include=["*"]).notes[0]
    report = prune_(network(), budget="50%", patterns=["1:4", "2:4", "6:8", "dense"], include=["*"])
    assert "offer sparser" not in report.notes[0] and len({layer.pattern for layer in report}) + len(report.left_dense) > 1


@pytest.mark.parametrize("data", [False, True])
def test_the_mixture_loses_least_of_all_mixtures(data: bool) -> None:
    """Against every assignment, each applied by itself and measured on the network's outputs."""
    given = batches() if data else None
    x = torch.cat(batches())
    costs: dict[tuple[str, str], float] = {}
    sizes: dict[tuple[str, str], int] = {}
    dense = network()
    names = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)]
    for pattern in PATTERNS:
        for name in names:
            weight = dense.get_parameter(f"{name}.weight")
            costs[name, pattern], sizes[name, pattern] = 0.0, weight.numel()
            if pattern == "dense":
                continue
            model = network()
            if data:  # the mask of the module's own protocol: w^2 times the mean square of each input
                seen = dense[: int(name)](x)
                scores = weight.detach().square() * seen.square().mean(0)
            else:
                scores = weight.detach().square()
            mask = bisparse.solve(scores, pattern).mask
            with torch.no_grad():
                model.get_parameter(f"{name}.weight").mul_(mask)
            sizes[name, pattern] = int(weight.numel() * {"2": 0.5, "4": 0.5, "6": 0.75}[pattern[0]])
            share = float((weight.detach() * ~mask).double().square().sum() / weight.detach().double().square().sum())
            costs[name, pattern] = lost(model, dense, x)[name] if data else share
    total = sum(sizes[name, "dense"] for name in names)
    weighed = dict(costs)
    if data:
        sensitivity, x = output_sensitivity(dense, find_layers(dense, ["*"])[0], batches()), torch.cat(batches())
        assert isinstance(sensitivity, dict)
        for name, pattern in costs:
            weighed[name, pattern] = 0.0
            if pattern != "dense":
                weight, seen = dense.get_parameter(f"{name}.weight").detach(), dense[: int(name)](x).detach()
                mask = bisparse.solve(weight.square() * seen.square().mean(0), pattern).mask
                error = ((weight * ~mask) @ seen.T).double().square().mean(1)
                weighed[name, pattern] = float((error * sensitivity[name]).sum())
    best = min(
        sum(weighed[pair] for pair in zip(names, choice, strict=True))
        for choice in itertools.product(PATTERNS, repeat=len(names))
        if sum(sizes[pair] for pair in zip(names, choice, strict=True)) <= 0.7 * total
    )
    model = network()
    report = prune_(model, budget="70%", patterns=PATTERNS, batches=given, include=["*"])
    got = {layer.name: layer.pattern for layer in report} | {one.name: "dense" for one in report.left_dense}
    assert sum(weighed[name, got[name]] for name in names) == pytest.approx(best, rel=1e-3)
    mean = sum(costs[name, got[name]] for name in names) / len(names)
    assert float(re.search(r"mean loss ([\d.e-]+)", report.notes[0])[1]) == pytest.approx(mean, rel=2e-3)


class Rescaled(nn.Module):
    """The function does not depend on `exponent`, the size of the weights of the layer in the middle does."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.exponent = exponent
        with torch.no_grad():
            self.middle.weight.mul_(2.0**exponent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x))) * 2.0**-self.exponent))


@pytest.mark.parametrize("exponent", [-100, -74, 70])
def test_the_size_of_weights_changes_no_choice(exponent: int) -> None:
    chosen = []
    batches = [torch.randn(64, 16) for _ in range(3)]
    for one in (0, exponent):
        torch.manual_seed(0)
        report = prune_(Rescaled(one), method="wanda", batches=batches, budget=0.5, patterns=["2:8", "4:8", "6:8"])
        chosen.append([layer.pattern for layer in report])
    assert chosen[0] == chosen[1]


def test_bytes_count_positions_and_times_are_those_given() -> None:
    model = network()
    prune_(model, budget=Budget(bytes=17 / 32), patterns=["2:4", "dense"], include=["*"])  # half of 32 + 2 bits
    assert kept(model) == 0.5
    with pytest.raises(ValueError, match=r"too small: the sparsest patterns need 0.5312 of the dense layers"):
        prune_(network(), budget=Budget(bytes=0.53), patterns=["2:4", "dense"], include=["*"])

    def times(name: str, shape: tuple[int, ...], pattern: str) -> float:
        return 1.0 if pattern == "dense" else 0.25 if name == "2" else 2.0

    report = prune_(network(), budget=Budget(time=0.9, times=times), patterns=["2:4", "dense"], include=["*"])
    assert [layer.name for layer in report] == ["2"]  # sparse is slower elsewhere


def test_with_data_the_method_fits_what_the_budget_chose() -> None:
    model, dense, x = network(), network(), torch.cat(batches())
    report = prune_(model, None, AdaPrune(), iter(batches()), budget="60%", patterns=PATTERNS, include=["*"])
    assert kept(model) <= 0.6 and report.method == "adaprune"
    masked = network()
    prune_(masked, budget="60%", patterns=PATTERNS, batches=batches(), include=["*"])
    errors = [float((one(x) - dense(x)).square().sum()) for one in (model, masked)]
    assert errors[0] < errors[1]


def test_a_folder_of_several_patterns_is_verified_by_its_sidecar(tmp_path: Path) -> None:
    model = network()
    report = prune_(model, budget="65%", patterns=PATTERNS, include=["*"])
    used = {layer.pattern for layer in report}
    assert len(used) > 1
    save(model, tmp_path / "out", report=report)
    found = verify_checkpoint(tmp_path / "out")
    assert found and {str(one.pattern) for one in found.layers} == used
    assert {layer.pattern for layer in read_sidecar(tmp_path / "out").report} == used
    assert all(name in (tmp_path / "out" / "README.md").read_text() for name in used)
    assert all(name in str(report) for name in used)


def test_layers_that_no_pattern_fits_or_no_data_reaches_stay_dense_outside_the_budget() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 18), nn.Linear(18, 16)).eval()
    report = prune_(model, budget="50%", patterns=["4:8", "dense"], remainder="dense", include=["*"])
    assert [layer.name for layer in report] == ["0", "1"] and report.left_dense[0].name == "2"
    model.add_module("unused", nn.Linear(16, 16))
    report = prune_(
        model, None, "wanda", [torch.randn(8, 16)] * 3, budget="52%", patterns=["2:4", "dense"], include=["*"],
        forward=lambda net, x: net[2](net[1](net[0](x))),
    )  # fmt: skip
    assert [layer.name for layer in report] == ["0", "1", "2"]
    assert [(one.name, "no calibration batch" in one.reason) for one in report.left_dense] == [("unused", True)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": "50%"}, "needs a list of patterns"),
        ({"budget": "50%", "patterns": "2:4"}, "needs a list of patterns"),
        ({"budget": "50%", "patterns": ["dense"]}, "at least one pattern that prunes"),
        ({"budget": "50%", "patterns": ["2:5x"]}, "2:5x"),
        ({"budget": "x", "patterns": ["2:4"]}, "percentage of the weights"),
        ({"budget": 50, "patterns": ["2:4"]}, "above 0 and at most 1"),
        ({"budget": "0%", "patterns": ["2:4"]}, "above 0 and at most 1"),
        ({"budget": "40%", "patterns": ["2:4"]}, "too small: the sparsest patterns need 0.5"),
        ({"budget": "100%", "patterns": ["2:4", "dense"]}, "leaves every layer dense"),
        ({"budget": "50%", "patterns": ["2:4"], "pattern": "2:4"}, "patterns= lists those to choose from"),
        ({"budget": "50%", "patterns": ["2:4"], "scores": lambda name, weight: weight.abs()}, "does not work with budget="),
        ({"patterns": ["2:4"]}, "no pattern"),
        ({"pattern": "2:4", "patterns": ["2:4"]}, "a list of patterns needs budget="),
    ],
)
def test_wrong_budgets_are_refused_and_nothing_is_changed(arguments: dict, said: str) -> None:
    model, before = network(), network().state_dict()
    with pytest.raises(ValueError, match=re.escape(said)):
        prune_(model, **arguments, include=["*"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("limits", [{}, {"weights": 0.5, "bytes": 0.5}, {"time": 0.5}, {"weights": 0.5, "times": max}])
def test_a_budget_has_one_limit(limits: dict) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(**limits)


@pytest.mark.parametrize("pattern", ["6:8", "6:8-T", "4:6", "4:6-T"])
def test_budgets_take_patterns_beyond_one_half(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24))
    report = prune_(model, budget=0.9, patterns=[pattern, "dense"], include=["*"])
    assert kept(model) <= 0.9 and {layer.pattern for layer in report} == {pattern}
