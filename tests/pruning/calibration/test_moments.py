"""Moments of inputs whose mean is far larger than what they vary by, and what methods make of such inputs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from bisparse import solve, verify
from bisparse.layers import find_layers
from bisparse.process_group import Ranks
from bisparse.pruning import ALPS, AdaPrune, Magnitude, Method, SparseGPT, prune_
from bisparse.pruning.calibration.moments import Moments
from bisparse.pruning.calibration.statistics import Statistic, Statistics
from bisparse.pruning.methods.least_squares import Reconstruction, reconstruct

ALL = frozenset({Statistic.NORM, Statistic.MEAN, Statistic.GRAM, Statistic.CROSS})


def accumulated(batches: list[Tensor], dense: list[Tensor] | None = None, ranks: Ranks | None = None) -> Statistics:
    layer = find_layers(nn.Sequential(nn.Linear(batches[0].shape[1], 8)))[0][0]
    moments = Moments(layer, ALL)
    for number, batch in enumerate(batches):
        moments.add(batch, None if dense is None else dense[number])
    moments.share(ranks or Ranks())
    return moments.statistics()


def about_mean(z: Tensor, x: Tensor) -> Tensor:
    z, x = z.double(), x.double()
    return (z - z.mean(0)).T @ (x - x.mean(0)) / len(x)


def worst(found: Tensor, exact: Tensor, z: Tensor, x: Tensor) -> float:
    """The largest error of a covariance, in units of the two deviations."""
    return float(((found.double() - exact).abs() / (z.double().std(0)[:, None] * x.double().std(0)[None])).max())


@pytest.mark.parametrize("first", ["like the others", "of zeros", "of one column"])
@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1000.0, 0.3), (1.0, 3e-4)])
def test_covariances_are_exact_whatever_the_mean_and_whatever_came_first(mean: float, deviation: float, first: str) -> None:
    offset = mean * (1 + torch.rand(24))
    batches = [offset + deviation * torch.randn(40, 24) for _ in range(8)]
    batches[0] = {"of zeros": torch.zeros(40, 24), "of one column": batches[0][:1]}.get(first, batches[0])
    dense = [batch + deviation * torch.randn_like(batch) for batch in batches]
    found = accumulated(batches, dense)
    x, z = torch.cat(batches), torch.cat(dense)
    assert found.columns == len(x)
    assert found.covariance is not None and found.cross_covariance is not None and found.dense_covariance is not None
    assert worst(found.covariance[0], about_mean(x, x), x, x) < 1e-5
    assert worst(found.cross_covariance[0], about_mean(z, x), z, x) < 1e-5
    assert worst(found.dense_covariance[0], about_mean(z, z), z, z) < 1e-5
    torch.testing.assert_close(found.gram[0], (x.double().T @ x.double() / len(x)).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cross[0], (z.double().T @ x.double() / len(x)).float(), rtol=1e-5, atol=1e-5)


def test_held_out_data_of_another_mean_join_without_cancelling() -> None:
    x, y = 1000 + torch.randn(30, 16), 1002 + torch.randn(10, 16)
    own, other = accumulated([x]), accumulated([y])
    both = Statistics(own.columns, own.norm, own.mean, own.covariance, held_out=other).merged()
    every = torch.cat([x, y])
    assert both.covariance is not None
    assert worst(both.covariance[0], about_mean(every, every), every, every) < 1e-4


class Threads(Ranks):
    """Two ranks as threads of one process."""

    barrier = threading.Barrier(2)
    handed: ClassVar[dict[int, Any]] = {}

    rank, size = 0, 2

    def all(self, own: Any) -> list[Any]:
        self.handed[self.rank] = own
        self.barrier.wait(timeout=30)
        found = [self.handed[rank] for rank in range(2)]
        self.barrier.wait(timeout=30)
        return found

    def sum_(self, tensors: dict[str, Tensor]) -> None:
        found = self.all({key: one.clone() for key, one in tensors.items()})
        for key in found[0] | found[1]:
            tensors[key] = sum(one[key] for one in found if key in one)


class Second(Threads):
    rank = 1


@pytest.mark.parametrize("idle", [False, True], ids=["both have data", "one has none"])
def test_ranks_with_means_of_their_own_join_to_the_moments_of_all(idle: bool) -> None:
    pieces = [[1000 + torch.randn(30, 16)], [1003 + torch.randn(20, 16), 999 + torch.randn(5, 16)]]
    if idle:
        pieces[0] = [torch.zeros(0, 16)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(accumulated, pieces, [None, None], [Threads(), Second()]))
    every = torch.cat([batch for batches in pieces for batch in batches])
    for found in both:
        assert found.columns == len(every) and found.covariance is not None
        torch.testing.assert_close(found.mean[0], every.mean(0), rtol=1e-6, atol=1e-6)
        assert worst(found.covariance[0], about_mean(every, every), every, every) < 1e-4


def relative_to_deviation(model: nn.Module, x: Tensor, dense: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).double() - dense).norm() / (dense - dense.mean(0)).norm())


@pytest.mark.parametrize("method", [AdaPrune(), AdaPrune(damping=1e-4), ALPS(), ALPS(damping=1.0)], ids=repr)
@pytest.mark.parametrize(
    "kept, mean, deviation",
    [(0, 1.0, 3e-4), (0, 1.0, 1e-4), (8, 1000.0, 0.3), (0, 101.0, 0.03)],
    ids=["3e-4 about 1", "1e-4 about 1", "8 channels at 1000", "0.03 about 101"],
)
def test_a_fit_is_not_worse_than_the_mask_however_little_inputs_vary(
    method: Method, kept: int, mean: float, deviation: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    shifted = kept or 256
    offset = mean * (1 + torch.rand(shifted))

    def batch() -> Tensor:
        x = torch.randn(64, 256)
        x[:, :shifted] = offset + deviation * torch.randn(64, shifted)
        return x

    batches = [batch() for _ in range(10)]
    x = torch.cat(batches)
    with torch.no_grad():
        dense, weight, bias = model.double()(x.double()), model[0].weight.float().clone(), model[0].bias.float().clone()
    model.float()
    layer = prune_(model, "4:8-T", method, batches)["0"]
    assert layer.error is not None and layer.error < 1
    assert float(model[0].weight.detach().abs().max()) < 0.3
    found = relative_to_deviation(model.double(), x.double(), dense)
    with torch.no_grad():
        masked = torch.where(model[0].weight != 0, weight.double(), 0.0)
        model[0].weight.copy_(masked)
        model[0].bias.copy_(bias + (weight.double() - masked) @ x.double().mean(0))
    assert found <= relative_to_deviation(model, x.double(), dense) * 1.01


@pytest.mark.parametrize("linear_solver", ["factorisation", "conjugate gradient"])
def test_the_fit_of_shifted_inputs_is_that_of_the_inputs(linear_solver: Any) -> None:
    torch.manual_seed(0)
    mixing, offset = torch.randn(48, 48) / 7, 300 * torch.rand(48)
    batches = [torch.randn(64, 48) @ mixing for _ in range(10)]
    plain, shifted = nn.Sequential(nn.Linear(48, 48)), nn.Sequential(nn.Linear(48, 48))
    shifted.load_state_dict(plain.state_dict())
    dense = plain[0].weight.detach().clone()
    # A mask that does not depend on the inputs.
    method = AdaPrune(selection=Magnitude(), damping=1e-3, linear_solver=linear_solver)
    prune_(plain, "2:4", method, batches)
    prune_(shifted, "2:4", method, [batch + offset for batch in batches])
    moved = float((plain[0].weight - dense * (plain[0].weight != 0)).detach().norm())
    assert moved > 0.3, "the fit has something to do"
    assert float((plain[0].weight - shifted[0].weight).detach().norm()) < 0.02 * moved


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 3.0])
def test_a_fit_that_went_wrong_is_not_kept(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if the equations were not solved: two rows are replaced by nonsense."""

    def wrong(problem: Any, mask: Tensor, **options: Any) -> Reconstruction:
        solved = reconstruct(problem, mask, **options)
        solved.weight[0, 1:3] = error * mask[0, 1:3]
        return solved

    monkeypatch.setattr("bisparse.pruning.methods.adaprune.reconstruct", wrong)
    model = nn.Sequential(nn.Linear(16, 8))
    before = model[0].weight.detach().clone()
    layer = prune_(model, "2:4", AdaPrune(damping=0.01), [torch.randn(64, 16) @ torch.randn(16, 16) for _ in range(6)])["0"]
    weight = model[0].weight.detach()
    assert torch.equal(weight[1:3], before[1:3] * (weight[1:3] != 0))
    assert not torch.equal(weight[0], before[0] * (weight[0] != 0))
    assert "2 of 8 outputs keep their weights" in layer.note
    assert layer.error < 1


