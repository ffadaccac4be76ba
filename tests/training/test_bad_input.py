"""Wrong input is refused with a sentence that says what to do, before the first step where it can be known."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, prune

import bisparse
from bisparse import PatternError, Schedule, finalize_, solve, sparsify_


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "5:4"}, "does not exist"),
        ({"mode": "sometimes"}, "'dynamic' or 'static'"),
        ({"method": "magic"}, "'masked-decay'"),
        ({"refresh": 0}, "at least 1"),
        ({"refresh": 2.5}, "number of optimizer steps"),
        ({"decay": -1.0}, "0 or more"),
        ({"decay": float("nan")}, "0 or more"),
        ({"decay": True}, "0 or more"),
        ({"decay": "3"}, "0 or more"),
        ({"measure_every": -1}, "0 for never"),
        ({"measure_every": 1.5}, "0 for never"),
        ({"decay": {"nowhere": 0.1}}, "'nowhere' matches none of the sparse layers"),
        ({"patterns": {"nowhere": "2:4"}}, "'nowhere' matches none of the sparse layers"),
        ({"include": "nowhere"}, "matches no layer"),
        ({"remainder": "maybe"}, "'pad', 'dense' or 'error'"),
        ({"pattern": "16:32-T", "remainder": "error"}, "32 does not divide the sides of its 32 x 16 matrix"),
        ({"pattern": "16:32-T", "remainder": "dense"}, "no layer to make sparse"),
        ({"mode": "static", "schedule": Schedule(dense_until=5)}, "mode='dynamic'"),
        ({"masks": "nonzero"}, "mode='static'"),
        ({"mode": "static", "masks": "zeros"}, "'nonzero'"),
        ({"method": "s-ste"}, "plain N:M"),
        ({"score": lambda name, weight: weight.abs().sum()}, "one score per weight"),
        ({"score": lambda name, weight: weight}, "non-negative numbers"),
        ({"score": lambda name, weight: weight.abs() * float("nan")}, "0: its scores"),
    ],
)
def test_arguments(mlp, arguments, message):
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sparsify_(mlp, **({"pattern": "4:8-T"} | arguments))
    assert mlp.state_dict().keys() == before.keys()  # refused before anything was changed
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert not list(mlp.buffers())


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"dense_until": -1}, "0 or more"),
        ({"dense_until": 5, "freeze_at": 3}, "dense_until must not come after freeze_at"),
        ({"freeze_at": 5, "dense_from": 3}, "freeze_at must not come after dense_from"),
        ({"dense_until": 1.5}, "number of optimizer steps"),
    ],
)
def test_schedules(marks, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**marks)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Schedule.shares(100, dense_last=1.5)
    with pytest.raises(ValueError, match="at least one"):
        Schedule.shares(0)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_model_already_sparsified(mlp, mode):
    sparsify_(mlp, "4:8-T", mode=mode)
    for again in ("dynamic", "static"):
        with pytest.raises(ValueError, match="finalize_"):
            sparsify_(mlp, "2:4", mode=again)
    finalize_(mlp)
    with pytest.warns(UserWarning, match="nothing"):
        finalize_(mlp)
    sparsify_(mlp, "2:4", mode=mode)


def test_masks_of_another_shape_or_pattern(mlp):
    good = {"0": solve(torch.rand(32, 16), "4:8-T").mask, "2": solve(torch.rand(8, 32), "4:8-T").mask}
    plain = {name: solve(torch.rand(mask.shape), "4:8").mask for name, mask in good.items()}
    for masks, error, message in [
        ({"0": good["0"]}, ValueError, r"none for \['2'\]"),
        (good | {"0.weight": good["0"]}, ValueError, r"\['0'\] twice"),
        (good | {"9": good["0"]}, ValueError, r"\['9'\], which are not among the layers"),
        (good | {"0": good["0"].T}, ValueError, r"shape \(16, 32\), the weight \(32, 16\)"),
        (good | {"0": good["0"].float()}, ValueError, "bool tensor"),
        (plain, PatternError, r"0: .* break 4:8-T; the first: 0: W\^T"),
        ("nonzero", PatternError, "break 4:8-T"),
    ]:
        with pytest.raises(error, match=message):
            sparsify_(mlp, "4:8-T", mode="static", masks=masks)
        assert not list(mlp.buffers())


def test_an_optimizer_that_does_not_hold_the_parameters(mlp):
    sparsity = sparsify_(mlp, "4:8-T")
    with pytest.raises(ValueError, match="weights of 2 sparse layers, the first '0'"):
        sparsity.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="weights of 1 sparse layers, the first '2'"):
        sparsity.attach(torch.optim.SGD(mlp[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="needs the optimizer"):
        sparsity.attach()
    sparsity.attach(torch.optim.SGD(mlp[0].parameters(), lr=0.1), torch.optim.Adam(mlp[2].parameters()))
    with pytest.raises(ValueError, match="already attached"):
        sparsity.attach(torch.optim.SGD(mlp.parameters(), lr=0.1))


def test_a_resume_with_other_layers_or_another_pattern(mlp):
    state = sparsify_(copy.deepcopy(mlp), "4:8-T").state_dict()
    for arguments, message in [
        ({"pattern": "8:16-T"}, "0: the checkpoint has pattern 4:8-T, this run 8:16-T"),
        ({"pattern": "4:8-T", "include": "0"}, r"\['2'\] are sparse there and not here"),
        ({"pattern": "4:8-T", "mode": "static"}, "mode='dynamic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparsify_(copy.deepcopy(mlp), **arguments).load_state_dict(state)
    wider = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    with pytest.raises(ValueError, match=r"0: the checkpoint has shape \(32, 16\), this run \(40, 16\)"):
        sparsify_(wider, "4:8-T").load_state_dict(state)
    with pytest.raises(ValueError, match="version 2"):
        sparsify_(copy.deepcopy(mlp), "4:8-T").load_state_dict(state | {"version": 7})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step",), -5),
        (("step",), 1.5),
        (("step",), "3"),
        (("refreshes",), None),
        (("layers",), None),
        (("layers", "0", "u"), "text"),
        (("layers", "0", "u"), torch.zeros(1, 8, dtype=torch.int32)),
        (("layers", "0", "v"), torch.zeros(8, 8)),
        (("layers", "0", "exponent"), None),
        (("history",), None),
        (("history",), "text"),
        (("history",), [[1, 0.5, 0.5]]),
        (("history",), [[1, 0.5, 0.5, float("nan")]]),
        (("history",), [[1, 0.5, 1.5, 0.5]]),
        (("history",), [[1, -0.5, 0.5, 0.5]]),
        (("history",), [[1, "0.5", 0.5, 0.5]]),
        (("history",), [[1, torch.zeros(2), 0.5, 0.5]]),
        (("history",), [[1.5, 0.5, 0.5, 0.5]]),
        (("history",), [[True, 0.5, 0.5, 0.5]]),
        (("history",), [[-1, 0.5, 0.5, 0.5]]),
        (("history",), [[3, 0.5, 0.5, 0.5], [3, 0.5, 0.5, 0.5]]),
        (("history",), [[8, 0.5, 0.5, 0.5]]),  # after the step of the state
        (("history",), [[0, 0.5, 0.5, 0.5]] * 10**5),
    ],
)
def test_a_state_with_wrong_values_is_refused_before_anything_is_taken_from_it(mlp, place, value):
    sparsity = sparsify_(mlp, "4:8-T")
    sparsity.refresh()
    before = sparsity.state_dict()
    assert before["layers"]["0"]["u"].shape == (8, 8)
    state = copy.deepcopy(before) | {"step": 7}
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match="the checkpoint"):
        sparsity.load_state_dict(state)
    assert sparsity.step == 0 and sparsity.state_dict()["history"] == before["history"]
    assert all(
        torch.equal(sparsity.state_dict()["layers"]["0"][one], before["layers"]["0"][one]) for one in ("u", "v", "exponent")
    )


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_bad_gradients_stop_the_step(mlp, mode, number):
    sparsity = sparsify_(mlp, "4:8-T", mode=mode)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    mlp(torch.randn(4, 16)).square().mean().backward()
    layer = sparsity.layers[1]
    layer.weight.grad[tuple(layer.mask.nonzero()[0].tolist())] = number
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    with pytest.raises(ValueError, match=r"the gradient of 2 holds NaN or infinite numbers at optimizer step 1"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_nan_weights_are_named_at_the_refresh(mlp):
    sparsity = sparsify_(mlp, "4:8-T", check_gradients=False, refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    mlp(torch.randn(4, 16)).square().mean().backward()
    sparsity.layers[1].weight.grad.fill_(float("nan"))
    optimizer.step()
    with pytest.raises(ValueError, match=r"2: its scores .* Training diverged"):
        mlp(torch.randn(4, 16))


def test_weights_that_others_have_changed(mlp):
    pruned = copy.deepcopy(mlp)
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        sparsify_(pruned, "4:8-T")
    normed = copy.deepcopy(mlp)
    parametrizations.weight_norm(normed[0])
    with pytest.raises(ValueError, match="already parametrized"):
        sparsify_(normed, "4:8-T")
    with pytest.raises(ValueError, match="before wrapping it in DataParallel"):
        sparsify_(nn.DataParallel(mlp), "4:8-T")
    with pytest.raises(ValueError, match="needs a torch module"):
        sparsify_(mlp.state_dict(), "4:8-T")
    with pytest.raises(ValueError, match=r"torch\.nn\.Linear"):
        sparsify_(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), "4:8-T", mvue=True)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_weights_without_numbers_are_refused_by_name(mlp, mode, tmp_path):
    mlp[2].to("meta")
    with pytest.raises(ValueError, match="2: its weight is on the meta device"):
        sparsify_(mlp, "4:8-T", mode=mode)
    assert not hasattr(mlp[0], "parametrizations") and not hasattr(mlp[0], "weight_mask")
    with pytest.raises(ValueError, match="2 is on the meta device"):
        bisparse.verify(mlp, "4:8-T")
    with pytest.raises(ValueError, match=r"2\.weight.*meta device"):
        bisparse.save(mlp, tmp_path / "saved", "4:8-T")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_fsdp1_is_refused_before_and_after_wrapping(mlp, tmp_path, mode, use_orig_params):
    given = copy.deepcopy(mlp)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        how = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
        with pytest.raises(ValueError, match="fully_shard"):
            sparsify_(FullyShardedDataParallel(given, **how), "2:4", mode=mode)
        sparsity = sparsify_(mlp, "2:4", mode=mode)
        wrapped = FullyShardedDataParallel(mlp, **how)
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*first '0'.*fully_shard"):
            sparsity.attach(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bad", [torch.ones(2), "dense", 5, {}], ids=str)
def test_what_is_no_schedule_or_score_is_refused_before_anything_is_changed(mlp, bad):
    before = list(mlp.state_dict())
    for argument in ("schedule", "score"):
        with pytest.raises(ValueError, match=f"{argument}=.*expected"):
            sparsify_(mlp, "2:4", **{argument: bad})
    assert list(mlp.state_dict()) == before
    sparsify_(mlp, "2:4", score="magnitude")


@pytest.mark.parametrize("pattern", ["1:99999-T", "40000:99999-T"])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_pattern_that_would_take_gigabytes_of_padding_is_refused(pattern: str, mode: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match="far larger than the sides"):
        sparsify_(model, pattern, mode=mode, include=["0", "1"])
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], one) for name, one in before.items())
