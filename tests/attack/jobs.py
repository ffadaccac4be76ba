"""Jobs in forked processes, for kills, full disks and rivals: what they write, and whether that is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bisparse
from bisparse.checkpoint import CheckpointError
from bisparse.pruning import AdaPrune
from bisparse.pruning.journal import JournalError

__all__ = ["JOBS", "NO_MESSAGE", "ended", "forked", "left_behind", "make_input", "model_and_data", "weights_of"]

LONGEST_S = 60
NO_MESSAGE = 99
"""Exit code of a job whose error could not be printed, since its log could not be written."""


@cache
def warm_up() -> None:
    """Import and compile what the jobs use, once, before they are forked."""
    import jinja2  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import scipy.linalg  # noqa: F401

    import bisparse.cli.calibrated
    import bisparse.cli.model_source
    import bisparse.report

    for pattern in ("4:8-T", "2:4-T", "2:4"):
        bisparse.solve(torch.rand(192, 192), pattern).check()
        model, data = model_and_data()
        bisparse.prune_(model, pattern, AdaPrune(), data)


_logs: dict[int, threading.Thread] = {}
"""By pid, what copies a job's output to its log."""


def forked(job: Callable[[], int], *, own_log: bool = False) -> int:
    """Run a job in a forked process; its pid. This process writes its output to ``log.txt``, whatever limits the job has.

    Args:
        own_log: the job writes ``log.txt`` itself, with its own limits.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        _logs[pid] = threading.Thread(target=_copy, args=(read, Path("log.txt").absolute()), daemon=True)
        _logs[pid].start()
        return pid
    code = NO_MESSAGE
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs in the background
    try:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND) if own_log else write
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = job()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except (JournalError, CheckpointError) as error:
        print(error)
        code = 1
    except KeyboardInterrupt:  # what a job in Python, not on the command line, ends with
        code = 130
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        code = 98
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    return pid


def _copy(read: int, path: Path) -> None:
    with os.fdopen(read, "rb", buffering=0) as pipe, path.open("ab", buffering=0) as log:
        while data := pipe.read(1 << 16):
            log.write(data)


def ended(pid: int) -> int | None:
    """The exit code of a child, negative for a signal; None, and it is killed, where it takes too long."""
    limit = time.monotonic() + LONGEST_S
    code = None
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _logs.pop(pid).join(timeout=10)
    return code


def make_input(folder: Path, seed: int, layers: int = 6) -> Path:
    """A checkpoint that takes a moment to prune."""
    torch.manual_seed(seed)
    folder.mkdir()
    state = {f"layers.{i}.up.weight": torch.randn(192, 192) for i in range(layers)} | {"norm.weight": torch.randn(192)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def model_and_data() -> tuple[nn.Module, list[torch.Tensor]]:
    """For calibrated jobs; also what ``attack.jobs:model_and_data`` gives the command line."""
    torch.manual_seed(7)
    return Chain().eval(), [torch.randn(16, 48) for _ in range(4)]


def _command(*arguments: str) -> int:
    from bisparse.cli import run

    sys.argv = ["bisparse", *arguments]
    run()
    return 0


def prune(folder: Path) -> int:
    return _command("prune", "model", "out", "-p", "4:8-T", "--overwrite")


def convert(folder: Path) -> int:
    return _command("convert", "attack.jobs:model_and_data", "out", "--to", "2:4-T", "--overwrite")


def calibrated(folder: Path) -> int:
    return _command(
        "prune", "attack.jobs:model_and_data", "out", "-p", "2:4", "--method", "adaprune", "--resume", "journal", "--overwrite"
    )


def journal(folder: Path) -> int:
    model, data = model_and_data()
    bisparse.prune_(model, "4:8-T", AdaPrune(), data, resume=folder / "journal", keep_journal=True)
    bisparse.save(model, folder / "out", "4:8-T", overwrite=True)
    bisparse.pruning.remove_journal(folder / "journal")
    return 0


def report(folder: Path) -> int:
    return _command("report", "pruned", "-o", "out.html")


JOBS: dict[str, Callable[[Path], int]] = {
    "prune": prune,
    "convert": convert,
    "calibrated": calibrated,
    "journal": journal,
    "report": report,
}


def weights_of(folder: Path) -> dict[str, bytes] | None:
    """The weights and masks of an output; None where it is absent. A page counts as one file."""
    if folder.suffix == ".html":
        return {"page": folder.read_bytes()[-20:]} if folder.exists() else None
    if not folder.exists():
        return None
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {
            f"{path.name} {name}": one.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for name, one in load_file(path).items()
        }
    if not bisparse.verify_checkpoint(folder):
        found["verify"] = b"does not hold"
    return found


def left_behind(folder: Path) -> list[str]:
    """What a finished job should not have left in the folder."""
    ours = {"model", "pruned", "out", "out.html", "log.txt", "journal", "whole", "cache"}
    return sorted(path.name for path in folder.iterdir() if path.name not in ours and not path.name.endswith(".lock"))
