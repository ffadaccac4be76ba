"""Masks of layers on a GPU, launched together: here on a CPU that passes for one."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bisparse import accelerate_, sparsify_
from bisparse.kernels.exact.ops import exact_mask_of_magnitudes
from bisparse.solvers import Exact, Greedy
from bisparse.tiles import to_tiles
from bisparse.training import gpu_batch_search as together
from bisparse.training import mask_search as search


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.ragged = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(30, 64)
        self.convolution, self.half = nn.Conv2d(8, 16, 3), nn.Linear(32, 32, dtype=torch.bfloat16)


def as_on_a_gpu(weight: torch.Tensor, exactly: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel there cannot raise: a tile with a bad number is coarse."""
    bad = ~torch.isfinite(to_tiles(weight, 4)).flatten(1).all(1)
    mask, coarse = exact_mask_of_magnitudes(torch.where(torch.isfinite(weight), weight, 0), exactly)
    return mask, coarse | bad


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose masks were found together."""
    monkeypatch.setattr(together, "DEVICES", ("cpu",))
    monkeypatch.setattr(together, "exact_mask_of_magnitudes", as_on_a_gpu)
    names: list[str] = []

    def watched(layers, exactly):  # type: ignore[no-untyped-def]
        found = together.masks_together(layers, exactly)
        names.extend(found)
        return found

    monkeypatch.setattr(search, "masks_together", watched)
    return names


def masks_of(model: nn.Module, **how: object) -> dict[str, torch.Tensor]:
    sparsity = sparsify_(model, "2:4-T", **how)  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in sparsity.layers:
            layer.weight.mul_(torch.rand(layer.weight.shape).to(layer.weight.dtype))
    sparsity.refresh()
    assert all(change.retained > 0 for change in sparsity.changes.values())
    return {layer.name: layer.mask for layer in sparsity.layers}


@pytest.mark.parametrize("exactly", [False, True])
def test_masks_are_those_of_the_search(launched: list[str], exactly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    found = masks_of(Model(), solver=Exact(exactly=exactly))
    assert set(launched) == {"one", "two", "half"}, "what has no padding and one matrix"
    monkeypatch.setattr(together, "DEVICES", ())
    torch.manual_seed(1)
    expected = masks_of(Model(), solver=Exact(exactly=exactly))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_other_solvers_scores_and_patterns_are_searched_one_by_one(launched: list[str]) -> None:
    masks_of(Model(), solver=Greedy())
    masks_of(Model(), solver=Exact(strict=True))
    masks_of(Model(), score=lambda name, weight: weight.abs() + 1)
    for pattern in ("2:4", "4:8-T"):
        sparsify_(Model(), pattern).refresh()
    assert launched == []


def test_a_tile_of_too_wide_a_range_is_solved_as_given(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(together, "DEVICES", devices)
        model = Model()
        sparsity = sparsify_(model, "2:4-T")
        launched.clear()
        with torch.no_grad():
            model.one.parametrizations.weight.original[0, 0] = 1e9
        sparsity.refresh()
        assert set(launched) == ({"two", "half"} if devices else set())
        results.append([layer.mask for layer in sparsity.layers])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_weight_that_is_not_finite_is_named_and_no_mask_moves(launched: list[str]) -> None:
    model = Model()
    sparsity = sparsify_(model, "2:4-T")
    before = [layer.mask.clone() for layer in sparsity.layers]
    with torch.no_grad():
        for layer in sparsity.layers:
            layer.weight.copy_(torch.randn(layer.weight.shape))
        model.two.parametrizations.weight.original[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"two: its scores .* hold NaN or infinite numbers"):
        sparsity.refresh()
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(sparsity.layers, before, strict=True))


class Counted(TorchDispatchMode):
    """How often each operator of torch was called that launches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        name = str(function)
        if not name.startswith(("aten.detach", "aten.view")):
            self.calls[name] += 1
        return function(*arguments, **(keywords or {}))


def test_a_refresh_of_an_accelerated_layer_is_four_operators(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "exact_mask_of_magnitudes", exact_mask_of_magnitudes)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).train()
    sparsity = sparsify_(model, "2:4-T")
    accelerate_(model, "reference")
    sparsity.measure_every = 0
    with Counted() as counted:
        sparsity.refresh()
    each = [
        "bisparse.exact_mask_of_magnitudes.default",
        "aten.any.default",
        "aten.copy_.default",
        "bisparse.lay_out_2to4.default",
    ]
    assert counted.calls == {**dict.fromkeys(each, 2), "aten.stack.default": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make test-gpu` on a machine that has one")
def test_on_a_gpu_masks_are_those_of_the_cpu() -> None:
    torch.manual_seed(1)
    model = Model()
    other = Model().cuda()
    found, expected = sparsify_(other, "2:4-T"), sparsify_(model, "2:4-T")
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(ours.mask.cpu(), theirs.mask)
