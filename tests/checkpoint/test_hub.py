"""Models named as on the hub are read from the local cache, and nothing is downloaded."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_folder
from torch import nn
from typer.testing import CliRunner

from bisparse.checkpoint import (
    CheckpointError,
    detect_patterns,
    load,
    plan_checkpoint,
    prune_checkpoint,
    read_sidecar,
    to_dense,
    verify_checkpoint,
)  # fmt: skip
from bisparse.cli import app

COMMIT = "0123456789abcdef0123456789abcdef01234567"
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, as huggingface_hub lays it out: snapshots link to blobs."""
    entry = tmp_path / "hub" / "models--org--name"
    files = write_folder(tmp_path / "files", {"a.weight": torch.randn(16, 16)})
    (entry / "blobs").mkdir(parents=True)
    (entry / "snapshots" / COMMIT).mkdir(parents=True)
    for number, path in enumerate(path for path in files.iterdir() if path.is_file()):
        path.rename(entry / "blobs" / str(number))
        (entry / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return entry


@pytest.mark.parametrize("main", [True, False])
def test_every_reader_takes_a_model_of_the_cache(cache: Path, tmp_path: Path, main: bool) -> None:
    if not main:
        (cache / "refs" / "main").unlink()
    assert [layer.name for layer in plan_checkpoint("org/name", "2:4").layers] == ["a"]
    prune_checkpoint("org/name", "out", "2:4")
    sidecar = read_sidecar("out")
    assert sidecar is not None and sidecar.source == f"org/name@{COMMIT[:12]}"
    assert {path.name for path in Path("out").iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not verify_checkpoint("org/name", "2:4") and verify_checkpoint("out")
    assert [one.layer for one in detect_patterns("org/name")] == ["a"]
    to_dense("org/name", "plain")
    assert load(nn.ModuleDict({"a": nn.Linear(16, 16, bias=False)}), "org/name") is None
    for target in (cache.parent, cache / "snapshots" / COMMIT / "x"):
        with pytest.raises(CheckpointError):
            prune_checkpoint("org/name", target, "2:4", overwrite=True)


def test_every_command_takes_a_model_of_the_cache(cache: Path) -> None:
    for command, code in (
        (["prune", "org/name", "out", "-p", "2:4"], 0), (["prune", "org/name", "--dry-run"], 0),
        (["verify", "org/name", "-p", "2:4"], 1), (["verify", "out"], 0), (["info", "org/name"], 0),
        (["report", "out", "--against", "org/name"], 0), (["convert", "org/name", "plain", "--to-dense"], 0),
        (["bench", "--model", "org/name"], 0),
    ):  # fmt: skip
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == code, (command, result.output)


def test_an_existing_path_comes_before_the_cache(cache: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "org" / "name", {"b.weight": torch.randn(16, 16)})
    assert [layer.name for layer in plan_checkpoint("org/name", "2:4").layers] == ["b"]


@pytest.mark.parametrize("command", [
    ["prune", "org/absent", "out"], ["prune", "org/absent", "out", "--method", "wanda"], ["verify", "org/absent", "-p", "2:4"],
    ["info", "org/absent"], ["report", "org/absent"], ["convert", "org/absent", "out", "--to", "2:4"],
    ["convert", "org/absent", "out", "--to-dense"], ["bench", "--model", "org/absent"],
])  # fmt: skip
def test_a_model_that_is_not_there_names_the_command_that_downloads_it(cache: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code in (1, 2)
    assert "hf download org/absent" in json.loads(result.stdout)["error"]
    assert not Path("out").exists()


def test_a_download_that_is_not_whole_says_so(cache: Path) -> None:
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights.*`hf download org/name` fetches"):
        verify_checkpoint("org/name", "2:4")


@pytest.mark.parametrize("name", ["absent", "a/b/c", "../x/y", "models--a/b", "x" * 300, "a\0b", "org/..", "/no/such"])
def test_what_is_no_name_of_a_model_is_a_missing_path(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist|cannot be read|is not a path") as refused:
        verify_checkpoint(name, "2:4")
    assert "hf download" not in str(refused.value)
