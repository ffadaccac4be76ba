"""Extreme tiles: every mask against exact integers and its own certificate in fractions, and no tile that takes forever."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import oracle
from attack.found import Found, attempt
from bisparse import Pattern, solve
from bisparse.solvers import Exact, MinCostFlow

__all__ = ["attack"]

DTYPES = (
    torch.float32,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
)
SLOWER = 100
"""No tile may take so many times as long as a tile of Gaussian scores of its size."""
LARGEST_FOR_FLOW = 8
"""Sides up to this are solved again by a flow in Python integers."""


def numbers(choose: random.Random, generator: torch.Generator, m: int) -> Tensor:
    """A tile of float64 in a random extreme distribution."""
    normal = torch.randn(m, m, generator=generator, dtype=torch.float64).abs()
    power = torch.randint(-1074, 1000, (m, m), generator=generator).double()
    kinds = [
        lambda: normal,
        lambda: torch.zeros(m, m).double(),
        lambda: torch.full((m, m), choose.choice([1.0, 5e-324, 1e-45, 3.4e38, 1e300, 0.1]), dtype=torch.float64),
        lambda: torch.ldexp(torch.ones(m, m).double(), power),
        lambda: torch.ldexp(normal, torch.randint(-140, 120, (m, m), generator=generator).double()),
        lambda: normal * 1e-310,
        lambda: normal * 1e-40,
        lambda: normal * 1e38,
        lambda: normal.square() * torch.where(torch.rand(m, generator=generator) < 0.1, 1e8, 1.0).double(),
        lambda: torch.randint(0, 3, (m, m), generator=generator).double(),
        lambda: torch.where(torch.rand(m, m, generator=generator) < 0.9, 0, normal),
        lambda: normal.flatten().index_fill(0, torch.tensor(choose.randrange(m * m)), 1e30).view(m, m),
        lambda: torch.rand(m, 1, generator=generator).double() + torch.rand(1, m, generator=generator).double(),
        lambda: torch.rand(m, 1, generator=generator).double() * torch.rand(1, m, generator=generator).double(),
        lambda: torch.arange(m * m).double().view(m, m) * choose.choice([1, 2**40, 2**-60]),
        lambda: (2.0**52 + torch.randint(0, 4, (m, m), generator=generator)).double(),
    ]
    tile = choose.choice(kinds)()
    return tile[torch.randperm(m, generator=generator)]


def as_dtype(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The tile in a dtype, within what it can hold."""
    if dtype.is_floating_point:
        return tile.clamp(max=torch.finfo(dtype).max).to(dtype)
    largest = torch.iinfo(dtype).max
    scaled = tile / max(float(tile.max()), 1e-300) * min(largest, 2.0**62)
    return scaled.clamp(max=float(min(largest, 2**62))).to(dtype)


def best_total(tile: Tensor, n: int, exactly: bool) -> Fraction:
    """The largest total of a mask, by successive augmenting paths in Python's integers (Bellman and Ford)."""
    exact = oracle.fractions(tile)
    unit = max(one.denominator for one in exact.ravel())
    gains = [[int(one * unit) for one in row] for row in exact]
    m = len(gains)
    kept, rows, columns, total = [[False] * m for _ in range(m)], [n] * m, [n] * m, 0
    while True:
        best: list[int | None] = [0 if rows[i] else None for i in range(m)] + [None] * m
        before = [-1] * (2 * m)
        changed = True
        while changed:
            changed = False
            for i in range(m):
                for j in range(m):
                    one, other, gain = (m + j, i, -gains[i][j]) if kept[i][j] else (i, m + j, gains[i][j])
                    start, end = best[one], best[other]
                    if start is not None and (end is None or start + gain > end):
                        best[other], before[other], changed = start + gain, one, True
        ends = [(best[m + j], j) for j in range(m) if columns[j] and best[m + j] is not None]
        if not ends:
            return Fraction(total, unit)
        gain, j = max(ends, key=lambda one: one[0] or 0)
        if gain is None or (gain <= 0 and not exactly):
            return Fraction(total, unit)
        total += gain
        node, columns[j] = m + j, columns[j] - 1
        while before[node] >= 0:
            previous = before[node]
            i, k = (previous, node - m) if previous < m else (node, previous - m)
            kept[i][k] = not kept[i][k]
            node = previous
        rows[node] -= 1


