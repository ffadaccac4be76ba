"""Every function that writes says in our words why it cannot, and leaves nothing half written: by rights, room and place."""

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bisparse
from bisparse.accelerate.grid import Grid, GridPoint
from bisparse.accelerate.timing import Pass, Timing
from bisparse.checkpoint import CheckpointError, to_dense
from bisparse.checkpoint.model_card import record_evaluation
from bisparse.export import export_onnx, save_quantized
from bisparse.pruning.journal import JournalError
from bisparse.quantization import quantize_
from bisparse.report import plot_diversity, write_comparison, write_report
from bisparse.training.integrations.transformers import SparsityCallback

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="fork, users and limits"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NOBODY = 65534


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()


def _save(place: Path, source: Path) -> None:
    pruned = model()
    bisparse.prune_(pruned, "2:4")
    bisparse.save(pruned, place / "out", "2:4")


def _quantized(place: Path, source: Path) -> None:
    pruned = model()
    save_quantized(pruned, place / "out", quantize_(pruned, "int8"))


def _journal(place: Path, source: Path) -> None:
    bisparse.prune_(model(), "2:4", "adaprune", [torch.randn(40, 32) for _ in range(4)], resume=place / "journal")


def _trainer(place: Path, source: Path) -> None:
    trained = model()
    callback = SparsityCallback.__new__(SparsityCallback)
    callback.sparsity, callback.distill = bisparse.sparsify_(trained, "2:4"), None
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=5)
    callback.on_save(SimpleNamespace(output_dir=place), state, None, model=trained)


def _evaluation(place: Path, source: Path) -> None:
    record_evaluation(place / "pruned", [{"kind": "perplexity", "perplexity": 3.5, "tokens": 100}])


def _grid(place: Path, source: Path) -> None:
    timing = Timing(Pass(1, 1, 1), Pass(1, 1, 1))
    Grid("cpu", "float32", (GridPoint("cpu", False, True, 64, 64, 16, timing),) * 200, {}).write(place / "grid.json")


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "a report": lambda place, source: write_report(source, output=place / "page.html"),
    "a comparison": lambda place, source: write_comparison([source, source], output=place / "page.html"),
    "a plot": lambda place, source: plot_diversity(place / "plot.svg"),
    "a page of figures": _evaluation,
    "measured times": _grid,
    "a checkpoint": _save,
    "a pruned file": lambda place, source: bisparse.prune_checkpoint(source, place / "out", "1:4"),
    "plain weights": lambda place, source: to_dense(source, place / "out"),
    "a quantised model": _quantized,
    "a journal": _journal,
    "the Trainer's state": _trainer,
}


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        pruned = model()
        bisparse.prune_(pruned, "2:4")
        bisparse.save(pruned, Path(name) / "pruned", "2:4")
        os.chmod(name, 0o755)
        for path in (Path(name) / "pruned", *(Path(name) / "pruned").iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for write in WRITERS.values():  # compiles and imports what children need, while it is allowed
            if write not in (_evaluation, _trainer):
                with tempfile.TemporaryDirectory() as place:
                    write(Path(place), Path(name) / "pruned")
        yield Path(name) / "pruned"


@contextmanager
def place_for(writer: str, source: Path) -> Iterator[Path]:
    """A folder to write into, with what the writer expects there."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "place"
        place.mkdir()
        if writer == "a page of figures":
            _save(place, source)
            (place / "out").rename(place / "pruned")
        if writer == "the Trainer's state":
            (place / "checkpoint-5").mkdir()
        os.chmod(name, 0o755)
        yield place


def contents(place: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
        if "journal" not in str(path)
    }


def said_by_child(job: Callable[[], object]) -> str:
    """Run a job in a fork; the type and text of its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing was raised"
        try:
            job()
        except BaseException as error:  # noqa: BLE001, a child must not run on into the tests of its parent
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text
    return text


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_may_not_be_written(writer: str, source: Path) -> None:
    with place_for(writer, source) as place:
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = contents(place)

        def job() -> None:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            WRITERS[writer](place, source)

        said = said_by_child(job)
        assert contents(place) == before
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
    kind = "JournalError" if writer == "a journal" else "CheckpointError"
    assert said.startswith(f"{kind}: {place}") and "ermission denied" in said, said
    assert ".part" not in said


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("room", [0, 700])
def test_a_disk_that_is_full(writer: str, room: int, source: Path) -> None:
    with place_for(writer, source) as place:
        before = contents(place)

        def job() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            WRITERS[writer](place, source)

        said = said_by_child(job)
        assert contents(place) == before
    kind = "JournalError" if writer == "a journal" else "CheckpointError"
    assert said.startswith(f"{kind}: {place}") and ("disk is full" in said or "File too large" in said), said


@pytest.mark.parametrize("writer", [one for one in WRITERS if one not in ("a page of figures", "the Trainer's state")])
def test_a_file_where_a_folder_is_needed(writer: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises((CheckpointError, JournalError), match="file"):
        WRITERS[writer](tmp_path / "file", source)
    assert contents(tmp_path) == {str(tmp_path / "file"): b"a file"}


def test_an_onnx_file_that_cannot_be_written_and_the_modes_of_the_model(tmp_path: Path, source: Path) -> None:
    network = model().train()
    network[2].eval()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    inputs = torch.randn(2, 32)
    with pytest.raises(CheckpointError, match="where a folder is needed"):
        export_onnx(network, tmp_path / "file" / "model.onnx", inputs)
    for place in (tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(ValueError, match=f"{place} is a (folder|device)"):
            export_onnx(network, place, inputs, overwrite=True)
    export_onnx(network, tmp_path / "model.onnx", inputs)
    assert [one.training for one in network] == [True, True, False] and network.training
