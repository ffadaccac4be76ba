"""Decay in units of the whole run: lambda times the learning rates sums up to it, whatever the schedule and the length."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from bisparse import sparsify_
from bisparse.training import FixedDecay
from bisparse.training.decay import DEFAULT_TOTAL, TotalDecay

SCHEDULES = {
    "constant": lambda share: 0.1,
    "cosine": lambda share: 0.1 * 0.5 * (1 + math.cos(math.pi * share)),
    "warm-up": lambda share: 0.1 * min(1.0, share / 0.2),
    "steps": lambda share: 0.1 if share < 0.5 else 0.01,
}


@pytest.mark.parametrize("steps", [20, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_lambda_times_the_learning_rates_sums_up_to_the_total(name, steps):
    decay = TotalDecay(3.0, steps)
    rates = [SCHEDULES[name](step / steps) for step in range(steps)]
    found = [decay.rate(step, rate) for step, rate in enumerate(rates)]
    total = sum(own * rate for own, rate in zip(found, rates, strict=True))
    assert total <= 3.0 + 1e-9
    assert total == pytest.approx(3.0, rel=1e-9) if name in ("constant", "warm-up") else total > 1.5
    assert decay.rate(steps, 0.1) == 0.0  # a run that goes on beyond its length does not decay on


def trained(
    method: str, decay: object, steps: int, length: int, rate: float = 0.1, by: type[torch.optim.Optimizer] = torch.optim.SGD
) -> float:
    """How much pruned weights have shrunk under a loss whose gradient is zero."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False)
    sparsity = sparsify_(model, "2:4-T", method=method, decay=decay, steps=length, refresh=10_000)
    optimizer = by([{"params": model.parameters(), "weight_decay": 0.0}], lr=rate)
    sparsity.attach(optimizer)
    layer = sparsity.layers[0]
    before = layer.weight.detach()[~layer.mask].norm()
    for _ in range(steps):
        (0 * model(torch.ones(1, 16))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(layer.weight.detach()[~layer.mask].norm() / before)


@pytest.mark.parametrize("method", ["masked-decay", "sr-ste"])
def test_pruned_weights_shrink_by_the_total_whatever_the_length_and_the_rate(method):
    found = [trained(method, 3.0, steps, steps, rate) for steps, rate in ((50, 0.1), (200, 0.1), (200, 0.001))]
    expected = [(1 - 3.0 / steps) ** steps for steps in (50, 200, 200)]
    assert found == pytest.approx(expected, rel=1e-3)
    assert trained(method, None, 100, 100) == pytest.approx((1 - DEFAULT_TOTAL / 100) ** 100, rel=1e-3)  # the default of SGD
    assert trained(method, FixedDecay(0.5), 10, 100) == pytest.approx((1 - 0.05) ** 10, rel=1e-4)


class Rateless(torch.optim.Optimizer):
    """Descent by signs at a rate that it computes, as Adafactor of transformers does with lr=None."""

    def __init__(self, groups: list[dict[str, object]], lr: float) -> None:
        super().__init__(groups, {"lr": None, "eps": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(0.1 * weight.grad.sign())


@pytest.mark.parametrize(
    "by",
    [
        torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
        torch.optim.Adafactor, torch.optim.Muon, torch.optim.Rprop, Rateless,
    ],
)  # fmt: skip
@pytest.mark.parametrize("decay", [3.0, None])
def test_a_total_is_the_same_with_optimizers_that_divide_gradients_by_their_size(by, decay):
    total = DEFAULT_TOTAL if decay is None else decay
    runs = ((50, 0.1), (150, 0.001))[: 1 if decay is None else 2]  # the default is a total like any other
    found = [trained("masked-decay", decay, steps, steps, rate, by) for steps, rate in runs]
    assert found == pytest.approx([(1 - total / steps) ** steps for steps, _ in runs], rel=1e-3)


def test_adams_moments_do_not_see_a_total_but_a_fixed_lambda(mlp, step):
    moments = {}
    given = copy.deepcopy(mlp)
    for name, decay in (("none", FixedDecay(0.0)), ("total", 3.0), ("fixed", FixedDecay(3.0))):
        model = copy.deepcopy(given)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sparsity = sparsify_(model, "2:4-T", decay=decay, steps=10).attach(optimizer)
        step(model, optimizer, 0)
        moments[name] = optimizer.state[sparsity.layers[0].weight]["exp_avg"]
    assert torch.equal(moments["none"], moments["total"]) and not torch.equal(moments["none"], moments["fixed"])


def test_a_total_needs_to_know_the_run(mlp):
    sparsity = sparsify_(mlp, "2:4-T", decay=3.0)
    with pytest.raises(ValueError, match="pass steps="):
        sparsity.attach(torch.optim.SGD(mlp.parameters(), lr=0.1))
    sparsity.steps = 10  # as trainers' callbacks do
    sparsity.attach(torch.optim.SGD(mlp.parameters(), lr=0.1))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_run_has_a_length(mlp, steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        sparsify_(mlp, "2:4-T", steps=steps)


def test_a_resumed_run_decays_on_where_it_was(mlp, step):
    given = copy.deepcopy(mlp)

    def begin(model):
        sparsity = sparsify_(model, "2:4-T", decay=3.0, steps=8)
        return sparsity, torch.optim.SGD(model.parameters(), lr=0.1)

    sparsity, optimizer = begin(mlp)
    sparsity.attach(optimizer)
    for number in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        step(mlp, optimizer, number)
        if number == 3:
            saved = copy.deepcopy((mlp.state_dict(), sparsity.state_dict()))
    resumed, other = begin(given)
    given.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.attach(other)
    for number in range(4, 8):
        other.param_groups[0]["lr"] = 0.1 / (number + 1)
        step(given, other, number)
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in mlp.state_dict().items())


@pytest.mark.parametrize(("decay", "warned"), [(None, 1), (3.0, 1), (FixedDecay(2e-4), 0), (0.0, 0)])
def test_a_run_beyond_the_steps_that_were_given_warns_where_nothing_is_left_to_decay(decay, warned):
    model = nn.Linear(16, 16)
    sparsity = sparsify_(model, "2:4-T", decay=decay, steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    sparsity.detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsity.attach(optimizer)
    assert ["do not decay any more" in str(one.message) for one in caught] == [True] * warned
