"""Parameter groups: every parameter once, sparse weights with larger steps, and runs of both modes that follow them."""

import pytest
import torch
from torch import nn

from bisparse import finalize_, sparsify_, verify
from bisparse.training import parameter_groups


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32, bias=False), nn.Linear(32, 10))


def entry_of(groups: list[dict], parameter: torch.Tensor) -> tuple[float, float]:
    (found,) = [group for group in groups if any(one is parameter for one in group["params"])]
    return found["lr"], found["weight_decay"]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_rates_and_decays_follow_the_density(mode: str) -> None:
    model = network()
    sparsity = sparsify_(model, "4:8-T", mode=mode, include=["0", "2"], patterns={"2": "2:8"})
    groups = parameter_groups(model, sparsity, 0.01, weight_decay=0.1)
    first, second = (layer.weight for layer in sparsity.layers)
    assert entry_of(groups, first) == (0.02, 0.05)
    assert entry_of(groups, second) == (0.04, 0.025)
    assert entry_of(groups, model[3].weight) == (0.01, 0.1)
    for vector in (model[0].bias, model[1].weight, model[1].bias, model[3].bias):
        assert entry_of(groups, vector) == (0.01, 0.0)
    assert sorted(id(one) for group in groups for one in group["params"]) == sorted(id(one) for one in model.parameters())
    equal = parameter_groups(model, sparsity, 0.01, weight_decay=0.1, scale=False)
    assert entry_of(equal, first) == entry_of(equal, model[3].weight) == (0.01, 0.1)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_first_step_of_adam_is_larger_by_one_over_the_density(mode: str) -> None:
    torch.manual_seed(0)
    model = network()
    sparsity = sparsify_(model, "4:8-T", mode=mode, include=["0", "2"], steps=5)
    optimizer = torch.optim.AdamW(parameter_groups(model, sparsity, 0.01))
    sparsity.attach(optimizer)
    weights, kept = (sparsity.layers[0].weight, model[3].weight), sparsity.layers[0].mask.clone()
    before = [one.detach().clone() for one in weights]
    for _ in range(5):
        nn.functional.cross_entropy(model(torch.randn(64, 32)), torch.randint(10, (64,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if before:
            changes = [(one.detach() - old).abs() for one, old in zip(weights, before, strict=True)]
            moved = [float(changes[0][kept].max()), float(changes[1].max())]
            assert moved == pytest.approx([0.02, 0.01], rel=0.05)
            before = []
    finalize_(model)
    assert verify(model, "4:8-T", include=["0", "2"])


def test_frozen_shared_and_foreign_parameters() -> None:
    model = network()
    model[3] = nn.Linear(32, 32, bias=False)
    model[3].weight = model[2].weight
    model[1].weight.requires_grad_(False)
    sparsity = sparsify_(model, "2:4", mode="static", include="2")
    groups = parameter_groups(model, sparsity, 0.01)
    assert sum(len(group["params"]) for group in groups) == 4
    assert entry_of(groups, model[3].weight) == (0.02, 0.0)
    with pytest.raises(ValueError, match=r"2: its weight is no parameter of this Sequential"):
        parameter_groups(network(), sparsity, 0.01)
    whole = nn.ModuleDict({"inner": model, "head": nn.Linear(4, 4)})
    assert sum(len(group["params"]) for group in parameter_groups(whole, sparsity, 0.01)) == 6
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet"):
        lazy = nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(8))
        parameter_groups(lazy, sparsify_(lazy, "2:4"), 0.01)
    with pytest.raises(ValueError, match="expected what sparsify_ returned"):
        parameter_groups(model, model, 0.01)
    for wrong in ({"lr": 0}, {"lr": float("nan")}, {"lr": 0.1, "weight_decay": -1.0}, {"lr": "fast"}):
        with pytest.raises(ValueError, match=r"lr|weight_decay"):
            parameter_groups(model, sparsity, **wrong)
