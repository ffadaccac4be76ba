"""ALPS and rounding: its masks may depend on the last bits of the inputs; its errors stay well below those of the mask alone."""

import pytest
import torch
from torch import nn

import bisparse
from bisparse.pruning import ALPS, AdaPrune, Method


def pruned(method: Method, scale: float = 1.0, *, backwards: bool = False) -> tuple[torch.Tensor, float]:
    """The mask and the output error of a layer whose inputs are correlated."""
    torch.manual_seed(0)
    model, mix = nn.Sequential(nn.Linear(256, 256)), torch.randn(256, 256) * torch.logspace(0, -2, 256)
    batches = [(torch.randn(64, 256) @ mix) * scale for _ in range(8)]
    report = bisparse.prune_(model, "4:8-T", method, batches[::-1] if backwards else batches, include="*")
    assert report[0].error is not None and bisparse.verify(model[0].weight, "4:8-T")
    return model[0].weight != 0, report[0].error


def test_runs_that_differ_by_rounding_have_errors_that_are_alike_and_smaller_than_adaprunes() -> None:
    runs = [pruned(ALPS()), pruned(ALPS(), 1 + 1e-6), pruned(ALPS(), backwards=True)]
    errors = [error for _, error in runs]
    assert max(errors) < 1.1 * min(errors) and max(errors) < pruned(AdaPrune())[1]
    changed = [float((mask != runs[0][0]).float().mean()) for mask, _ in runs[1:]]
    assert max(changed) < 0.2


def test_the_documentation_says_so() -> None:
    assert "sensitive to rounding" in str(ALPS.__doc__)


def test_masks_of_adaprune_do_not_depend_on_the_scale_of_the_inputs() -> None:
    (one, error), (other, again) = pruned(AdaPrune()), pruned(AdaPrune(), 1 + 1e-6)
    assert float((one != other).float().mean()) < 1e-3 and error == pytest.approx(again, rel=1e-2)
