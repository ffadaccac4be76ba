"""Files appear whole or not at all, and nothing but a regular file is ever replaced."""

import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bisparse.accelerate.grid import Grid
from bisparse.atomic_file import atomic_file
from bisparse.errors import CheckpointError
from bisparse.pruning.journal import Journal
from bisparse.report import plot_diversity

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, devices and pipes")


def write(path: Path, text: str = "new") -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def test_a_file_is_made_with_its_folders_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "page.html"
    write(path, "old")
    path.chmod(0o640)
    with pytest.raises(KeyError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    write(path)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, dangling: bool) -> None:
    (tmp_path / "real").mkdir()
    if not dangling:
        (tmp_path / "real" / "page").write_text("old")
    (tmp_path / "chain").symlink_to("real/page")
    (tmp_path / "link").symlink_to(tmp_path / "chain")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "chain").is_symlink()
    assert (tmp_path / "real" / "page").read_text() == "new"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["chain", "link", "real"]


def obstacle(path: Path, kind: str) -> Path:
    """Something at a path that is no regular file."""
    match kind:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a socket":
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(os.fspath(path))
        case "a device":
            return Path(os.devnull)
        case "a link to a device":
            path.symlink_to(os.devnull)
        case "a link to a folder":
            path.symlink_to(path.parent)
        case "a link to itself":
            path.symlink_to(path.name)
    return path


OBSTACLES = ["a folder", "a pipe", "a socket", "a device", "a link to a device", "a link to a folder", "a link to itself"]
WRITERS: dict[str, Callable[[Path], object]] = {
    "a text": write,
    "a plot": plot_diversity,
    "measured times": lambda path: Grid("cpu", "float32", (), {}).write(path),
}


@pytest.mark.parametrize("kind", OBSTACLES)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_regular_file_is_refused_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = obstacle(Path("page.svg"), kind)
    if writer == "a plot" and kind == "a device":
        pytest.skip("has no suffix that says the format")
    before = path.lstat()
    with pytest.raises(ValueError, match=f"{path} is "):
        WRITERS[writer](path)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert len(list(Path().iterdir())) == (kind != "a device")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_file_that_cannot_be_written_goes_by_the_name_that_its_user_gave(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(CheckpointError, match="could not be written: there is a file where a folder is needed") as caught:
        write(tmp_path / "file" / "page")
    assert str(tmp_path / "file") in str(caught.value) and ".part" not in str(caught.value)


def test_a_journal_does_not_write_through_a_link_of_its_unfinished_name(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    folder = tmp_path / "journal"
    with Journal(folder, {}, keep=True) as journal:
        path = journal._path("done", "a")
        path.with_suffix(".safetensors.part").symlink_to(tmp_path / "thesis")
        journal.put("done", "a", {"w": torch.ones(2)})
        assert journal.get("done", "a")[0]["w"].tolist() == [1, 1]
    assert (tmp_path / "thesis").read_text() == "years of work"
