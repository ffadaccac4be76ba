"""Training in a group of ranks that is not all of them, and errors of one rank. Run once, by three gloo processes, two of
which train together (`group_ranks.py`); each test judges one part of what they wrote."""

import re
from pathlib import Path

import pytest
import torch
from ranks import build

from rank_processes import results_of_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of_ranks(Path(__file__).with_name("group_ranks.py"), 3, tmp_path_factory.mktemp("groups"))


def test_without_a_group_all_ranks_are_compared(results):
    for result in results:
        assert result["without"].startswith("ValueError: 0: the mask on rank 1 differs from rank 0")
        assert "group=" in result["without"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "hsdp"])
def test_ranks_of_a_group_share_the_work_among_them(results, engine):
    one, other = (result["groups"][engine] for result in results[1:])
    assert all(torch.equal(one["masks"][name], other["masks"][name]) for name in one["masks"])
    padded = sum(
        (layer.shape[0] + -layer.shape[0] % 8) * (layer.shape[1] + -layer.shape[1] % 8)
        for layer in build().parameters()
        if layer.ndim == 2
    )
    assert one["solved"] + other["solved"] == 2 * padded and min(one["solved"], other["solved"]) > 0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fsdp weight 4:8-T", "ValueError: 2: its scores .* hold NaN or infinite numbers on rank 2, so no mask"),
        ("fsdp weight 2:4", "ValueError: 2: its scores .* on rank 2, so"),
        ("fsdp weight 50%", "ValueError: 2: its scores .* on rank 2, so"),
        ("fsdp gradient", "ValueError: the gradient of 4 holds NaN or infinite numbers on rank 2 at optimizer step 1"),
        ("ddp weight", "ValueError: 0: its scores .* on rank 1, 2, so"),
    ],
)
def test_numbers_that_are_not_finite_are_told_by_layer_and_rank_on_every_rank(results, case, words):
    one, other = (result["failures"][case] for result in results[1:])
    assert one == other and re.match(words, one)


def test_what_fails_on_one_rank_is_raised_on_every_rank(results):
    one, other = (result["failures"] for result in results[1:])
    assert other["ddp solver"].startswith("MemoryError: no memory for the tiles while rank 2 was searching masks of 0")
    assert one["ddp solver"].startswith("OtherRankError: rank 2 failed while searching masks of 0")
    assert one["ddp solver"].endswith("MemoryError: no memory for the tiles")
    assert other["ddp score"].startswith("KeyError: '2' while rank 2")
    assert (
        one["ddp score"].startswith("OtherRankError: rank 2 failed while searching masks") and "KeyError: '2'" in one["ddp score"]
    )
    assert other["optimizer"].startswith("ValueError: the optimizer does not hold the weights of 1 sparse layers, the first '0'")
    assert one["optimizer"].startswith("OtherRankError: rank 2 failed while attaching the optimizer: ValueError")
