"""Errors of columns spread over those after, in blocks, against the same column by column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bisparse import Pattern
from bisparse.pruning import LayerProblem, SparseGPT
from bisparse.pruning.calibration.statistics import Statistics
from bisparse.pruning.methods import sparsegpt
from bisparse.pruning.methods.error_feedback import BLOCK, ColumnSweep, upper_inverse


def moments(size: int) -> Tensor:
    inputs = torch.randn(4 * size, size) @ (torch.eye(size) + torch.randn(size, size) / size**0.5)
    return inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(size)


@pytest.mark.parametrize("size", [1, 2, 33, 256, 257, 600])
def test_the_factor_is_the_upper_one_of_the_inverse(size: int) -> None:
    gram = moments(size)
    upper = upper_inverse(gram, "layer")
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all()) and upper.is_contiguous()
    expected = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True)
    torch.testing.assert_close(upper.double(), expected, rtol=1e-4, atol=1e-5)


def test_singular_moments_name_the_layer_and_the_damping() -> None:
    with pytest.raises(ValueError, match=r"layer: its 3 x 3 input moments are singular at damping 0\.0"):
        upper_inverse(torch.zeros(3, 3), "layer", 0.0)


@pytest.mark.parametrize("widths", [[4], [6], [1], [128], [200], [3, 50, 4, 131]])
@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_are_the_same_as_column_by_column(widths: list[int], ahead: bool) -> None:
    size = 3 * BLOCK + 17
    weight, upper = torch.randn(5, size), upper_inverse(moments(size), "layer")
    expected = weight.double()
    for column in range(size):
        error = (expected[:, column] - expected[:, column].round()) / upper[column, column].double()
        expected[:, column] = expected[:, column].round()
        expected[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :].double()
    sweep, start, turn = ColumnSweep(weight, upper), 0, 0
    while start < size:
        columns = slice(start, min(start + widths[turn % len(widths)], size))
        if ahead:  # as for the scales of a group of columns, of which the first are replaced next
            sweep.current(slice(start, min(start + 2 * BLOCK, size)))
        seen = sweep.current(columns).clone()
        sweep.replace(columns, lambda column, place: column.round())
        assert torch.equal(seen[:, 0].round(), weight[:, start])
        start, turn = columns.stop, turn + 1
    assert float((weight.double() == expected).double().mean()) > 0.99, "but for numbers at the middle of two integers"


@pytest.mark.parametrize("positions", [1, 9])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 8), Pattern(4, 6)], ids=str)
def test_sparsegpt_is_the_same_by_the_kernel_and_band_by_band(
    pattern: Pattern, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 50 * positions
    weight, gram = torch.randn(positions, 24, 50), moments(size)
    statistics = Statistics(1000, gram.diagonal().sqrt()[None], torch.zeros(1, size), gram[None])
    problem = LayerProblem("layer", weight, pattern, None, statistics, positions=positions)
    one = SparseGPT().prune(problem)
    monkeypatch.setattr(sparsegpt, "applies", lambda weight: False)
    other = SparseGPT().prune(problem)
    assert torch.equal(one.solution.mask, other.solution.mask) and one.weight is not None and other.weight is not None
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)
    assert one.error == pytest.approx(other.error, rel=1e-4)
    assert one.error is not None and one.error_before is not None and one.error < one.error_before
