"""The 2:4 estimate of the output gradient: at most two kept, unbiased, and of the least variance there is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from bisparse import finalize_, sparsify_, verify
from bisparse.training.mvue import MVUELinear, keep_probabilities, mvue_2_4

GROUPS = [
    [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0], [9.0, 1.0, 1.0, 0.5], [-5.0, 0.1, 5.0, -0.1],
    [0.05, -0.1, 10.0, 5.0], [1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 7.0], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0],
]  # fmt: skip


def test_at_most_two_of_four_tokens_in_each_column():
    gradient = torch.randn(64, 33)
    estimate = mvue_2_4(gradient)
    assert verify(estimate.t(), "2:4") and estimate.shape == gradient.shape
    assert bool((estimate.view(16, 4, 33) != 0).sum(1).eq(2).all())  # exactly two, where four are not zero
    exact = torch.zeros(8, 3).index_put_((torch.tensor([0, 3, 5]),), torch.randn(3, 3))
    assert torch.equal(mvue_2_4(exact), exact)  # what is 2:4 already has no variance


@pytest.mark.parametrize("group", GROUPS)
def test_unbiased_within_four_standard_errors(group):
    draws = 160_000
    numbers = torch.tensor(group, dtype=torch.float64)
    generator = torch.Generator().manual_seed(11)
    estimates = mvue_2_4(numbers[:, None].expand(4, draws).contiguous(), generator)
    probability = keep_probabilities(numbers)
    variance = torch.where(probability > 0, numbers**2 * (1 / probability.clamp(min=1e-300) - 1), 0.0)
    error = (estimates.mean(1) - numbers).abs()
    assert bool((error <= 4.5 * (variance / draws).sqrt() + 1e-12).all()), (error, variance)
    # and the spread is the one that the probabilities promise, so that the bound above is the right one
    found = estimates.var(1)
    assert torch.allclose(found, variance, rtol=0.1, atol=1e-9)


def test_the_test_of_bias_would_see_a_bias():
    draws = 40_000
    numbers = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(11)
    biased = mvue_2_4(numbers[:, None].expand(4, draws).contiguous(), generator) * 1.03
    variance = numbers**2 * (1 / keep_probabilities(numbers) - 1)
    assert not bool(((biased.mean(1) - numbers).abs() <= 4.5 * (variance / draws).sqrt()).all())


def least_variance(group: list[float]) -> float:
    """Minimum of the total variance over all laws of a pair of kept entries and their values, by brute force.

    A law: a probability for each of the 6 pairs. Given an entry's probability p of being kept, unbiasedness fixes the mean of
    its value to g/p, and a constant value has the least variance, g^2 (1/p - 1). What is left is the choice of 6 probabilities.
    """
    g = np.array(group)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    holds = np.array([[i in pair for pair in pairs] for i in range(4)], dtype=float)

    def variance(law: np.ndarray) -> float:
        keep = holds @ law
        return float(sum(x * x * (1 / p - 1) for x, p in zip(g, np.clip(keep, 1e-9, 1), strict=True) if x))

    best = math.inf
    for seed in range(4):
        start = np.random.default_rng(seed).dirichlet(np.ones(6))
        result = minimize(
            variance, start, bounds=[(0, 1)] * 6, constraints={"type": "eq", "fun": lambda law: law.sum() - 1},
            options={"maxiter": 500, "ftol": 1e-12},
        )  # fmt: skip
        best = min(best, float(result.fun))
    return best


@pytest.mark.parametrize("group", GROUPS[:4] + GROUPS[5:8])
def test_least_variance_against_brute_force(group):
    numbers = torch.tensor(group, dtype=torch.float64)
    probability = keep_probabilities(numbers)
    ours = float(torch.where(numbers != 0, numbers**2 * (1 / probability.clamp(min=1e-300) - 1), 0.0).sum())
    brute = least_variance(group)
    assert ours <= brute * (1 + 1e-6) + 1e-9
    assert ours >= brute - 1e-3 * max(1.0, brute)  # nor below what can be: the probabilities would not be feasible


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_probabilities_are_a_law_of_two_kept(group):
    numbers = torch.tensor(group, dtype=torch.float64)
    probability = keep_probabilities(numbers)
    nonzero = int((numbers != 0).sum())
    assert float(probability.sum()) == pytest.approx(min(2, nonzero), abs=1e-6)
    assert bool((probability >= 0).all() and (probability <= 1).all())
    below = (probability < 1) & (numbers != 0)
    if int(below.sum()) > 1:  # p_i = |g_i| / tau with one tau
        tau = numbers.abs()[below] / probability[below]
        assert torch.allclose(tau, tau[0].expand_as(tau), rtol=1e-6)


def test_the_layer_changes_the_weight_gradient_only_and_not_on_average():
    torch.manual_seed(0)
    plain = nn.Linear(16, 8)
    layer = MVUELinear(16, 8)
    layer.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 6, 16)
    upstream = torch.randn(2, 6, 8)
    one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected = plain(one)
    assert torch.equal(layer(other), expected)
    expected.backward(upstream)
    rounds, total, square = 800, torch.zeros(8, 16, dtype=torch.float64), torch.zeros(8, 16, dtype=torch.float64)
    for _ in range(rounds):
        layer.zero_grad()
        other.grad = None
        layer(other).backward(upstream)
        total += layer.weight.grad
        square += layer.weight.grad.double() ** 2
    assert torch.allclose(other.grad, one.grad, atol=1e-6)
    assert torch.allclose(layer.bias.grad, plain.bias.grad, atol=1e-5)
    mean = total / rounds
    spread = ((square / rounds - mean**2).clamp(min=0) / rounds).sqrt()
    assert not torch.allclose(layer.weight.grad, plain.weight.grad, atol=1e-3)
    assert bool(((mean - plain.weight.grad).abs() <= 5 * spread + 1e-6).all())


def test_mvue_is_an_option_of_a_run_and_gone_at_its_end(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", mvue=True, refresh=5)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.02)
    sparsity.attach(optimizer)
    first = step(mlp, optimizer, 0)
    assert min(step(mlp, optimizer, 0) for _ in range(60)) < first / 2
    finalize_(mlp)
    assert type(mlp[0]) is nn.Linear and verify(mlp, "4:8-T")


def test_autocast(mlp):
    sparsify_(mlp, "4:8-T", mvue=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mlp(torch.randn(8, 16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert mlp[0].parametrizations.weight.original.grad.dtype == torch.float32


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_gradient_is_not_hidden_by_the_estimate(broken):
    model = nn.Linear(8, 8, bias=False)
    sparsity = sparsify_(model, "4:8-T", mvue=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    upstream = torch.randn(16, 8)
    upstream[5, 3] = broken
    model(torch.randn(16, 8)).backward(upstream)
    with pytest.raises(ValueError, match="holds NaN or infinite numbers"):
        optimizer.step()


def test_the_estimate_ends_with_the_run_although_a_parametrization_stays(mlp):
    sparsify_(mlp, "2:4-T", mvue=True)
    nn.utils.parametrizations.spectral_norm(mlp[0])
    finalize_(mlp)
    inputs, gradients = torch.randn(8, 16), []
    mlp.eval()  # spectral_norm does not move then
    for _ in range(2):
        mlp.zero_grad()
        mlp(inputs).square().sum().backward()
        gradients.append(mlp[0].parametrizations.weight.original.grad.clone())
    assert torch.equal(*gradients) and not any(isinstance(module, MVUELinear) for module in mlp)
    nn.utils.parametrize.remove_parametrizations(mlp[0], "weight")
    assert type(mlp[0]) is nn.Linear
