"""Ranks of a job as processes of their own: a script run once for each, and what each of them wrote."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def results_of_ranks(script: Path, ranks: int, folder: Path) -> list[Any]:
    """Run ``script RANK FOLDER`` for every rank at once; each writes ``rank0.pt`` and so on to the folder."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        # One that waits for another that has failed would wait for ever.
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for error in errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
