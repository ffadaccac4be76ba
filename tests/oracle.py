"""Slow, obvious answers to compare with. Imports nothing of the library but Pattern.

Scores are turned into Python integers or fractions first, so that what is said to be equal is equal.
"""

from fractions import Fraction
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_array

from bisparse.pattern import Pattern


def fractions(tile: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor, exactly, as an array of fractions."""
    numbers = tile.detach().cpu()
    numbers = numbers.double() if numbers.is_floating_point() else numbers.long()
    return np.vectorize(Fraction, otypes=[object])(np.array(numbers.tolist(), dtype=object)).reshape(tile.shape)


def kept(tile: torch.Tensor, mask: torch.Tensor) -> Fraction:
    """Total of the scores that a mask keeps."""
    return Fraction(sum((fractions(tile)[mask.cpu().numpy()]).tolist(), Fraction(0)))


@cache
def feasible_masks(m: int, n: int, exactly: bool) -> np.ndarray:
    """Every mask of a tile, (K, M, M) bool, whose rows and columns keep at most n, or exactly n."""
    rows = [row for row in product((False, True), repeat=m) if (sum(row) == n if exactly else sum(row) <= n)]
    partial: list[list[tuple[bool, ...]]] = [[]]
    for _ in range(m):
        partial = [
            [*mask, row] for mask in partial for row in rows if all(sum(column) <= n for column in zip(*mask, row, strict=True))
        ]
    masks = np.array(partial)
    return masks[(masks.sum(1) == n).all(1)] if exactly else masks


def closed_form_2to4(tiles: torch.Tensor) -> torch.Tensor:
    """The largest totals of 4 x 4 integer tiles, (B,) int64, with exactly 2 in every row and column (docs/mathematics.md)."""
    h = tiles.long() @ torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    apart = (h[:, :, None] - h[:, None]).abs().amax(-1)
    pairings = [apart[:, a, b] + apart[:, c, d] for a, b, c, d in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))]
    return (tiles.long().sum((1, 2)) + torch.stack(pairings).amax(0)) // 2


def brute_force(tile: torch.Tensor, n: int, exactly: bool = False) -> Fraction:
    """The largest total any mask of a small tile keeps, by trying all of them."""
    m = tile.shape[-1]
    numbers = fractions(tile).ravel()
    unit = max((number.denominator for number in numbers), default=1)
    assert all(unit % number.denominator == 0 for number in numbers)
    integers = np.array([int(number * unit) for number in numbers], dtype=object)
    masks = feasible_masks(m, n, exactly).reshape(-1, m * m)
    if max(integers) < 2**58:
        best = int((masks @ integers.astype(np.int64)).max())
    else:
        best = max(sum(integers[mask]) for mask in masks)
    return Fraction(best, unit)


def linear_program(tiles: torch.Tensor, n: int, exactly: bool = False) -> np.ndarray:
    """The largest total of each tile (B, M, M) by HiGHS: the constraints are totally unimodular, so an LP solves it."""
    count, m, _ = tiles.shape
    scores = tiles.double().cpu().numpy().reshape(count, m * m)
    scale = scores.max(1, keepdims=True)
    scale[scale == 0] = 1
    rows, columns = np.repeat(np.arange(m), m), np.tile(np.arange(m), m)
    one = np.zeros((2 * m, m * m))
    one[rows, np.arange(m * m)] = 1
    one[m + columns, np.arange(m * m)] = 1
    constraints = block_diag([csr_array(one)] * count, format="csr")
    limits = np.full(2 * m * count, n)
    program = {"A_eq": constraints, "b_eq": limits} if exactly else {"A_ub": constraints, "b_ub": limits}
    result = linprog(-(scores / scale).ravel(), bounds=(0, 1), method="highs-ds", **program)
    assert result.status == 0, result.message
    return (result.x.reshape(count, m * m).round() * scores).sum(1)


def dual_bound(tile: torch.Tensor | np.ndarray, u: list[Fraction], v: list[Fraction], n: int) -> Fraction:
    """What no mask of a tile can exceed, by LP duality, from row prices u and column prices v in score units."""
    numbers = fractions(tile) if isinstance(tile, torch.Tensor) else tile
    m = numbers.shape[0]
    slack = sum((max(Fraction(0), numbers[i, j] - u[i] - v[j]) for i in range(m) for j in range(m)), Fraction(0))
    return n * (sum(u, Fraction(0)) + sum(v, Fraction(0))) + slack


def overfull(mask: torch.Tensor, pattern: Pattern) -> list[tuple[str, int, int, int]]:
    """(side, row, group, kept) of every group of one matrix that keeps too many, W before W^T."""
    sides = [("W", mask.tolist())]
    if pattern.transposable:
        sides.append(("W^T", mask.t().tolist()))
    found = []
    for side, rows in sides:
        for index, row in enumerate(rows):
            for group, start in enumerate(range(0, len(row), pattern.m)):
                count = sum(row[start : start + pattern.m])
                if count > pattern.n:
                    found.append((side, index, group, count))
    return found


def best_group(group: torch.Tensor, n: int, kind: str) -> Fraction:
    """The largest total one group may keep: "plain" any n, "seq" all but one window of M - n, "paired" n/2 adjacent pairs."""
    numbers = fractions(group).tolist()
    m = len(numbers)
    if kind == "plain":
        choices = list(combinations(range(m), n))
    elif kind == "seq":
        choices = [[i for i in range(m) if not start <= i < start + m - n] for start in range(n + 1)]
    else:
        choices = [[i for pair in pairs for i in (2 * pair, 2 * pair + 1)] for pairs in combinations(range(m // 2), n // 2)]
    return max(sum((numbers[i] for i in choice), Fraction(0)) for choice in choices)


def proved(q: torch.Tensor, masks: torch.Tensor, u: torch.Tensor, v: torch.Tensor, n: int, exactly: bool) -> torch.Tensor:
    """Whether prices prove the masks of tiles of whole scores (B, M, M): feasible, and the dual bound equals the value."""
    answers = []
    for tile, mask, rows, columns in zip(q, masks, u, v, strict=True):
        numbers, kept_here = (np.array(side.tolist(), dtype=object) for side in (tile, mask.long()))
        row_prices, column_prices = (np.array(side.tolist(), dtype=object) for side in (rows, columns))
        slack = numbers - row_prices[:, None] - column_prices[None, :]
        bound = n * (row_prices.sum() + column_prices.sum()) + np.maximum(slack, 0).sum()
        sums = [*kept_here.sum(0), *kept_here.sum(1)]
        feasible = all(count == n for count in sums) if exactly else max(sums) <= n and min(*row_prices, *column_prices) >= 0
        answers.append(feasible and bound == (numbers * kept_here).sum())
    return torch.tensor(answers, dtype=torch.bool)
