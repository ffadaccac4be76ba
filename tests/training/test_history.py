"""The history of a run: the means over layers at each measured refresh, bounded, and the same after a resume."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from bisparse import finalize_, sparsify_
from bisparse.results import MAX_HISTORY, MaskPoint
from bisparse.training import LiveTable
from bisparse.training.history import history_from_state, history_state, record
from bisparse.training.metrics import MaskChange


def start(**how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsity = sparsify_(model, **({"pattern": "4:8-T", "refresh": 2, "measure_every": 2} | how))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return model, optimizer, sparsity.attach(optimizer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 16)), torch.randint(0, 8, (16,))).backward()
        optimizer.step()


def change(step: int, flip_rate: float = 0.5, size: int = 1) -> MaskChange:
    return MaskChange(step, size, flip_rate, 0.75, 0.0, 0.0, 0.25)


def test_points_are_the_means_weighted_by_size_of_masks_that_the_test_compares_itself() -> None:
    model, optimizer, sparsity = start()
    expected = []

    def compare(run) -> None:
        size = sum(layer.mask.numel() for layer in run.layers)
        flips = sum(int((layer.mask ^ before[layer.name]).sum()) for layer in run.layers)
        kept = [float(layer.weight.detach().abs().double()[layer.mask].sum()) for layer in run.layers]
        total = [float(layer.weight.detach().abs().double().sum()) for layer in run.layers]
        shares = [one / whole * layer.mask.numel() for one, whole, layer in zip(kept, total, run.layers, strict=True)]
        expected.append((run.step, flips / size, sum(shares) / size))
        before.update({layer.name: layer.mask.clone() for layer in run.layers})

    before = {layer.name: layer.mask.clone() for layer in sparsity.layers}
    sparsity.on_refresh.append(compare)
    train(model, optimizer, 9)
    assert [point.step for point in sparsity.history] == [2, 4, 6, 8] and sparsity.history[0].flip_rate > 0
    for point, (step, flips, kept) in zip(sparsity.history, expected, strict=True):
        assert (point.step, point.flip_rate, point.retained) == (step, pytest.approx(flips), pytest.approx(kept))


def test_points_are_the_figures_that_are_logged_and_shown_live() -> None:
    model, optimizer, sparsity = start()
    table, logged = LiveTable(io.StringIO()), []
    sparsity.on_refresh += [table, lambda run: logged.append(run.metrics())]
    train(model, optimizer, 7)
    points = [(one.step, one.flip_rate, one.retained, one.changed_tiles) for one in sparsity.history]
    assert points == [tuple(row.values()) for row in table.rows]
    names = ("step", "flip_rate", "retained", "changed_tiles")
    assert points == [tuple(one[f"sparsity/{name}"] for name in names) for one in logged]


@pytest.mark.parametrize("how", [{"mode": "static"}, {"measure_every": 0}, {"refresh": 100}], ids=str)
def test_a_run_without_measured_refreshes_has_no_history(how) -> None:
    model, optimizer, sparsity = start(**how)
    train(model, optimizer, 4)
    assert sparsity.history == [] and sparsity.report().history == ()


def test_a_layer_that_is_not_refreshed_does_not_count_with_its_old_figures() -> None:
    model, optimizer, sparsity = start()
    train(model, optimizer, 3)
    model[0].parametrizations.weight.original.requires_grad_(False)
    train(model, optimizer, 2)
    assert sparsity.history[-1].step == 4 and sparsity.history[-1].flip_rate == sparsity.changes["2"].flip_rate
    model[2].parametrizations.weight.original.requires_grad_(False)
    sparsity.refresh()
    assert [point.step for point in sparsity.history] == [2, 4]


def test_a_second_refresh_at_the_same_step_is_left_out() -> None:
    model, optimizer, sparsity = start()
    train(model, optimizer, 3)
    before = list(sparsity.history)
    for _ in range(2):
        sparsity.refresh()
    assert [point.step for point in sparsity.history] == [2, 3] and sparsity.history[:1] == before
    sparsity.refresh()
    assert sparsity.history[1].flip_rate > 0 and sparsity.changes["0"].flip_rate == 0


def test_a_long_history_is_thinned_evenly_and_keeps_its_ends() -> None:
    points: list[MaskPoint] = []
    for step in range(3, 20_000, 3):
        record(points, [change(step, flip_rate=step / 20_000)])
        assert len(points) <= MAX_HISTORY
    steps = [point.step for point in points]
    assert len(steps) == MAX_HISTORY and steps[0] == 3 and steps[-1] == 19_998 and steps == sorted(set(steps))
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert max(gaps) <= 2 * 20_000 / MAX_HISTORY
    assert all(point.flip_rate == point.step / 20_000 for point in points)


def test_a_history_that_is_saved_and_loaded_is_thinned_like_one_that_is_not() -> None:
    whole: list[MaskPoint] = []
    resumed: list[MaskPoint] = []
    for step in range(MAX_HISTORY + 300):
        record(whole, [change(step)])
        if step % 50 == 0 or step > MAX_HISTORY + 290:
            resumed = history_from_state(history_state(resumed), step)
        record(resumed, [change(step)])
    assert whole == resumed


def test_means_that_round_to_above_one_are_one_and_empty_layers_are_left_out() -> None:
    points: list[MaskPoint] = []
    record(points, [MaskChange(1, 3, 1.0000000000000002, 1.0000000000000002, 0.0, 0.0, 1.0000000000000002)])
    record(points, [change(2, size=0)])
    record(points, [])
    assert points == [MaskPoint(1, 1.0, 1.0, 1.0)]


def test_a_resumed_run_has_the_whole_history_and_a_state_that_was_taken_stays_as_it_was() -> None:
    model, optimizer, sparsity = start()
    train(model, optimizer, 5)
    state, points = sparsity.state_dict(), list(sparsity.history)
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 4)
    assert [one[0] for one in state["history"]] == [2, 4]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other, other_optimizer, resumed = start()
    train(other, other_optimizer, 3)  # whose history is not that of the state
    other.load_state_dict(weights)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.history == points
    train(other, other_optimizer, 4)
    assert [point.step for point in resumed.history] == [2, 4, 6, 8] == [point.step for point in sparsity.history]
    assert resumed.history[:2] == points and resumed.report().history == tuple(resumed.history)


def test_a_state_without_a_history_still_loads() -> None:
    model, optimizer, sparsity = start()
    train(model, optimizer, 5)
    state = sparsity.state_dict()
    del state["history"]
    other, _, resumed = start()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert resumed.step == 5 and resumed.history == []


def test_a_copy_has_a_history_of_its_own() -> None:
    model, optimizer, sparsity = start()
    train(model, optimizer, 5)
    _, copied = copy.deepcopy((model, sparsity))
    assert copied.history == sparsity.history
    train(model, optimizer, 2)
    assert len(copied.history) == 2 and len(sparsity.history) == 3


def test_finalize_leaves_the_history_as_it_was() -> None:
    model, optimizer, sparsity = start()
    train(model, optimizer, 5)
    before = sparsity.report()
    finalize_(model)
    train(model, optimizer, 4)  # dense
    assert sparsity.report().history == before.history == tuple(sparsity.history) and len(before.history) == 2
    assert sparsity.state_dict()["history"] == history_state(before.history)
