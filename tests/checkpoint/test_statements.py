"""A sidecar is compared with its weights: what these contradict is said, and never handed on as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_folder
from torch import nn

import bisparse
from bisparse.checkpoint import load, prune_checkpoint, read_sidecar, save, verify_checkpoint
from bisparse.report import read_figures, write_report


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_folder(tmp_path / "dense", {"a.weight": torch.randn(16, 32), "b.weight": torch.randn(32, 16)})
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", "2:4-T")
    return tmp_path / "out"


def change(folder: Path, key: str, value: Any) -> None:
    path = folder / "bisparse.json"
    content = json.loads(path.read_text())
    (content if key == "parameters" else content["layers"][0])[key] = value
    path.write_text(json.dumps(content))


def model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(32, 16, bias=False), "b": nn.Linear(16, 32, bias=False)})


CHANGES = [
    ("density", 0.25, "the density of a is 0.49"),
    ("dtype", "bfloat16", "a is float32, not bfloat16"),
    ("value", 1.0, "the kept weights of a sum up to"),
    ("checksum", 7, "a is not the weight that its figures are about"),
    ("parameters", 10**9, "the number of parameters is not 1,000,000,000"),
    ("parameters", 5, "the number of parameters is not 5"),
]


def test_what_is_right_is_not_contradicted(pruned: Path) -> None:
    assert verify_checkpoint(pruned).contradicted == ()
    assert load(model(), pruned) == read_sidecar(pruned)
    assert read_figures(pruned, pruned.parent / "dense").contradicted == ()


@pytest.mark.parametrize(("key", "value", "said"), CHANGES)
def test_what_the_weights_contradict_is_said_by_verify_load_and_report(pruned: Path, key: str, value: object, said: str) -> None:
    change(pruned, key, value)
    checked = verify_checkpoint(pruned)
    assert checked and len(checked.contradicted) == 1 and said in checked.contradicted[0] and said in checked.message
    with pytest.warns(UserWarning, match="bisparse.json is wrong"):
        sidecar = load(model(), pruned)
    assert sidecar is not None and said in sidecar.report.notes[-1]
    figures = read_figures(pruned)
    for report in (sidecar.report, figures.report):
        first = report.layers[0]
        assert (first.density, first.dtype, report.parameters) == (checked.layers[0].density, "float32", 1024)
        assert key == "parameters" or (first.retained, first.gap, first.value) == (None, None, None)
    assert said in figures.contradicted[0]
    write_report(figures, pruned.parent / "page.html")
    page = (pruned.parent / "page.html").read_text()
    assert said in page and "what bisparse.json says" in page


def test_the_share_kept_is_compared_with_the_dense_weights(pruned: Path) -> None:
    change(pruned, "retained", 0.99)
    assert "a keeps" in read_figures(pruned, pruned.parent / "dense").contradicted[0]


def test_a_model_that_changed_after_its_report_is_saved_with_its_own_figures(tmp_path: Path) -> None:
    own = model()
    report = bisparse.prune_(own, "2:4-T")
    save(own, tmp_path / "same", report=report)
    assert read_sidecar(tmp_path / "same").report.gap == report.gap  # type: ignore[union-attr]
    save(own.half(), tmp_path / "half", report=report)
    saved = read_sidecar(tmp_path / "half")
    assert saved is not None and saved.report.gap is None and saved.report.layers[0].dtype == "float16"
    assert "changed after the report" in saved.report.notes[-1]
    assert verify_checkpoint(tmp_path / "half").contradicted == ()
