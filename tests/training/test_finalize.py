"""What is left after `finalize_`, and what is written: plain names, under every wrapper and every name of a module."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import bisparse
from bisparse import Schedule, finalize_, sparsify_, verify
from bisparse.training import plain_state_dict


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(inputs))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_module_under_two_names_is_saved_under_both(tmp_path, mode):
    model = Twice()
    keys = list(model.state_dict())
    sparsity = sparsify_(model, "4:8-T", mode=mode)
    state = plain_state_dict(model)
    assert sorted(state) == sorted(keys) and torch.equal(state["a.weight"], state["b.weight"])
    bisparse.save(model, tmp_path / "saved", report=sparsity.report())
    fresh = Twice()
    bisparse.load(fresh, tmp_path / "saved")
    assert verify(fresh, "4:8-T") and torch.equal(fresh.a.weight, state["a.weight"])
    finalize_(model)
    assert sorted(model.state_dict()) == sorted(keys)


WRAPPED = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled inside": lambda model: nn.Sequential(model[0], model[1], torch.compile(model[2])),
    "checkpointed inside": lambda model: nn.Sequential(model[0], model[1], checkpoint_wrapper(model[2])),
    "twice": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("first", ["wrapped", "sparsified"])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("name", WRAPPED)
def test_no_wrapper_gets_into_names_and_files(mlp, tmp_path, name, mode, first):
    keys = list(mlp.state_dict())
    if first == "wrapped":
        model = WRAPPED[name](mlp)
        if mode == "dynamic" and name == "data parallel":
            with pytest.raises(ValueError, match="before wrapping"):
                sparsify_(model, "4:8-T")
            return
        sparsity = sparsify_(model, "4:8-T", mode=mode)
    else:
        sparsity = sparsify_(mlp, "4:8-T", mode=mode)
        model = WRAPPED[name](mlp)
    assert [layer.name for layer in sparsity.layers] == ["0", "2"] == list(sparsity.state_dict()["layers"])
    state = plain_state_dict(model)
    assert list(state) == keys or sorted(state) == sorted(keys)
    bisparse.save(model, tmp_path / "saved", report=sparsity.report())
    finalize_(model)
    bisparse.save(model, tmp_path / "finalized", "4:8-T")
    for folder in ("saved", "finalized"):
        fresh = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        bisparse.load(fresh, tmp_path / folder)
        assert verify(fresh, "4:8-T") and torch.equal(fresh[2].weight, state["2.weight"])


def test_ending_in_the_dense_phase_at_the_start_is_said(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", schedule=Schedule(dense_until=5))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    step(mlp, optimizer, 0)
    with pytest.warns(UserWarning, match="initial dense phase"):
        finalize_(mlp)


def test_a_parametrization_that_was_added_later_stays(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1)
    nn.utils.parametrizations.spectral_norm(mlp[0])
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    for number in range(3):
        step(mlp, optimizer, number)
    mlp.eval()
    expected, state = mlp(torch.ones(2, 16)), plain_state_dict(mlp)
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    nn.utils.parametrizations.spectral_norm(plain[0])
    plain.load_state_dict(state)
    finalize_(mlp)
    for one in (mlp, plain.eval()):
        assert verify(one, "4:8-T") and torch.allclose(one(torch.ones(2, 16)), expected)
        assert float(torch.linalg.matrix_norm(one[0].weight.detach(), 2)) == pytest.approx(1.0, abs=0.2)
    assert mlp.state_dict().keys() == plain.state_dict().keys()


def test_the_plain_state_of_a_static_run_has_its_zeros_whatever_was_loaded(mlp):
    dense = copy.deepcopy(mlp.state_dict())
    sparsify_(mlp, "4:8-T", mode="static")
    mlp.load_state_dict(dense)
    state = copy.deepcopy(plain_state_dict(mlp))
    assert all(torch.equal(value, dense[name]) for name, value in mlp.state_dict().items())  # the model is not changed
    with pytest.warns(UserWarning, match="no longer zero"):
        finalize_(mlp)
    assert all(torch.equal(value, state[name]) for name, value in mlp.state_dict().items())


@pytest.mark.parametrize("tie", [lambda weight: weight, lambda weight: nn.Parameter(weight.data)])
def test_the_plain_state_of_tied_static_weights_has_its_zeros_under_each_name(tie):
    model = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16, bias=False))
    model[0].weight = tie(model[1].weight)
    dense = copy.deepcopy(model.state_dict())
    sparsify_(model, "4:8-T", mode="static", include="1")
    model.load_state_dict(dense)
    state = plain_state_dict(model)
    assert not torch.equal(state["1.weight"], dense["1.weight"]) and torch.equal(state["0.weight"], state["1.weight"])
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()  # as in the state_dict of the model


def test_a_static_run_without_memory_has_a_plain_state(mlp):
    sparsify_(mlp, "4:8-T", mode="static")
    assert all(value.is_meta for value in plain_state_dict(mlp.to("meta")).values())
