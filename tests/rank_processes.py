"""Ranks of a job as processes of their own: a script run once for each, and what each of them wrote.

On Linux they are forked from one process that has imported torch and this package, and has set up numba: an import takes
a rank longer than most jobs here.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# Forking a process that has imported frameworks of macOS is not safe there.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(
        [
            "torch._dynamo",
            "torch.distributed.checkpoint",
            "torch.distributed.fsdp",
            "numba",
            "bisparse.accelerate",
            "bisparse.pruning",
            "bisparse.training",
            "numba_set_up",
        ]
    )


def _start(process: BaseProcess) -> None:
    """Start a process, with the folder of this file in the path of the process that it is forked from.

    Before Python 3.14 that process looks for modules to import in ``PYTHONPATH`` alone, and says nothing of what it misses.
    """
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        process.start()


def start_rank(script: Path, rank: int, folder: Path, *arguments: str) -> BaseProcess:
    """Start ``script RANK FOLDER ARGUMENTS``; what it prints goes to ``rank0.log`` and so on in the folder."""
    given = (str(script), [str(rank), str(folder), *arguments], str(folder / f"rank{rank}.log"))
    process = CONTEXT.Process(target=_run, args=given, daemon=True)
    _start(process)
    return process


def _run(script: str, arguments: list[str], log: str) -> None:
    _write_to(log)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _write_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)


def results_of_ranks(script: Path, ranks: int, folder: Path) -> list[Any]:
    """Run ``script RANK FOLDER`` for every rank at once; each writes ``rank0.pt`` and so on to the folder."""
    logs = _finish([start_rank(script, rank, folder) for rank in range(ranks)], folder)
    assert all(code == 0 for code, _ in logs), "\n".join(log for _, log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def command_on_ranks(ranks: int, folder: Path, *arguments: str) -> list[tuple[int | None, str]]:
    """Run ``bisparse ARGUMENTS`` in a folder on every rank, in the environment that torchrun gives it; exit codes and logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(ranks):
        environment = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (list(arguments), environment, str(folder), str(folder / f"rank{rank}.log"))
        processes.append(CONTEXT.Process(target=_run_command, args=given, daemon=True))
        _start(processes[-1])
    return _finish(processes, folder)


def _run_command(arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    _write_to(log)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["bisparse", *arguments]
    from bisparse.__main__ import main

    main()


def _finish(processes: list[BaseProcess], folder: Path) -> list[tuple[int | None, str]]:
    deadline = time.monotonic() + 240
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        # One that waits for another that has failed would wait for ever.
        for process in processes:
            process.kill()
    logs = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(len(processes))]
    return [(process.exitcode, log) for process, log in zip(processes, logs, strict=True)]
