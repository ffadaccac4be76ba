"""Computations that pause: what they hand out, what they leave behind, and what a chain of blocks costs with them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from bisparse.layers import find_layers
from bisparse.pruning import AdaPrune, Statistic, prune_
from bisparse.pruning.calibration import block_runner as chain_run_module
from bisparse.pruning.calibration.calibrate import Walk, calibrate
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.paused import Paused


def test_it_hands_out_what_it_pauses_with_and_ends_with_its_result() -> None:
    def work() -> str:
        for step in range(3):
            paused.pause(step)
        return "end"

    paused = Paused(work)
    assert [paused.resume() for _ in range(3)] == [0, 1, 2]
    assert not paused.finished
    assert paused.resume() is None and paused.finished and paused.result == "end"


def test_without_greenlet_pruning_stage_by_stage_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    data = [torch.randn(64, 16) for _ in range(3)]
    with pytest.raises(ImportError, match=r"\[calibration\]"):
        prune_(model, "2:4-T", AdaPrune(), batches=data)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert len(prune_(model, "2:4-T", AdaPrune(), batches=data, order="parallel")) == 2


def test_errors_reach_whoever_resumed() -> None:
    def work() -> None:
        paused.pause(1)
        raise ValueError("here")

    paused = Paused(work)
    paused.resume()
    with pytest.raises(ValueError, match="here"):
        paused.resume()
    assert paused.finished


def test_stopping_runs_what_must_run_at_the_end() -> None:
    log = []

    def work() -> None:
        try:
            paused.pause(1)
            log.append("not reached")
        finally:
            log.append("closed")

    paused = Paused(work)
    paused.stop()
    assert log == [], "one that has not begun has nothing to close"
    paused = Paused(work)
    paused.resume()
    paused.stop()
    assert log == ["closed"] and paused.finished


def test_modes_of_a_paused_computation_stay_inside() -> None:
    """Autocast entered by one pass must not reach the caller or another pass, in whatever order they end."""
    seen = {}

    def work(name: str, own: list[Paused]) -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            own[0].pause(1)
            seen[name] = (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())

    passes = []
    for name in "ab":
        own: list[Paused] = []
        own.append(Paused(lambda name=name, own=own: work(name, own)))
        passes.append(own[0])
    with torch.enable_grad():
        for one in (*passes, *passes):
            one.resume()
            assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert seen == {"a": (True, False), "b": (True, False)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.b(torch.relu(self.a(x)) * self.gate(x))


@pytest.mark.parametrize("room", [0, 1 << 30], ids=["no room to wait", "room for all"])
def test_a_block_runs_once_a_batch_where_there_is_room_and_the_statistics_are_the_same(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_run_module, "PAUSED_BYTES", room)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8) for _ in range(3)))
    batches = [torch.randn(5, 8) for _ in range(4)]
    layers, _ = find_layers(model, include="*")
    found = {}
    walk = Walk()
    for stage in calibrate(model, layers, batches, frozenset({Statistic.GRAM}), Options(progress=False), walk=walk):
        inputs: list[Tensor] = []
        handle = stage.layers[0].module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        runs = [block.runs for block in model]
        with torch.no_grad():
            model(torch.cat(batches))
        for block, count in zip(model, runs, strict=True):
            block.runs = count
        handle.remove()
        x = inputs[0]
        torch.testing.assert_close(stage.statistics[0].gram[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        for layer in stage.layers:
            found[layer.name] = stage
            with torch.no_grad():
                layer.weight.mul_((torch.rand_like(layer.weight) < 0.7).float())
    # Three runs find the chain. All blocks are handed the same, so that none is run to note what that is.
    after_discovery = model[1].runs - 3
    assert after_discovery == (len(batches) if room else 3 * len(batches))
    shared = found["0.a"].statistics
    assert shared[0] is shared[1], "two layers of one input share one set of moments"


def test_an_input_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            return self.one(x) + self.two(x.relu_())

    model, x = InPlace(), torch.randn(16, 8)
    layers, _ = find_layers(model, include="*")
    stages = list(calibrate(model, layers, [x], frozenset({Statistic.MEAN}), Options(progress=False)))
    means = {layer.name: one.mean[0] for stage in stages for layer, one in zip(stage.layers, stage.statistics, strict=True)}
    torch.testing.assert_close(means["one"], x.mean(0))
    torch.testing.assert_close(means["two"], x.relu().mean(0))


def test_what_a_stopped_call_holds_is_counted_through_all_its_frames() -> None:
    def inner(x: Tensor) -> Tensor:
        scores, view = x[:, None] * x, x[1:]
        del view
        paused.pause(scores)
        return scores

    def work() -> Tensor:
        x = torch.zeros(256)
        pair = (x, torch.zeros(128))
        return inner(pair[0])

    paused = Paused(work)
    paused.resume()
    assert paused.held_bytes == 4 * (256 * 256 + 256 + 128)
    paused.resume()
    assert paused.held_bytes == 0
