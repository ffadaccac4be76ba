"""Files next to the weights that cannot be copied are named: broken links and pipes."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bisparse.checkpoint import prune_checkpoint


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_links_that_lead_nowhere_and_pipes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    save_file({"a.up.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blobs" / "that are not there")
    (folder / "more" / "vocab.txt").symlink_to("itself")
    os.mkfifo(folder / "pipe")
    (folder / "merges.txt").write_text("a b")
    report = prune_checkpoint(folder, tmp_path / "out", "2:4")
    (note,) = [one for one in report.notes if "links that lead nowhere" in one]
    assert all(name in note for name in ("tokenizer.json", "more/vocab.txt", "pipe")) and "merges.txt" not in note
    assert (tmp_path / "out" / "merges.txt").exists() and not os.path.lexists(tmp_path / "out" / "tokenizer.json")
