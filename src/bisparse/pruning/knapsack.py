"""The multiple-choice knapsack: one option per item, minimal total cost within a capacity, with a bound that proves it.

Dynamic programming over the items with states (size, cost), pruned in three ways that keep the optimum: states that another one
dominates in both are dropped, and so are states and options whose Lagrangian bound, at the price of capacity that solves the
linear relaxation, exceeds the cost of a known choice. Few states remain for a network.

Guarantee: the choice is optimal unless more than `MAX_STATES` states remain at once; then the bound limits its distance to the
optimum.
Cost: items x options x states. Sizes and costs are floats; whole numbers are added exactly below 2^53.
Source: Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979); Pisinger, EJOR 83 (1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "choose"]

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

MAX_STATES = 200_000
ROUNDING = 1e-9
"""Maximum rounding error of sums, relative to the costs."""


@dataclass(frozen=True)
class Choice:
    """The chosen option per item, with a proof."""

    options: tuple[int, ...]
    cost: float
    size: float
    bound: float
    """A lower bound on the cost of every choice within the capacity."""
    relaxed: float
    """The bound of the linear relaxation, where options may be mixed."""
    price: float
    """The saving per additional unit of capacity in that relaxation."""

    @property
    def gap(self) -> float:
        """The maximum saving of another choice, as a fraction of the cost; 0 = proved optimal."""
        return max(0.0, self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


@dataclass(frozen=True)
class _Item:
    """The undominated options of an item, by increasing size and decreasing cost."""

    sizes: Numbers
    costs: Numbers
    indices: Indices


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], capacity: float) -> Choice:
    """Choose one option per item, with minimal total cost and a total size of at most the capacity.

    Args:
        costs: per item, the cost of each option.
        sizes: per item, the size of each option; not negative.

    Raises:
        ValueError: an item without options, numbers that are negative or not finite, or a capacity below the total of the
            smallest options.

    >>> choice = choose([[5, 1], [4, 3]], [[1, 3], [1, 2]], 4)
    >>> choice.options, choice.cost, choice.bound
    ((1, 0), 5.0, 5.0)
    """
    items = [_undominated(own_costs, own_sizes) for own_costs, own_sizes in zip(costs, sizes, strict=True)]
    least = sum(float(item.sizes[0]) for item in items)
    if not least <= capacity:
        raise ValueError(f"the smallest options have a total size of {least:g}, more than the capacity of {capacity:g}")
    price, start = _relaxation(items, capacity)
    relaxed = sum(float((item.costs + price * item.sizes).min()) for item in items) - price * capacity
    found, bound = _search(items, capacity, price, relaxed, start)
    cost = sum(float(item.costs[option]) for item, option in zip(items, found, strict=True))
    size = sum(float(item.sizes[option]) for item, option in zip(items, found, strict=True))
    options = tuple(int(item.indices[option]) for item, option in zip(items, found, strict=True))
    return Choice(options, cost, size, min(cost, max(bound, relaxed)), min(relaxed, cost), price)


def _undominated(costs: Sequence[float], sizes: Sequence[float]) -> _Item:
    own_costs, own_sizes = np.asarray(costs, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if own_costs.ndim != 1 or own_costs.shape != own_sizes.shape or len(own_costs) == 0:
        raise ValueError(f"an item has {own_costs.shape} costs and {own_sizes.shape} sizes: expected one of each per option")
    for name, values in (("cost", own_costs), ("size", own_sizes)):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name}s {values.tolist()}: expected finite numbers >= 0")
    order = np.lexsort((own_costs, own_sizes))
    kept = order[_falling(own_costs[order])]
    return _Item(own_sizes[kept], own_costs[kept], kept)


def _falling(costs: Numbers) -> Indices:
    """Indices at which costs, sorted by increasing size, are below all previous ones."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(costs)[:-1]))
    return np.flatnonzero(costs < before)


def _relaxation(items: Sequence[_Item], capacity: float) -> tuple[float, list[int]]:
    """The price of capacity that solves the linear relaxation, and a feasible choice, by steps along the hulls, best first."""
    steps: list[tuple[float, int, int, int]] = []
    for number, item in enumerate(items):
        corners = _hull(item)
        for one, other in pairwise(corners):
            slope = (item.costs[one] - item.costs[other]) / (item.sizes[other] - item.sizes[one])
            steps.append((-float(slope), number, one, other))
    steps.sort()
    chosen = [0] * len(items)
    room = capacity - sum(float(item.sizes[0]) for item in items)
    price = 0.0
    for slope, number, one, other in steps:
        growth = float(items[number].sizes[other] - items[number].sizes[one])
        if chosen[number] == one and growth <= room:
            chosen[number], room = other, room - growth
        elif price == 0.0:
            price = -slope
    return price, chosen


def _hull(item: _Item) -> list[int]:
    """Corners of the lower convex hull of an item's options."""
    corners: list[int] = []
    for index in range(len(item.sizes)):
        while len(corners) > 1:
            first, last = corners[-2], corners[-1]
            rise = (item.costs[last] - item.costs[first]) * (item.sizes[index] - item.sizes[first])
            if rise < (item.costs[index] - item.costs[first]) * (item.sizes[last] - item.sizes[first]):
                break
            corners.pop()
        corners.append(index)
    return corners


def _search(items: Sequence[_Item], capacity: float, price: float, relaxed: float, start: list[int]) -> tuple[list[int], float]:
    """The best choice of positions in `items`, and a bound on the cost of every choice."""
    known = sum(float(item.costs[option]) for item, option in zip(items, start, strict=True))
    slack = known - relaxed + ROUNDING * (abs(known) + abs(relaxed))
    room_needed = np.cumsum([0.0] + [float(item.sizes[0]) for item in reversed(items)])[::-1]
    sizes, costs, regrets = np.zeros(1), np.zeros(1), np.zeros(1)
    lost = np.inf
    trail: list[tuple[Indices, Indices]] = []
    for number, item in enumerate(items):
        priced = item.costs + price * item.sizes
        regret = priced - priced.min()
        options = np.flatnonzero(regret <= slack)
        states = len(sizes)
        sizes = (sizes[:, None] + item.sizes[options]).ravel()
        costs = (costs[:, None] + item.costs[options]).ravel()
        regrets = (regrets[:, None] + regret[options]).ravel()
        parents = np.repeat(np.arange(states), len(options))
        taken = np.tile(options, states)
        kept = np.flatnonzero((regrets <= slack) & (sizes + room_needed[number + 1] <= capacity))
        kept = kept[np.lexsort((costs[kept], sizes[kept]))]
        kept = kept[_falling(costs[kept])]
        if len(kept) > MAX_STATES:
            order = np.argsort(regrets[kept], kind="stable")
            lost = min(lost, float(regrets[kept[order[MAX_STATES]]]))
            kept = np.sort(kept[order[:MAX_STATES]])
        sizes, costs, regrets = sizes[kept], costs[kept], regrets[kept]
        trail.append((parents[kept], taken[kept]))
    bound = relaxed + lost
    if len(costs) == 0 or float(costs.min()) >= known:
        return start, min(known, bound)
    at = int(costs.argmin())
    best = float(costs[at])
    found: list[int] = []
    for parents, taken in reversed(trail):
        found.append(int(taken[at]))
        at = int(parents[at])
    return found[::-1], min(best, bound)
