"""A run killed at any step and resumed is bit-identical to one that was not."""

import io
import random

import numpy as np
import pytest
import torch
from torch import nn

from bisparse import Schedule, sparsify_
from bisparse.solvers import Exact
from bisparse.training import random_state, restore_random_state

STEPS = 9


def build(case: dict) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, object]:
    model = nn.Sequential(nn.Linear(32, 40), nn.Dropout(0.2), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsity = sparsify_(model, measure_every=1, **case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return model, optimizer, scheduler, sparsity.attach(optimizer)


def train(parts, steps: int) -> list[float]:
    model, optimizer, scheduler, _ = parts
    losses = []
    for _ in range(steps):
        inputs = torch.randn(8, 32) + random.random() + float(np.random.rand())
        loss = nn.functional.cross_entropy(model(inputs), torch.randint(0, 8, (8,)))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def save(parts) -> io.BytesIO:
    model, optimizer, scheduler, sparsity = parts
    file = io.BytesIO()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sparsity": sparsity}
    torch.save({name: one.state_dict() for name, one in state.items()} | {"random": random_state()}, file)
    file.seek(0)
    return file


def resume(case: dict, file: io.BytesIO):
    torch.manual_seed(999)  # a new process starts anywhere
    random.seed(999)
    np.random.seed(999)
    parts = build(case)
    state = torch.load(file, weights_only=True)
    for name, part in zip(("model", "optimizer", "scheduler", "sparsity"), parts, strict=True):
        part.load_state_dict(state[name])
    restore_random_state(state["random"])
    return parts


CASES = {
    "4:8-T": {"pattern": "4:8-T", "refresh": 3},
    "16:32-T every step": {"pattern": "16:32-T", "refresh": 1},
    "2:4-T": {"pattern": "2:4-T", "refresh": 2, "method": "sr-ste"},
    "phases": {"pattern": "4:8-T", "refresh": 1, "schedule": Schedule(dense_until=2, freeze_at=5, dense_from=7)},
    "s-ste": {"pattern": "2:4", "refresh": 2, "method": "s-ste"},
    "mvue": {"pattern": "2:4-T", "refresh": 2, "mvue": True},
    "static": {"pattern": "4:8-T", "mode": "static"},
}


@pytest.mark.parametrize("name", CASES)
def test_resume_at_any_step_is_bit_identical(name):
    case = CASES[name]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    whole = build(case)
    checkpoints, losses = [], []
    for _ in range(STEPS):
        checkpoints.append(save(whole))
        losses += train(whole, 1)
    metrics = whole[3].metrics()
    for killed_at, file in enumerate(checkpoints):
        resumed = resume(case, file)
        assert train(resumed, STEPS - killed_at) == losses[killed_at:], f"killed at step {killed_at}"
        for key, value in whole[0].state_dict().items():
            assert torch.equal(resumed[0].state_dict()[key], value), (killed_at, key)
        one, other = whole[3].state_dict(), resumed[3].state_dict()
        assert one["step"] == other["step"] == STEPS and one["layers"].keys() == other["layers"].keys()
        for layer, entry in one["layers"].items():
            for side, value in entry.items():
                found = other["layers"][layer][side]
                assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, (layer, side)
        assert one["history"] == other["history"] and bool(one["history"]) == (case.get("mode") != "static"), killed_at
        if killed_at < STEPS - 3 and "schedule" not in case:
            assert resumed[3].metrics() == metrics


def test_warm_prices_are_really_part_of_the_state():
    parts = build(CASES["16:32-T every step"])
    train(parts, 2)
    prices = parts[3].state_dict()["layers"]["0"]
    assert prices["u"].shape == (4 // 2 * 1, 32) and bool(prices["u"].any()) and prices["exponent"].shape == (2,)
    assert "u" not in build(CASES["2:4-T"])[3].state_dict()["layers"]["0"]  # tiles of 4 need none


def test_warm_prices_follow_the_model_to_another_device():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    search = sparsify_(model, "4:8-T").search
    (gathered,) = search._gathered
    for _ in range(2):  # the prices as the last search left them, then as a checkpoint would bring them
        start = search._start(gathered, torch.empty(gathered.rows, gathered.columns, device="meta"), Exact())
        assert {getattr(start.certificate, side).device.type for side in ("u", "v", "exponent")} == {"meta"}
        search._whole.clear()


def test_a_state_that_was_taken_stays_as_it_was():
    parts = build(CASES["16:32-T every step"])
    train(parts, 2)
    state = parts[3].state_dict()
    before = {name: entry["u"].clone() for name, entry in state["layers"].items()}
    train(parts, 2)
    assert all(torch.equal(state["layers"][name]["u"], u) for name, u in before.items())
    assert any(not torch.equal(parts[3].state_dict()["layers"][name]["u"], u) for name, u in before.items())


BROKEN = {
    "no mapping": lambda state: None,
    "a part": lambda state: {"torch": state["torch"]},
    "python": lambda state: state | {"python": [3, [1, 2, 3], None]},
    "python of another type": lambda state: state | {"python": "x"},
    "a word too large": lambda state: state | {"python": [3, [2**80, *state["python"][1][1:]], None]},
    "gauss": lambda state: state | {"python": [*state["python"][:2], "x"]},
    "numpy": lambda state: state | {"numpy": ["MT19937", torch.zeros(3, dtype=torch.int64), 0, 0, 0.0]},
    "negative numbers of numpy": lambda state: state | {"numpy": ["MT19937", -torch.ones(624, dtype=torch.int64), 0, 0, 0.0]},
    "another generator of numpy": lambda state: state | {"numpy": ["PCG64", *state["numpy"][1:]]},
    "torch": lambda state: state | {"torch": torch.zeros(16, dtype=torch.uint8)},
    "torch of another type": lambda state: state | {"torch": torch.zeros(16)},
    "cuda": lambda state: state | {"cuda": [torch.zeros(3)]},
    "devices that are not here": lambda state: state | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 99},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_random_state_that_is_none_is_refused_and_no_generator_is_changed(how):
    broken = BROKEN[how](random_state())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match=r"random_state|random state"):
        restore_random_state(broken)
    after = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert after == (random.random(), np.random.rand(), float(torch.rand(())))
