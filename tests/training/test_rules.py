"""Rules of what pruned weights do, as values: names, annealed decay, hysteresis."""

import pytest
import torch
from torch import nn

from bisparse import finalize_, solve, sparsify_, verify
from bisparse.training import RULES, AnnealedDecay, FixedDecay, GradientRule


def state_after(steps=6, **how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsity = sparsify_(model, "4:8-T", refresh=2, steps=steps, include="*", **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    sparsity.attach(optimizer)
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, sparsity


@pytest.mark.parametrize(
    "rule, arguments",
    [
        ("ste", {"method": "ste"}),
        ("sr-ste", {"method": "sr-ste"}),
        ("masked-decay", {}),
        (GradientRule("sr-ste", decay=FixedDecay(0.5)), {"method": "sr-ste", "decay": FixedDecay(0.5)}),
        (GradientRule(decay=2.0), {"decay": 2.0}),
    ],
)
def test_a_rule_is_what_its_options_are(rule, arguments):
    one, _ = state_after(rule=rule)
    other, _ = state_after(**arguments)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_annealed_decay_grows_over_the_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    sparsity = sparsify_(model, "2:4", include="*", refresh=100, steps=4, rule=GradientRule(decay=AnnealedDecay(0.8, start=0.4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    layer = sparsity.layers[0]
    for step in range(4):
        before = layer.weight.detach().clone()
        (model(torch.zeros(1, 8)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate = 0.4 + 0.4 * step / 4
        assert torch.allclose(layer.weight[~layer.mask], before[~layer.mask] * (1 - 0.1 * rate))
        assert torch.equal(layer.weight[layer.mask], before[layer.mask])
    other = nn.Sequential(nn.Linear(8, 8))
    sparsity = sparsify_(other, "2:4", include="*", rule="ast")
    with pytest.raises(ValueError, match="steps="):
        sparsity.attach(torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("margin", [0.05, 0.5])
def test_hysteresis_is_the_best_mask_for_raised_scores(margin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32))
    sparsity = sparsify_(model, "4:8-T", include="*", rule=GradientRule("ste", margin=margin))
    layer = sparsity.layers[0]
    assert torch.equal(layer.mask, solve(layer.weight.detach().abs(), "4:8-T").mask)
    old = layer.mask.clone()
    with torch.no_grad():
        layer.weight.add_(0.3 * layer.weight.std() * torch.randn_like(layer.weight))
    expected = solve(layer.weight.detach().abs() * (1 + margin * old), "4:8-T").mask
    plain = solve(layer.weight.detach().abs(), "4:8-T").mask
    sparsity.refresh()
    assert torch.equal(layer.mask, expected)
    stuck, moved = int((expected ^ old).sum()), int((plain ^ old).sum())
    assert stuck < moved if margin == 0.5 else stuck <= moved
    finalize_(model)
    assert verify(model[0].weight, "4:8-T")


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_trains(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    sparsity = sparsify_(model, "2:4", include="*", refresh=1, steps=3, rule=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    sparsity.attach(optimizer)
    for _ in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    finalize_(model)
    assert verify(model[0].weight, "2:4")


def test_bad_rules():
    model = nn.Sequential(nn.Linear(16, 16))
    for arguments, message in [
        ({"rule": "nothing"}, "expected one of 'ste'"),
        ({"rule": "ste", "method": "sr-ste"}, "one or the other"),
        ({"rule": "ste", "decay": 1.0}, "one or the other"),
        ({"rule": "ste", "mode": "static"}, "one or the other"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparsify_(model, "2:4", include="*", **arguments)
    for wrong in ({"method": "x"}, {"margin": -1.0}, {"method": "ste", "decay": 1.0}, {"method": "s-ste", "margin": 0.1}):
        with pytest.raises(ValueError, match="GradientRule"):
            GradientRule(**wrong)
    with pytest.raises(ValueError, match="AnnealedDecay"):
        AnnealedDecay(-1.0)


def test_a_small_margin_counts_in_bfloat16():
    model = nn.Sequential(nn.Linear(16, 32)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    given = torch.tensor([False, True, False, True]).repeat(32, 4)
    sparsity = sparsify_(model, "2:4", include="*", rule=GradientRule("ste", margin=0.003))  # 1.003 is 1 in bfloat16
    layer = sparsity.layers[0]
    layer.use_mask(given)
    sparsity.refresh()
    assert torch.equal(layer.mask, given)
