"""DDP and FSDP2 with two gloo processes. They run once (`ranks.py`); each test judges one part of what they wrote."""

import sys
from pathlib import Path

import pytest
import torch

from bisparse import finalize_, prune_, solve, sparsify_, verify

sys.path.insert(0, str(Path(__file__).parent))
from accelerated_ranks import build as accelerated_build
from accelerated_ranks import train as accelerated_train
from ranks import STEPS, build, train

from rank_processes import results_of_ranks

CASES = [("dynamic", "4:8-T"), ("static", "4:8-T"), ("dynamic", "2:4")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of_ranks(Path(__file__).with_name("ranks.py"), 2, tmp_path_factory.mktemp("ranks"))


def alone(mode, pattern, optimizer_class, **settings):
    """The same run in one process, on the whole batch."""
    model = build()
    sparsity = sparsify_(model, pattern, mode=mode, refresh=2)
    optimizer = optimizer_class(model.parameters(), **settings)
    sparsity.attach(optimizer)
    train(model, optimizer, range(STEPS))
    masks = {layer.name: layer.mask.clone() for layer in sparsity.layers}
    return finalize_(model).state_dict(), masks


@pytest.mark.parametrize(("mode", "pattern"), CASES)
def test_ddp_ranks_hold_the_same_masks_and_equal_a_single_process(results, mode, pattern):
    one, other = (result[f"ddp {mode} {pattern}"] for result in results)
    assert one["step"] == other["step"] == STEPS
    expected, masks = alone(mode, pattern, torch.optim.SGD, lr=0.5, momentum=0.9)
    for name, value in expected.items():
        assert torch.equal(one["state"][name], other["state"][name])
        assert torch.allclose(one["state"][name], value, atol=2e-5), name
        assert verify(value, pattern) if value.ndim == 2 else True
    for name, mask in masks.items():
        assert torch.equal(one["masks"][name], mask) and torch.equal(other["masks"][name], mask)


def test_ddp_ranks_share_the_work(results):
    both = [result["ddp dynamic 4:8-T"]["solved"] for result in results]
    model = build()
    padded = sum(
        (rows + -rows % 8) * (columns + -columns % 8)
        for rows, columns in (layer.shape for layer in model.parameters() if layer.ndim == 2)
    )
    assert sum(both) == padded * (STEPS // 2)
    assert max(both) < 0.7 * sum(both)


@pytest.mark.parametrize(("mode", "pattern"), CASES)
def test_fsdp2_equals_a_single_process_though_tiles_straddle_shards(results, mode, pattern):
    one, other = (result[f"fsdp {mode} {pattern}"] for result in results)
    expected, masks = alone(mode, pattern, torch.optim.AdamW, lr=0.05)
    assert one["plain"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(one["plain"][name], other["plain"][name])
        assert torch.allclose(one["plain"][name], value, atol=1e-4), name
    for name, mask in masks.items():
        assert torch.equal(one["masks"][name], mask) and torch.equal(other["masks"][name], mask)
        assert verify(one["plain"][f"{name}.weight"], pattern)
    if mode == "dynamic":
        assert "plain_state_dict" in one["finalize"]


def test_fsdp2_sharded_state_saves_and_loads(results):
    for result in results:
        found = result["fsdp resume"]
        assert found["step"] == 2
        for name, value in found["whole"].items():
            assert torch.equal(found["resumed"][name], value), name
        prices, expected = found["prices"]
        assert all(torch.equal(prices[name], expected[name]) for name in expected)
        history, whole = found["histories"]
        assert history == whole and [step for step, *_ in whole] == [1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("mode", "pattern"), CASES)
def test_all_ranks_record_the_same_history(results, kind, mode, pattern):
    one, other = (result[f"{kind} {mode} {pattern}"]["history"] for result in results)
    assert one == other and [step for step, *_ in one] == ([2] if mode == "dynamic" else [])


def test_a_model_sharded_before_can_be_static_and_not_dynamic(results):
    for result in results:
        found = result["sharded first"]
        assert "before fully_shard" in found["refused"]
        for name, value in found["state"].items():
            if value.ndim == 2:
                assert verify(value, "4:8-T", name=name) and 0.3 < float((value != 0).double().mean()) < 0.6


def test_ranks_that_disagree_are_told(results):
    for result in results:
        messages = result["disagreement"]
        assert messages["mask"].startswith("0: the mask on rank 1 differs from rank 0") and "seed" in messages["mask"]
        assert "0: the pattern on rank 1 differs from rank 0 (2:4 against 4:8-T)" in messages["pattern"]
        assert "rank 1 has other sparse layers than rank 0" in messages["layers"]
        assert messages["refresh"].startswith("refresh is 7 on rank 1 and 5 on rank 0: call sparsify_ with the same arguments")
        assert messages["steps"].startswith("steps is 11 on rank 1 and 10 on rank 0")
        assert "FixedDecay" in messages["decay"] and "rank 1" in messages["decay"]
        assert "pass steps= to sparsify_" in messages["run length"]


def test_pruning_over_ranks_gives_the_masks_of_one_process(results):
    found = results[0]["large prune"]
    for name, weight in found["dense"].items():
        if weight.ndim == 2:
            best = solve(weight.abs(), "8:16-T").check()
            assert torch.equal(found["state"][name], weight * best.mask)


def test_accelerated_layers_under_ddp_and_fsdp2_equal_a_masked_dense_single_process(results):
    model = accelerated_build()
    sparsity = sparsify_(model, "2:4-T", refresh=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    for rank in (0, 1):
        assert results[rank]["accelerated"].keys() == results[0]["accelerated"].keys()
    accelerated_train(model, optimizer)
    masks = [layer.mask.clone() for layer in sparsity.layers]
    expected = finalize_(model).state_dict()
    one, other = (result["accelerated"] for result in results)
    for kind in ("ddp", "fsdp"):
        for name, value in expected.items():
            assert torch.equal(one[kind][name], other[kind][name])
            assert torch.allclose(one[kind][name], value, atol=1e-5), (kind, name)
        for ours, theirs, mask in zip(one[f"{kind} masks"], other[f"{kind} masks"], masks, strict=True):
            assert torch.equal(ours, theirs) and torch.equal(ours, mask)
    assert "is sharded over ranks already: call accelerate_ before fully_shard" in one["late"]
    assert "call accelerate_ before fully_shard" in one["late and plain"]
    given = accelerated_build()
    prune_(given, "2:4-T")
    for name, value in given.state_dict().items():
        assert torch.equal(one["fixed"]["state"][name], 2 * value)
    assert "0.weight is sharded over ranks: save plain_state_dict(model)" in one["fixed"]["said"]