@pytest.mark.parametrize("method", [AdaPrune(), AdaPrune(damping=1.0), ALPS(), SparseGPT(), SparseGPT(refit=True)], ids=repr)
@pytest.mark.parametrize("width", [32, 256])
def test_a_layer_behind_dead_units_keeps_its_largest_weights_and_says_so(method: Method, width: int) -> None:
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    weight = model[2].weight.detach().clone()
    report = prune_(model, "2:4", method, [torch.randn(16, 32) for _ in range(10)])
    assert verify(model, "2:4")
    assert torch.equal(model[2].weight, weight * solve(weight.abs(), "2:4").mask)
    assert report["2"].error == 0.0
    assert report["2"].note.startswith("no input varies in the calibration data")
    assert "varies" not in report["0"].note


@pytest.mark.parametrize("method", [AdaPrune(), ALPS(), SparseGPT()], ids=repr)
def test_a_dead_group_of_a_convolution_does_not_stop_the_others(method: Method) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=4, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[0].bias[:8] = -1
    weight = model[2].weight.detach().clone()
    layer = prune_(model, "2:4", method, [torch.randn(4, 8, 6, 6) for _ in range(10)], include=["2"])["2"]
    now = model[2].weight.detach()
    assert torch.equal(now[:8], weight[:8] * (now[:8] != 0))
    assert not torch.equal(now[8:], weight[8:] * (now[8:] != 0))
    assert layer.error < layer.error_before
    assert "no input of 1 of 4 groups varies" in layer.note


@pytest.mark.parametrize("method", [AdaPrune(), ALPS(), SparseGPT()], ids=repr)
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("count", [1, 6])
def test_one_column_over_and_over_is_enough_to_go_on(method: Method, width: int, count: int) -> None:
    model, column = nn.Sequential(nn.Linear(width, 32)), torch.randn(1, width)
    with torch.no_grad():
        dense = model(column)
    prune_(model, "2:4", method, [column] * count)
    with torch.no_grad():
        assert float((model(column) - dense).norm() / dense.norm()) < 0.02
    assert float(model[0].weight.detach().abs().max()) < 1


def test_equations_without_a_solution_name_the_layer_and_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    batches = [torch.randn(1, 16), torch.randn(1, 16)]
    with pytest.raises(ValueError, match=r"^0: the normal equations .* a larger damping"):
        prune_(model, "2:4", AdaPrune(damping=0.0, linear_solver="factorisation"), batches)
