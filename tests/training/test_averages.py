"""Averages of weights: torch's, those of timm's three update rules, averaged state_dicts, and snapshots, which are none."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bisparse import Schedule, finalize_, sparsify_, verify
from bisparse.training import plain_state_dict


class Timm(nn.Module):
    """timm's ModelEma (v1), ModelEmaV2 and ModelEmaV3, as far as they update."""

    def __init__(self, model: nn.Module, version: int) -> None:
        super().__init__()
        self.module, self.version = copy.deepcopy(model).eval(), version

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        theirs = model.state_dict()
        for name, own in self.module.state_dict().items():
            value = theirs[name].detach()
            if self.version < 3 or own.is_floating_point():
                own.copy_(0.5 * own + 0.5 * value)
            else:
                own.copy_(value)


AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "swa": AveragedModel,
    "swa, buffers": lambda model: AveragedModel(model, use_buffers=True),
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "ema, buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "timm v1 and v2": lambda model: Timm(model, 2),
    "timm v3": lambda model: Timm(model, 3),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize(("mode", "method", "pattern"), [
    ("dynamic", "masked-decay", "4:8-T"), ("dynamic", "s-ste", "2:4"), ("static", "masked-decay", "4:8-T"),
])  # fmt: skip
def test_an_average_has_the_masks_of_the_model_that_it_averages(mlp, step, name, mode, method, pattern):
    sparsity = sparsify_(mlp, pattern, mode=mode, method=method, refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    average = AVERAGES[name](mlp)
    for number in range(6):
        step(mlp, optimizer, number)
        average.update_parameters(mlp)
        if method != "s-ste":  # whose zeros are those of the averaged weight
            assert bool((average.module[0].weight != 0)[~sparsity.layers[0].mask].sum() == 0)
    inputs = torch.randn(3, 16)
    expected, state = average.module(inputs), plain_state_dict(average.module)
    finalize_(mlp)  # before the average: it still knows the last masks
    finalize_(average.module)
    assert verify(average.module, pattern) and not torch.equal(average.module[0].weight, mlp[0].weight)
    assert torch.allclose(average.module(inputs), expected)
    density = float((average.module[0].weight != 0).float().mean())
    assert density <= 0.5 and (method == "s-ste" or density > 0.45)
    assert state.keys() == average.module.state_dict().keys()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_follows_the_phases(mlp, step, use_buffers):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1, schedule=Schedule(dense_until=2, freeze_at=4))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    average = AveragedModel(mlp, use_buffers=use_buffers)
    for number in range(6):
        step(mlp, optimizer, number)
        average.update_parameters(mlp)
        assert bool((average.module[0].weight != 0).all()) == (number < 2)
    assert bool((average.module[0].weight[~sparsity.layers[0].mask] == 0).all())
    finalize_(average.module)
    assert verify(average.module, "4:8-T")


def test_a_snapshot_keeps_the_masks_that_it_was_trained_with(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    step(mlp, optimizer, 0)
    best, expected = copy.deepcopy(mlp), copy.deepcopy(plain_state_dict(mlp))
    again = copy.deepcopy(best)
    for number in range(1, 5):
        step(mlp, optimizer, number)
    assert not torch.equal(mlp[0].weight != 0, expected["0.weight"] != 0)
    for one in (best, again):
        finalize_(one)
        assert all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


def test_a_checkpoint_that_is_loaded_into_an_average_brings_its_masks(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    average = AveragedModel(mlp)
    saved, expected = copy.deepcopy(mlp.state_dict()), copy.deepcopy(plain_state_dict(mlp))
    for number in range(3):
        step(mlp, optimizer, number)
    average.module.load_state_dict(saved)
    assert torch.equal(average.module[0].weight, expected["0.weight"])


def test_averaged_state_dicts_give_masks_that_hold(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    states = []
    for number in range(3):
        step(mlp, optimizer, number)
        states.append(copy.deepcopy(mlp.state_dict()))
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    mlp.load_state_dict(mean)
    finalize_(mlp)
    assert verify(mlp, "4:8-T") and float((mlp[0].weight != 0).float().mean()) > 0.45


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_masks_are_no_buffers_and_move_with_the_model(mlp, mode):
    before = [name for name, _ in mlp.named_buffers()]
    sparsity = sparsify_(mlp, "4:8-T", mode=mode)
    assert [name for name, _ in mlp.named_buffers()] == before
    mask = sparsity.layers[0].mask
    assert torch.equal(mlp.double()[0].weight != 0, mask) and sparsity.layers[0].mask.dtype == torch.bool
    assert mlp.to("meta")[0].weight.is_meta and sparsity.layers[0].mask.is_meta


def test_an_average_follows_masks_although_some_inputs_are_always_zero(mlp):
    sparsity = sparsify_(mlp, "4:8-T", method="ste", refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    average = AveragedModel(mlp, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for number in range(6):
        inputs = torch.randn(16, 16, generator=torch.Generator().manual_seed(number))
        inputs[:, ::8] = 0  # like the corners of pictures: these columns of the first weight are never trained
        nn.functional.mse_loss(mlp(inputs), torch.ones(16, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(mlp)
    assert bool((average.module[0].weight[~sparsity.layers[0].mask] == 0).all())
