"""A rank that is stopped: the other one says that it waits, and ends with an error and its model unchanged."""

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from rank_processes import start_rank

WORKER = Path(__file__).with_name("stopped_ranks.py")
JOBS = ("prune_", "sparsify_")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[list[BaseProcess], Path]]]:
    """Both jobs at once, because their ranks mostly wait: the two ranks of each, and their folder."""
    started = {}
    try:
        for job in JOBS:
            folder = tmp_path_factory.mktemp(job)
            started[job] = [start_rank(WORKER, rank, folder, job) for rank in (0, 1)], folder
        yield started
    finally:
        for rank in [rank for ranks, _ in started.values() for rank in ranks]:
            rank.kill()
            rank.join()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
@pytest.mark.parametrize("job", JOBS)
def test_a_rank_that_is_stopped_ends_the_job_of_the_other_with_an_error(
    job: str, jobs: dict[str, tuple[list[BaseProcess], Path]]
) -> None:
    ranks, folder = jobs[job]
    ranks[0].join(120)
    assert ranks[0].exitcode == 0
    assert (folder / "stopped").exists() and ranks[1].is_alive()
    found = torch.load(folder / "rank0.pt")
    assert "for another rank, which has ended, or is stopped or busy" in found["said"] and "timeout=" in found["said"]
    assert found["unchanged"]
    assert "rank 0 has waited 1 s for the other ranks" in (folder / "log0.txt").read_text()
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGCONT)  # it finds that the other one has ended
    ranks[1].join(60)
    assert ranks[1].exitcode == 0
    found = torch.load(folder / "rank1.pt")
    assert "for another rank, which has ended" in found["said"] and found["unchanged"]
