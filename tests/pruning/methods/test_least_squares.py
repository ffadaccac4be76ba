"""Least squares on a support against torch.linalg.lstsq, row by row, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bisparse import solve
from bisparse.pruning.calibration.statistics import CalibrationError, Statistics
from bisparse.pruning.methods.least_squares import DAMPINGS, choose_damping, reconstruct
from bisparse.pruning.methods.least_squares_problem import make_problem, refitted_bias

METHODS = ("factorisation", "conjugate gradient")


def correlated(tokens: int, inputs: int, mean: float = 0.0) -> Tensor:
    return torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + mean


def moments(x: Tensor, z: Tensor | None = None) -> Statistics:
    n, mean = len(x), x.mean(0)
    more = {}
    if z is not None:
        about, dense = x - mean, z - z.mean(0)
        more = {
            "cross_covariance": (dense.T @ about / n)[None],
            "dense_covariance": (dense.T @ dense / n)[None],
            "dense_mean": z.mean(0)[None],
        }
    return Statistics(n, x.square().mean(0).sqrt()[None], mean[None], ((x - mean).T @ (x - mean) / n)[None], **more)


def oracle(weight: Tensor, mask: Tensor, x: Tensor, z: Tensor, ridge: float, bias: bool = False) -> Tensor:
    """min |W z - w x|^2 / n + ridge |w - W|^2 on the support, one row at a time."""
    result = torch.zeros_like(weight, dtype=torch.float64)
    x, z, weight = x.double(), z.double(), weight.double()
    goal = z @ weight.T
    if bias:
        x, goal = x - x.mean(0), goal - goal.mean(0)
    for row in range(len(weight)):
        kept = mask[row].nonzero()[:, 0]
        if len(kept):
            a = torch.cat([x[:, kept] / len(x) ** 0.5, ridge**0.5 * torch.eye(len(kept), dtype=torch.float64)])
            b = torch.cat([goal[:, row] / len(x) ** 0.5, ridge**0.5 * weight[row, kept]])
            result[row, kept] = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("upstream", [False, True], ids=["own inputs", "dense targets"])
@pytest.mark.parametrize("centred", [False, True], ids=["no bias", "bias"])
def test_it_is_the_least_squares_solution_of_every_row(method: str, upstream: bool, centred: bool) -> None:
    x = correlated(200, 24, mean=0.7)
    z = x + 0.3 * torch.randn_like(x) if upstream else x
    weight, mask = torch.randn(10, 24), torch.rand(10, 24) < 0.5
    mask[3] = False
    problem = make_problem(weight[None], moments(x, z if upstream else None), centred=centred)
    damping = 0.02
    solved = reconstruct(problem, mask[None], damping=damping, method=method, tolerance=1e-6, max_iterations=500)
    expected = oracle(weight, mask, x, z, damping * float(problem.scale), centred)
    torch.testing.assert_close(solved.weight[0].double(), expected, rtol=1e-3, atol=2e-4)
    assert not solved.weight[0][~mask].any()
    bias = refitted_bias(None, weight[None], solved.weight, x.mean(0)[None], z.mean(0)[None]) if centred else torch.zeros(10)
    output, goal = x @ solved.weight[0].T + bias, z @ weight.T
    if not centred:
        assert problem.error(solved.weight) == pytest.approx(float((output - goal).norm() / goal.norm()), rel=1e-3)
    else:
        plain = make_problem(weight[None], moments(x, z if upstream else None))
        assert problem.error(solved.weight, plain.energy) == pytest.approx(float((output - goal).norm() / goal.norm()), rel=1e-3)


@pytest.mark.parametrize("problems", [1, 3])
@pytest.mark.parametrize("started", [False, True], ids=["from the masked weight", "from another start"])
def test_rows_that_converge_at_different_iterations(problems: int, started: bool) -> None:
    kept = torch.tensor([0, 1, 2, 5, 20, 39, 40, 3, 0, 40])
    mask = torch.stack([torch.arange(40) < kept[torch.randperm(10)][:, None] for _ in range(problems)])
    inputs = [correlated(200, 40) for _ in range(problems)]
    weight = torch.randn(problems, 10, 40)
    gram = torch.stack([x.T @ x / len(x) for x in inputs])
    mean = torch.zeros(problems, 40)
    problem = make_problem(weight, Statistics(200, mean=mean, covariance=gram))
    start = torch.randn_like(weight) * mask if started else None
    solved = reconstruct(problem, mask, damping=0.02, method="conjugate gradient", tolerance=1e-6, start=start)
    for one, x in enumerate(inputs):
        expected = oracle(weight[one], mask[one], x, x, 0.02 * float(problem.scale[one]))
        torch.testing.assert_close(solved.weight[one].double(), expected, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_ones_returns_the_dense_weight(method: str) -> None:
    x, weight = correlated(100, 16), torch.randn(1, 8, 16)
    solved = reconstruct(make_problem(weight, moments(x)), torch.ones(1, 8, 16, dtype=torch.bool), damping=0.01, method=method)
    torch.testing.assert_close(solved.weight, weight, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10**6), damping=st.sampled_from(DAMPINGS), method=st.sampled_from(METHODS), tokens=st.integers(1, 60))
def test_it_is_never_worse_than_the_mask_alone_on_its_own_data(seed: int, damping: float, method: str, tokens: int) -> None:
    torch.manual_seed(seed)
    x, weight = correlated(tokens, 16, mean=float(seed % 3)), torch.randn(1, 8, 16)
    problem = make_problem(weight, moments(x))
    mask = solve(weight[0].abs(), "2:4").mask[None]
    solved = reconstruct(problem, mask, damping=damping, method=method)
    assert problem.error(solved.weight) <= problem.error(weight * mask) * (1 + 1e-4) + 1e-6


def test_the_solvers_agree_on_groups_of_a_convolution() -> None:
    grams = torch.stack([(a := correlated(80, 12)).T @ a / 80 for _ in range(3)])
    weight, mask = torch.randn(3, 6, 12), torch.rand(3, 6, 12) < 0.5
    problem = make_problem(weight, Statistics(80, mean=torch.zeros(3, 12), covariance=grams))
    one, other = (reconstruct(problem, mask, damping=0.05, method=m, tolerance=1e-6).weight for m in METHODS)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_it_is_deterministic_and_rows_do_not_depend_on_each_other() -> None:
    x, weight, mask = correlated(50, 16), torch.randn(1, 8, 16), torch.rand(1, 8, 16) < 0.5
    problem = make_problem(weight, moments(x))
    for method in METHODS:
        once = reconstruct(problem, mask, damping=0.01, method=method).weight
        assert torch.equal(once, reconstruct(problem, mask, damping=0.01, method=method).weight)
        index = torch.tensor([5, 2])
        few = reconstruct(problem.rows(index), mask[:, index], damping=0.01, method=method).weight
        torch.testing.assert_close(few, once[:, index], rtol=1e-3, atol=1e-4)


def test_fewer_tokens_than_inputs_stay_well_posed_with_damping_and_are_refused_without() -> None:
    x, weight = correlated(3, 16), torch.randn(1, 8, 16)
    problem, mask = make_problem(weight, moments(x)), torch.rand(1, 8, 16) < 0.7
    for method in METHODS:
        solved = reconstruct(problem, mask, damping=1e-3, method=method)
        assert bool(torch.isfinite(solved.weight).all()) and float(solved.weight.abs().max()) < 50
    with pytest.raises(ValueError, match="singular at this damping"):
        reconstruct(problem, mask, damping=0.0, method="factorisation")
    assert bool(torch.isfinite(reconstruct(problem, mask, damping=0.0).weight).all())


def test_inputs_that_are_always_zero_change_nothing() -> None:
    x, weight = correlated(60, 16), torch.randn(1, 8, 16)
    x[:, 5:9] = 0
    mask = torch.rand(1, 8, 16) < 0.5
    for method in METHODS:
        solved = reconstruct(make_problem(weight, moments(x)), mask, damping=0.01, method=method).weight
        torch.testing.assert_close(solved[..., 5:9], (weight * mask)[..., 5:9], rtol=1e-4, atol=1e-5)
    dead = make_problem(weight, moments(torch.zeros(60, 16)))
    for method in ("auto", "conjugate gradient"):
        assert torch.equal(reconstruct(dead, mask, damping=0.0, method=method).weight, weight * mask)
    assert dead.error(weight * mask) == 0.0


def test_nothing_kept_gives_zeros() -> None:
    weight = torch.randn(1, 4, 8)
    for method in METHODS:
        solved = reconstruct(
            make_problem(weight, moments(correlated(9, 8))), torch.zeros(1, 4, 8).bool(), damping=0.1, method=method
        )
        assert not solved.weight.any()


def test_the_held_out_data_choose_more_damping_where_there_is_less_data() -> None:
    mixing = torch.randn(48, 48) / 7
    weight, mask = torch.randn(1, 32, 48), torch.rand(1, 32, 48) < 0.5

    def chosen(tokens: int) -> tuple[float, dict[float, float], float]:
        fit, judge = torch.randn(tokens, 48) @ mixing, torch.randn(2000, 48) @ mixing
        part, held = make_problem(weight, moments(fit)), make_problem(weight, moments(judge))
        damping, errors = choose_damping(part, held, mask)
        return damping, errors, held.error(reconstruct(part, mask, damping=1e-4).weight)

    few, errors, overfitted = chosen(20)
    many, _, _ = chosen(20_000)
    assert few > many
    assert errors[few] == min(errors.values()) < overfitted


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_damping_must_be_a_number(damping: float) -> None:
    problem = make_problem(torch.randn(1, 4, 8), moments(correlated(9, 8)))
    with pytest.raises(ValueError, match="expected a number >= 0"):
        reconstruct(problem, torch.ones(1, 4, 8).bool(), damping=damping)


def test_moments_that_do_not_fit_the_weight_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"conv1: moments of shape .* do not fit"):
        make_problem(torch.randn(1, 4, 8), moments(correlated(9, 6)), name="conv1")
    with pytest.raises(CalibrationError, match="collected no input moments"):
        make_problem(torch.randn(1, 4, 8), Statistics(0), name="conv1")
