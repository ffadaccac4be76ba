"""A rank that is stopped: the other one says that it waits, and ends with an error and its model unchanged."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("stopped_ranks.py")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
@pytest.mark.parametrize("job", ["prune_", "sparsify_"])
def test_a_rank_that_is_stopped_ends_the_job_of_the_other_with_an_error(job: str, tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path), job], stderr=subprocess.DEVNULL) for rank in (0, 1)]
    try:
        assert ranks[0].wait(timeout=120) == 0
        assert (tmp_path / "stopped").exists() and ranks[1].poll() is None
        found = torch.load(tmp_path / "rank0.pt")
        assert "for another rank, which has ended, or is stopped or busy" in found["said"] and "timeout=" in found["said"]
        assert found["unchanged"]
        assert "rank 0 has waited 1 s for the other ranks" in (tmp_path / "log0.txt").read_text()
        os.kill(ranks[1].pid, signal.SIGCONT)  # it finds that the other one has ended
        limit = time.monotonic() + 60
        while ranks[1].poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert ranks[1].returncode == 0
        found = torch.load(tmp_path / "rank1.pt")
        assert "for another rank, which has ended" in found["said"] and found["unchanged"]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
