"""Chains of calls that end in an underscore: where a step has nothing to do, it does nothing, and says so."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bisparse
from bisparse.accelerate import BackendError, accelerate_

Step = Callable[[nn.Module], Any]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def prune(one: nn.Module) -> Any:
    return bisparse.prune_(one, "2:4-T")


def sparse(pattern: str, mode: str = "dynamic") -> Step:
    return lambda one: bisparse.sparsify_(one, pattern, mode=mode)


def reference(one: nn.Module) -> Any:
    return accelerate_(one, "reference")


def quiet_or_warned(one: nn.Module, *steps: Step) -> list[str]:
    """Run the steps, then `finalize_`; the warnings of all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            step(one)
        assert bisparse.finalize_(one) is one
    return [str(warning.message) for warning in caught]


CHAINS: dict[str, tuple[list[Step], bool]] = {
    "dense": ([], True),
    "accelerated, where nothing was sparse": ([nn.Module.eval, accelerate_], True),
    "accelerated, where no backend runs": ([nn.Module.eval, prune, accelerate_, accelerate_], True),
    "accelerated twice": ([nn.Module.eval, prune, reference, reference], False),
    "in training mode": ([prune, reference, reference, accelerate_], False),
    "finalized twice": ([sparse("2:4"), bisparse.finalize_], True),
    "finalized after acceleration, twice": ([nn.Module.eval, prune, reference, bisparse.finalize_], True),
    "a pattern that no backend takes": ([sparse("4:8-T"), accelerate_], False),
    "a static one": ([sparse("4:8-T", "static"), accelerate_], False),
    "trained and accelerated twice": ([sparse("2:4-T"), reference, reference, accelerate_], False),
    "trained, then pruned to the same": ([sparse("2:4-T"), bisparse.finalize_, prune], True),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_step_without_work_changes_nothing_and_the_last_one_says_so(chain: str) -> None:
    steps, idle = CHAINS[chain]
    one = model()
    said = quiet_or_warned(one, *steps)
    assert [text for text in said if "plain already, and finalize_ changed nothing" in text] == said and bool(said) >= idle
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in one) and len(one.state_dict()) == 4
    assert not any(getattr(layer, "_forward_pre_hooks", None) for layer in one.modules())
    if any(step is prune for step in steps):
        assert bisparse.verify(one, "2:4-T")


def test_layers_that_run_sparse_already_are_counted_as_such() -> None:
    one = model().eval()
    prune(one)
    first, again = reference(one), reference(one)
    assert "2 layers run sparse, 0 of them both ways; 0 stay" in str(first) and first.already == 0
    assert "0 layers run sparse, 0 of them both ways; 2 did already; 0 stay as they are" in str(again) and again.already == 2
    assert again.bytes_before == again.bytes_after == first.bytes_after
    assert accelerate_(one, "reference", include="0").already == 1
    with pytest.raises(BackendError, match="no layer of the model can run sparse"):
        reference(model().eval())


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_run_whose_layers_were_all_replaced_ends(mode: str) -> None:
    one = model()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    sparsity = bisparse.sparsify_(one, "2:4-T", mode=mode).attach(optimizer)
    one[0], one[2] = nn.Linear(32, 32), nn.Linear(32, 32)
    with pytest.warns(UserWarning, match="replaced after sparsify_"):
        bisparse.finalize_(one)
    assert "ended by finalize_" in repr(sparsity) and "left dense" in str(sparsity.report())
    bisparse.sparsify_(one, "2:4").attach(torch.optim.SGD(one.parameters(), lr=0.1))
    bisparse.finalize_(one)


def test_an_end_that_fails_leaves_what_was_written_off_a_fixed_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()
    prune(one)
    reference(one)
    inputs = torch.randn(3, 32)
    with torch.no_grad():
        one[0].weight.add_(0.1)
        before, output = one[0].weight.clone(), one(inputs)

    def fails(self: nn.Module) -> None:
        raise MemoryError

    kind = type(one[2])
    restore = kind.restore_
    monkeypatch.setattr(kind, "restore_", lambda self: fails(self) if self is one[2] else restore(self))
    with pytest.raises(MemoryError):
        bisparse.finalize_(one)
    assert type(one[0]) is kind and torch.equal(one[0].weight, before) and torch.equal(one(inputs), output)
    monkeypatch.undo()
    bisparse.finalize_(one)
    assert bisparse.verify(one, "2:4-T") and torch.allclose(one(inputs), output, atol=1e-6)


def test_a_model_with_adapters_under_its_masks_is_sent_to_merge_lora() -> None:
    one = model()
    prune(one)
    bisparse.training.add_masked_lora_(one, "2:4-T", rank=2)
    with pytest.raises(ValueError, match="has an adapter under its mask: call merge_lora_ first"):
        prune(one)
    with pytest.warns(UserWarning, match="merge_lora_ ends adapters"):
        bisparse.finalize_(one)
    bisparse.training.merge_lora_(one, "2:4-T")
    prune(one)
