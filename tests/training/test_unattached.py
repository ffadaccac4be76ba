"""An optimizer that changes sparse weights without being attached is named; wrappers and other models' optimizers are not."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from bisparse import finalize_, sparsify_

MODES = pytest.mark.parametrize("mode", ["dynamic", "static"])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def take_step(model, optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not attached")
        yield


@MODES
def test_an_optimizer_that_is_built_again_is_named_once(mode: str) -> None:
    model = make_model()
    sparsity = sparsify_(model, "2:4", mode=mode).attach(adam(model))
    again = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"SGD has changed 2 sparse weights but is not attached.*attached to Adam") as found:
        for _ in range(3):
            take_step(model, again)
    assert len(found) == 1 and sparsity.step == 0
    sparsity.detach()
    sparsity.attach(again)
    take_step(model, again)
    assert sparsity.step == 1


@MODES
def test_attach_was_forgotten(mode: str) -> None:
    model = make_model()
    sparsity = sparsify_(model, "2:4", mode=mode)
    with pytest.warns(UserWarning, match="attached to no optimizer"):
        take_step(model, adam(model))
    assert sparsity.step == 0


def test_one_of_two_optimizers_was_forgotten() -> None:
    model = make_model()
    first, second = adam(model), adam(model[1])
    sparsify_(model, "2:4").attach(first)
    with pytest.warns(UserWarning, match="changed 1 sparse weight but"):
        take_step(model, second)


@MODES
@pytest.mark.usefixtures("silent")
def test_several_attached_optimizers(mode: str) -> None:
    model = make_model()
    optimizers = [adam(one) for one in model]
    sparsify_(model, "2:4", mode=mode).attach(*optimizers)
    for one in optimizers:
        take_step(model, one)


class Outer(torch.optim.Optimizer):
    """A wrapper that is an Optimizer itself, as accelerate's is; it may be built after `attach`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.skips = False

    def step(self, closure=None):
        return None if self.skips else self.inner.step(closure)


@MODES
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.usefixtures("silent")
def test_wrappers(mode: str, skips: bool) -> None:
    model = make_model()
    inner = adam(model)
    sparsity = sparsify_(model, "2:4", mode=mode).attach(inner)
    outer = Outer(inner)
    outer.skips = skips
    take_step(model, outer)
    assert sparsity.step == (not skips)


@MODES
@pytest.mark.usefixtures("silent")
def test_steps_that_change_no_sparse_weight(mode: str) -> None:
    model, other = make_model(), make_model()
    sparsity = sparsify_(model, "2:4", mode=mode)
    take_step(other, adam(other))  # another model's
    take_step(model, torch.optim.SGD([one.bias for one in model], lr=0.1))  # only other weights
    idle = adam(model)
    idle.zero_grad()
    idle.step()  # there are no gradients
    own = copy.deepcopy(other)
    take_step(own, adam(own))
    sparsity.attach(adam(model))
    finalize_(model)
    take_step(model, adam(model))  # the run has ended
    del sparsity, model
    gc.collect()


@pytest.mark.usefixtures("silent")
def test_a_compiled_step() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = sparsify_(model, "2:4").attach(optimizer)
    model(torch.randn(4, 16)).square().mean().backward()
    before = model[0].parametrizations.weight.original.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert sparsity.step == 1 and not torch.equal(before, model[0].parametrizations.weight.original)


@pytest.mark.usefixtures("silent")
def test_a_soft_threshold_depends_on_no_steps() -> None:
    model = make_model()
    sparsify_(model, "2:4", method="s-ste")
    take_step(model, adam(model))
