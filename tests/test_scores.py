"""Scores against numpy, in the dtypes and with the errors that they promise."""

from typing import Any

import numpy as np
import pytest
import torch

from bisparse.scores import hessian, magnitude, taylor, wanda


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_magnitude_is_unsigned_and_wide(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    scores = magnitude(weight)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Signed ranking is the bug of torch's own tile pruning: every negative weight must score as its mirror image.
    assert torch.equal(magnitude(-weight), scores)
    np.testing.assert_array_equal(scores.numpy(), np.abs(weight.double().numpy()))


def test_wanda_scales_columns_by_their_inputs() -> None:
    weight, inputs = np.random.default_rng(0).normal(size=(4, 6)), np.random.default_rng(1).normal(size=(9, 6))
    norm = np.linalg.norm(inputs, axis=0)
    expected = np.abs(weight) * norm[None, :]
    np.testing.assert_allclose(wanda(torch.tensor(weight), torch.tensor(norm)).numpy(), expected, rtol=1e-15)


def test_wanda_takes_a_batch_of_matrices_with_norms_of_their_own() -> None:
    weight, norm = torch.randn(3, 4, 6), torch.rand(3, 6)
    each = torch.stack([wanda(weight[i], norm[i]) for i in range(3)])
    assert torch.equal(wanda(weight, norm), each)


def test_half_precision_does_not_overflow() -> None:
    weight = torch.full((2, 2), 60000.0, dtype=torch.float16)
    assert torch.isfinite(wanda(weight, torch.full((2,), 60000.0, dtype=torch.float16))).all()
    assert torch.isfinite(taylor(weight, weight)).all()
    assert torch.isfinite(hessian(weight, torch.ones(2))).all()


def test_hessian_is_what_removing_a_weight_costs() -> None:
    # Removing w_p and repairing its row costs w_p^2 / [H^-1]_pp: solve that least squares problem outright.
    rng = np.random.default_rng(0)
    inputs, row = rng.normal(size=(40, 5)), rng.normal(size=5)
    gram = inputs.T @ inputs
    scores = hessian(torch.tensor(row)[None], torch.tensor(np.diag(np.linalg.inv(gram)).copy()))[0]
    for removed in range(5):
        others = [i for i in range(5) if i != removed]
        repaired, *_ = np.linalg.lstsq(inputs[:, others], inputs @ row, rcond=None)
        cost = np.sum((inputs[:, others] @ repaired - inputs @ row) ** 2)
        assert float(scores[removed]) == pytest.approx(cost, rel=1e-9)


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    weight, gradient = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(taylor(weight, gradient), (weight * gradient).abs())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"torch\.int8"):
        magnitude(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"\(3, 4\) needs one norm per input"):
        wanda(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        taylor(torch.zeros(3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="damping"):
        hessian(torch.zeros(1, 2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("weight", "norm"), [((3, 4, 4), (2, 4)), ((4, 4), (1, 4)), ((2, 3, 4, 4), (2, 1, 3, 4))])
@pytest.mark.parametrize("score", [wanda, hessian])
def test_batches_that_do_not_fit_are_refused(score: Any, weight: tuple[int, ...], norm: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs one"):
        score(torch.rand(weight), torch.rand(norm) + 0.1)
    assert score(torch.rand(weight), torch.rand(weight[-1]) + 0.1).shape == weight
