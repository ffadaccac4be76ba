"""A block of columns pruned by the compiled kernel against the definition, written out column by column in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bisparse import Pattern, solve
from bisparse.kernels.column_sweep.dispatch import applies, prune_columns


def defined(weight: Tensor, upper: Tensor, columns: slice, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mask of the columns, and errors, by the definition."""
    weight, upper = weight.double().clone(), upper.double()
    mask = torch.zeros(len(weight), columns.stop - columns.start, dtype=torch.bool)
    errors = torch.zeros(mask.shape, dtype=torch.float64)
    for start in range(columns.start, columns.stop, m):
        stop = min(start + m, columns.stop)
        scores = (weight[:, start:stop] / upper.diagonal()[start:stop]).square()
        kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
        own = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, kept, True)
        mask[:, start - columns.start : stop - columns.start] = own
        for column in range(start, stop):
            error = torch.where(own[:, column - start], 0.0, weight[:, column] / upper[column, column])
            errors[:, column - columns.start] = error
            weight[:, column:stop] -= error[:, None] * upper[column, column:stop]
            weight[~own[:, column - start], column] = 0.0
            weight[:, stop : columns.stop] -= error[:, None] * upper[column, stop : columns.stop]
    return weight, mask, errors


def factor(size: int) -> Tensor:
    upper = torch.randn(size, size).triu() / size**0.5
    upper.diagonal().copy_(0.5 + torch.rand(size))
    return upper


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "1:2", "2:6", "7:8", "3:3", "5:16"])
@pytest.mark.parametrize(("rows", "size", "columns"), [
    (33, 64, slice(0, 64)), (1, 48, slice(0, 48)), (7, 300, slice(120, 250)), (16, 50, slice(3, 50)), (4, 20, slice(7, 9)),
])  # fmt: skip
def test_it_is_the_definition(pattern: str, rows: int, size: int, columns: slice) -> None:
    plain = Pattern(*map(int, pattern.split(":")))
    before, upper = torch.randn(rows, size), factor(size)
    weight, mask, scores = before.clone(), torch.ones(rows, size, dtype=torch.bool), torch.full((rows, size), -1.0)
    errors = prune_columns(weight, upper, mask, scores, columns, plain.n, plain.m)
    expected, kept, wrong = defined(before, upper, columns, plain.n, plain.m)
    assert errors is not None and torch.equal(mask[:, columns], kept)
    torch.testing.assert_close(errors.double(), wrong, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert bool((weight[:, columns][~kept] == 0).all())
    outside = torch.ones(size, dtype=torch.bool)
    outside[columns] = False
    assert torch.equal(weight[:, outside], before[:, outside]), "other columns are not touched"
    assert bool(mask[:, outside].all()) and bool((scores[:, outside] == -1).all())


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 8)])
def test_of_equal_scores_it_keeps_those_that_solve_keeps(pattern: Pattern) -> None:
    weight = torch.randint(-2, 3, (64, 70)).float()
    mask, scores = torch.zeros(64, 70, dtype=torch.bool), torch.zeros(64, 70)
    prune_columns(weight.clone(), torch.eye(70), mask, scores, slice(0, 70), pattern.n, pattern.m)
    assert torch.equal(scores, weight.square())
    assert torch.equal(mask, solve(weight.square(), pattern).mask)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_scores_that_are_not_finite_are_reported(value: float) -> None:
    weight = torch.ones(3, 8)
    weight[2, 5] = value
    mask, scores = torch.zeros(3, 8, dtype=torch.bool), torch.zeros(3, 8)
    assert prune_columns(weight, torch.eye(8), mask, scores, slice(0, 8), 2, 4) is None


def test_threads_do_not_change_the_result() -> None:
    weight, upper = torch.randn(500, 128), factor(128)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            own, mask, scores = weight.clone(), torch.zeros(500, 128, dtype=torch.bool), torch.zeros(500, 128)
            errors = prune_columns(own, upper, mask, scores, slice(0, 128), 2, 4)
            assert errors is not None
            results.append((own, mask, scores, errors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_which_weights_it_takes() -> None:
    weight = torch.randn(4, 8)
    assert applies(weight)
    assert not any(applies(one) for one in (weight.double(), weight.bfloat16(), weight.to("meta"), weight[:0]))
