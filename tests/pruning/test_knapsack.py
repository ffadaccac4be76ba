"""The knapsack against every choice there is, and against HiGHS; and bounds that hold where it may stop early."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from bisparse.pruning import knapsack
from bisparse.pruning.knapsack import choose

numbers = st.integers(0, 12).map(float)
items = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4)


def every_choice(costs: list[list[float]], sizes: list[list[float]], capacity: float) -> float:
    return min(
        sum(cost[j] for cost, j in zip(costs, choice, strict=True))
        for choice in itertools.product(*(range(len(own)) for own in costs))
        if sum(size[j] for size, j in zip(sizes, choice, strict=True)) <= capacity
    )


def highs(costs: list[list[float]], sizes: list[list[float]], capacity: float) -> float:
    flat = np.concatenate([np.array(own) for own in costs])
    one_each = np.zeros((len(costs), len(flat)))
    start = 0
    for number, own in enumerate(costs):
        one_each[number, start : start + len(own)] = 1
        start += len(own)
    fits = LinearConstraint(np.concatenate([np.array(own) for own in sizes])[None], ub=capacity)
    limits = [LinearConstraint(one_each, 1, 1), fits]
    found = milp(flat, constraints=limits, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
    return float(found.fun)


@settings(max_examples=150, deadline=None)
@given(st.lists(items, min_size=1, max_size=5), st.integers(0, 40))
def test_choice_is_the_best_of_all(options: list[list[tuple[float, float]]], capacity: int) -> None:
    costs, sizes = ([[one[k] for one in own] for own in options] for k in (0, 1))
    if sum(map(min, sizes)) > capacity:
        with pytest.raises(ValueError, match="more than the capacity"):
            choose(costs, sizes, capacity)
        return
    found = choose(costs, sizes, capacity)
    assert found.cost == every_choice(costs, sizes, capacity) == found.bound and found.gap == 0
    assert found.cost == sum(own[j] for own, j in zip(costs, found.options, strict=True))
    assert found.size == sum(own[j] for own, j in zip(sizes, found.options, strict=True)) <= capacity
    assert found.relaxed <= found.cost + 1e-9


def network(layers: int, seed: int) -> tuple[list[list[float]], list[list[float]]]:
    """Costs and sizes as of a network: few shapes, densities 1/2, 1/2, 3/4, 1, and losses that fall with them."""
    generator = np.random.default_rng(seed)
    costs, sizes = [], []
    for _ in range(layers):
        weights = int(generator.choice([576 * 192, 576 * 576, 576 * 1536]))
        loss = generator.lognormal(-2, 1)
        costs.append([loss, loss * generator.uniform(0.5, 1), loss * generator.uniform(0.05, 0.3), 0.0])
        sizes.append([weights / 2, weights / 2, weights * 3 / 4, float(weights)])
    return costs, sizes


@pytest.mark.parametrize("fraction", [0.5, 0.61, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("layers", [12, 210])
def test_choice_for_a_network_is_that_of_highs(layers: int, fraction: float) -> None:
    costs, sizes = network(layers, seed=int(100 * fraction))
    capacity = fraction * sum(own[-1] for own in sizes)
    found = choose(costs, sizes, capacity)
    assert found.gap == 0 and found.size <= capacity
    assert found.cost == pytest.approx(highs(costs, sizes, capacity), rel=1e-7, abs=1e-12)


def test_bound_holds_where_states_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    early = 0
    for _ in range(20):
        sizes = generator.uniform(1, 2, (12, 4)).tolist()
        costs = [[10 - 4 * size + noise for size, noise in zip(own, generator.uniform(0, 0.5, 4), strict=True)] for own in sizes]
        monkeypatch.setattr(knapsack, "MAX_STATES", 200_000)
        best = choose(costs, sizes, 17.5)
        assert best.gap == 0
        monkeypatch.setattr(knapsack, "MAX_STATES", 3)
        found = choose(costs, sizes, 17.5)
        assert found.bound <= best.cost + 1e-9 and found.cost >= best.cost - 1e-9 and found.size <= 17.5
        early += found.gap > 0
    assert early  # otherwise nothing was dropped


@pytest.mark.parametrize(
    ("costs", "sizes"), [([[]], [[]]), ([[float("nan")]], [[1.0]]), ([[1.0]], [[-1.0]]), ([[1.0, 2.0]], [[1.0]])]
)
def test_numbers_that_are_none_are_refused(costs: list[list[float]], sizes: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"an item has|expected finite"):
        choose(costs, sizes, 5)
