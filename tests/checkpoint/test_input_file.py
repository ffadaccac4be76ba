"""What a checkpoint is read from: regular files, the same from the first byte to the last, and the ones its loader reads."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import State, write_folder, write_shards
from safetensors.torch import load_file, save_file

from bisparse.checkpoint import CheckpointError, detect_patterns, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source
from bisparse.report.figures import read_figures

posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes")


def checkpoint(folder: Path, kind: str) -> Path:
    """A checkpoint of that kind with a config.json."""
    states: list[State] = [{f"{i}.weight": torch.randn(16, 16)} for i in range(4)]
    whole = {name: tensor for state in states for name, tensor in state.items()}
    match kind:
        case "safetensors":
            write_folder(folder, whole)
        case "shards":
            write_shards(folder, states)
        case "torch shards":
            write_shards(folder, states, kind="bin")
        case _:
            folder.mkdir()
            torch.save(whole, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "torch")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def change(path: Path, how: str) -> None:
    """Change a file behind its reader's back."""
    data, status = path.read_bytes(), path.stat()
    other = data[:-8] + bytes(8)
    match how:
        case "replaced":
            path.with_name("new").write_bytes(other)
            os.replace(path.with_name("new"), path)
        case "replaced, as old as before":
            path.with_name("new").write_bytes(other)
            shutil.copystat(path, path.with_name("new"))
            os.replace(path.with_name("new"), path)
        case "written in place":
            path.write_bytes(other)
        case "written in place, as old as before":
            path.write_bytes(other)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "cut":
            os.truncate(path, len(data) - 8)
        case "longer":
            path.write_bytes(data + b" ")
        case "removed":
            path.unlink()


CHANGES = ["replaced", "replaced, as old as before", "written in place", "written in place, as old as before", "cut", "longer",
           "removed"]  # fmt: skip


def aged(folder: Path) -> None:
    """Old enough that the file system's clock has moved on."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


def once(change: Callable[[], None], late: bool) -> Callable[[str, int, int], None]:
    """A progress callback that changes something when the job starts, or when all has been read."""
    left = [change]

    def progress(what: str, done: int, total: int) -> None:
        if left and (not late or done > total // 2):
            left.pop()()

    return progress


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "shards", "torch", "torch shards", "legacy"])
def test_an_input_that_changes_ends_the_job_without_output(tmp_path: Path, kind: str, late: bool) -> None:
    folder = tmp_path / "model"
    files = [path.name for path in checkpoint(folder, kind).glob("*.*") if path.name != "tokenizer.json"]
    for how in CHANGES:
        for name in files if how == "replaced" else files[:1]:  # all files are watched in one way
            shutil.rmtree(folder)
            aged(checkpoint(folder, kind))
            progress = once(lambda path=folder / name, how=how: change(path, how), late)
            with pytest.raises(CheckpointError, match=f"/model/{name} was changed, replaced or removed while it was read"):
                prune_checkpoint(folder, tmp_path / "out", "2:4", progress=progress)
            assert [file.name for file in tmp_path.iterdir()] == ["model"], (how, name)


@pytest.mark.parametrize("kind", ["safetensors", "shards", "torch", "legacy"])
def test_a_verdict_on_an_input_that_changes_is_not_given(tmp_path: Path, kind: str) -> None:
    for how in CHANGES:
        for job in (lambda folder, do: verify_checkpoint(folder, "2:4", progress=do),
                    lambda folder, do: list(detect_patterns(folder, progress=do))):  # fmt: skip
            folder = checkpoint(tmp_path / "model", kind)
            aged(folder)
            path = max(folder.iterdir(), key=lambda one: (one.stat().st_size, one.name))
            with pytest.raises(CheckpointError, match="was changed, replaced or removed"):
                job(folder, once(lambda path=path, how=how: change(path, how), False))
            shutil.rmtree(folder)


@pytest.mark.parametrize("which", ["model", "out"])
def test_a_report_on_an_input_that_changes_is_not_made(tmp_path: Path, which: str) -> None:
    folder = checkpoint(tmp_path / "model", "safetensors")
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    path = tmp_path / which / "model.safetensors"
    aged(path.parent)
    with pytest.raises(CheckpointError, match="was changed, replaced or removed"):
        read_figures(tmp_path / "out", against=folder, progress=once(lambda: change(path, "written in place"), False))


def test_reading_does_not_count_as_a_change(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "shards")
    source = open_source(folder)
    for path in folder.iterdir():
        path.read_bytes()
    (folder / "new.txt").write_text("a file that is no input")
    source.check_unchanged()


@posix
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "w.pt", "w.ckpt", "config.json",
                                  "model.safetensors.index.json", "pytorch_model.bin.index.json"])  # fmt: skip
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "link to a pipe", "link to nothing"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str, what: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if name == "config.json":
        save_file({"a.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    match what:
        case "pipe":
            os.mkfifo(folder / name)
        case "device":
            (folder / name).symlink_to("/dev/zero")
        case "folder":
            (folder / name).mkdir()
        case "link to a pipe":
            os.mkfifo(tmp_path / "pipe")
            (folder / name).symlink_to(tmp_path / "pipe")
        case _:
            (folder / name).symlink_to(tmp_path / "nothing")
    for path in (folder,) if name.endswith(".json") or what == "folder" else (folder, folder / name):
        for job in (lambda path: prune_checkpoint(path, tmp_path / "out", "2:4"), lambda path: verify_checkpoint(path, "2:4")):
            with pytest.raises(CheckpointError, match=r"is not a regular file|No such file|not exist|a broken link") as caught:
                job(path)
            assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


@posix
def test_a_device_named_directly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/dev/zero is not a regular file"):
        prune_checkpoint("/dev/zero", tmp_path / "out", "2:4")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "bisparse.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "{", "\ufeff{}", b"\xff\xfe"])
def test_json_that_is_no_plain_object(tmp_path: Path, name: str, content: str | bytes) -> None:
    folder = checkpoint(tmp_path / "model", "shards")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(folder, "2:4")
    assert name in str(caught.value) and len(str(caught.value)) < 600


def test_the_weights_that_transformers_loads_are_the_ones_that_are_read(tmp_path: Path) -> None:
    # Its order: model.safetensors, its shards, pytorch_model.bin, its shards.
    folder = tmp_path / "model"
    order = ["model.safetensors", "shards", "pytorch_model.bin", "torch shards"]
    truth = {name: {"a.weight": torch.randn(8, 8)} for name in order}
    for number, name in reversed(list(enumerate(order))):
        match name:
            case "model.safetensors":
                save_file(truth[name], folder / name)
            case "pytorch_model.bin":
                torch.save(truth[name], folder / name)
            case _:
                write_shards(tmp_path / "shards", [truth[name]], kind="bin" if name == "torch shards" else "safetensors")
                shutil.copytree(tmp_path / "shards", folder, dirs_exist_ok=True)
                shutil.rmtree(tmp_path / "shards")
        prune_checkpoint(folder, tmp_path / f"out{number}", "2:4")
        (written,) = (tmp_path / f"out{number}").glob("model*.safetensors")
        kept = load_file(written)["a.weight"]
        assert torch.equal(kept, truth[name]["a.weight"] * (kept != 0)) and (kept != 0).any(), name


def test_a_leftover_index_is_neither_read_nor_copied(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "safetensors")
    index = {"weight_map": {"0.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    report = prune_checkpoint(folder, tmp_path / "out", "2:4")
    assert len(report) == 4 and not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()
    assert any("pytorch_model.bin.index.json" in note for note in report.notes)
