"""A teacher over 2 gloo processes: what DDP and FSDP2 train equals one process with the whole batch."""

from pathlib import Path

import pytest
import torch
from distill_ranks import trained

from rank_processes import results_of_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of_ranks(Path(__file__).with_name("distill_ranks.py"), 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, both"])
def test_ranks_train_what_one_process_trains(results, kind, mode):
    expected = trained("alone", mode)
    for own in results:
        for name, value in expected.items():
            assert torch.allclose(own[f"{kind} {mode}"][name], value, atol=1e-5), name


def test_a_sharded_model_is_not_copied(results):
    assert all("before fully_shard" in own["sharded"] for own in results)