@cache
def usual_time(m: int, n: int, dtype: torch.dtype) -> float:
    scores = as_dtype(torch.rand(m, m, dtype=torch.float64), dtype)
    times = []
    for _ in range(4):  # the first compiles
        start = time.process_time()
        _ = solve(scores, Pattern(n, m, True)).certificate
        times.append(time.process_time() - start)
    return max(min(times), 1e-3)


def attack(seed: int, folder: Path) -> Found:
    """A tile of random size, dtype and distribution, solved cold, from a start, and among other tiles."""
    found, choose, generator = Found(), random.Random(seed), torch.Generator().manual_seed(seed)
    m = choose.choice([*range(1, 17), *(4, 8) * 4, 16, 32, 64, choose.randrange(1, 65)])
    n, exactly, dtype = choose.randint(1, max(1, m - 1)), choose.random() < 0.4, choose.choice(DTYPES)
    if m == 1:
        return found
    exact, pattern = Exact(exactly=exactly), Pattern(n, m, True)
    tile = as_dtype(numbers(choose, generator, m), dtype)
    what = f"{pattern}, exactly={exactly}, {dtype}"
    start = None
    if choose.random() < 0.4:
        start = solve(as_dtype(numbers(choose, generator, m), choose.choice([dtype, torch.float32])), pattern, exact)
    began = time.process_time()
    worked, solution = attempt(found, what, lambda: solve(tile, pattern, exact, warm_start=start))
    took = time.process_time() - began
    if not worked:
        found.add("wrong", f"{what}: refused: {solution}")
        return found
    usual = usual_time(m, n, dtype)
    if took > SLOWER * usual:  # unless the machine was busy, or compiled
        times = []
        for _ in range(3):
            began = time.process_time()
            solve(tile, pattern, exact, warm_start=start)
            times.append(time.process_time() - began)
        if (took := min(times)) > SLOWER * usual:
            found.add("hang", f"{what}: {took:.2f} s for a tile; a usual one takes {usual:.4f} s")
    _check(found, what, tile, solution, n, exactly)
    if m <= 16 and not dtype.is_floating_point and int(tile.max()) < 2**40 and choose.random() < 0.3:
        _, flow = attempt(found, what, lambda: solve(tile, pattern, MinCostFlow(exactly=exactly)))
        if oracle.kept(tile, flow.mask) != oracle.kept(tile, solution.mask) and solution.gap == 0:
            found.add("wrong", f"{what}: OR-tools keeps another total")
    return found


def _check(found: Found, what: str, tile: Tensor, solution: object, n: int, exactly: bool) -> None:
    mask = solution.mask
    sums = torch.cat([mask.sum(0), mask.sum(1)])
    if bool((sums > n).any()) or (exactly and bool((sums != n).any())):
        found.add("wrong", f"{what}: the mask is not feasible")
        return
    value, certificate = oracle.kept(tile, mask), solution.certificate
    worked, gap = attempt(found, f"{what}: gap", lambda: Fraction(solution.gap))
    if not worked:
        return
    unit = Fraction(2) ** -int(certificate.exponent[0])
    prices = [[int(one) * unit for one in side[0].tolist()] for side in (certificate.u, certificate.v)]
    if not exactly and min(min(prices[0]), min(prices[1])) < 0:
        found.add("wrong", f"{what}: a price below 0 proves nothing")
        return
    bound = oracle.dual_bound(tile, *prices, n) - value
    tolerance = bound * Fraction(1, 10**12)
    if not -tolerance <= bound - gap <= max(tolerance, Fraction(5e-324)):
        found.add("wrong", f"{what}: gap {float(gap)!r}, by exact arithmetic {float(bound)!r}")
    scale = max(value, Fraction(np.finfo(np.float64).tiny))
    if bound > scale * Fraction(1, 10**4):
        found.add("wrong", f"{what}: {float(bound / scale):.1e} of what is kept may be missing")
    if len(tile) <= LARGEST_FOR_FLOW:
        missing = best_total(tile, n, exactly) - value
        if missing < 0:
            found.add("wrong", f"{what}: the oracle keeps less")
        if missing > gap * (1 + Fraction(1, 10**12)) + Fraction(5e-324):
            found.add("wrong", f"{what}: {float(missing)!r} is missing, the gap says {float(gap)!r}")
