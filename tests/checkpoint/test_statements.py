"""A sidecar is compared with its weights: what these contradict is said, and never handed on as it was."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bisparse
from bisparse import CheckpointError
from bisparse.checkpoint import load, load_masks, prune_checkpoint, read_sidecar, save, verify_checkpoint
from bisparse.pruning import NetworkReconstruction
from bisparse.report import read_figures, write_report
from bisparse.results import PruneReport


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_of_a_quantised_weight_do_not_contradict_what_is_said_of_the_weight(pruned: Path, dtype: torch.dtype) -> None:
    state = load_file(pruned / "model.safetensors")
    scale = state["a.weight"].abs().amax(1, keepdim=True) / 100
    numbers = (state["a.weight"].sign() + state["a.weight"] / scale).to(dtype)
    save_file({**state, "a.weight": numbers, "a.weight_scale": scale}, pruned / "model.safetensors")
    assert verify_checkpoint(pruned).contradicted == ()
    figures = read_figures(pruned, pruned.parent / "dense")
    assert figures.contradicted == () and figures.layers[0].change is None and figures.layers[1].change is not None
    assert "quantised layers, whose weights were not compared with the dense ones: 1" in figures.report.notes
    change(pruned, "density", 0.25)
    assert "the density of a is" in read_figures(pruned).contradicted[0]
    assert read_figures(pruned).layers[0].result.dtype == "float32"
    # Without a scale these are not a quantised weight's numbers.
    save_file({**state, "a.weight": numbers}, pruned / "model.safetensors")
    assert "not float32" in verify_checkpoint(pruned).contradicted[0]


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


def by_scores(own: nn.Module) -> PruneReport:
    return bisparse.prune_(own, "2:4", scores=lambda name, weight: weight.square())


def by_fit(own: nn.Module) -> PruneReport:
    return bisparse.prune_(own, "2:4", "adaprune", [torch.randn(64, 32)])


def by_conversion(own: nn.Module) -> PruneReport:
    bisparse.prune_(own, "50%")
    return bisparse.convert_(own, "2:4", batches=[torch.randn(64, 32)])


def by_magnitude_and_fit(own: nn.Module) -> PruneReport:
    return bisparse.prune_(own, "2:4", batches=[torch.randn(64, 32)] * 2, reconstruction=NetworkReconstruction())


@pytest.mark.parametrize("prune", [bisparse.prune_, by_scores, by_fit, by_conversion, by_magnitude_and_fit])
def test_figures_are_saved_only_with_the_weights_that_they_are_about(tmp_path: Path, prune: Any) -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16))
    report = prune(own, *(["2:4"] if prune is bisparse.prune_ else []))
    for name, kept in (("same", own), ("wider", copy.deepcopy(own).double())):
        saved = save(kept, tmp_path / name, report=report).report
        assert [(one.retained, one.error) for one in saved] == [(one.retained, one.error) for one in report]
        assert None not in [one.retained for one in saved] and verify_checkpoint(tmp_path / name).contradicted == ()
    own[0].weight.data *= 2
    first, second = save(own, tmp_path / "changed", report=report).report
    assert (first.retained, first.gap, first.value, first.error, first.error_before) == (None,) * 5
    assert second == replace(report[1], density=second.density) and verify_checkpoint(tmp_path / "changed").contradicted == ()


def change_mask(folder: Path, name: str, change: Any) -> None:
    path = folder / "bisparse-masks.safetensors"
    with safe_open(path, framework="pt") as file:
        masks, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    masks[name] = change(masks[name])
    save_file({key: one for key, one in masks.items() if one is not None}, path, metadata)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (torch.zeros_like, "the mask of a in bisparse-masks.safetensors drops 254 weights that are not zero"),
        (lambda mask: mask ^ 255, "drops 254 weights that are not zero"),
        (lambda mask: mask[:5], "does not have the shape of its weight"),
        (lambda mask: None, "has no mask of a"),
        (lambda mask: mask.float(), "does not have the shape of its weight"),
    ],
)
def test_masks_that_are_not_those_of_the_weights_are_said(pruned: Path, how: Any, said: str) -> None:
    change_mask(pruned, "a.weight", how)
    checked = verify_checkpoint(pruned)
    assert checked and len(checked.contradicted) == 1 and said in checked.contradicted[0]
    with pytest.warns(UserWarning, match="bisparse-masks.safetensors"):
        load(model(), pruned)


def test_a_mask_that_keeps_nothing_is_not_handed_on(pruned: Path) -> None:
    change_mask(pruned, "a.weight", torch.zeros_like)
    with pytest.raises(CheckpointError, match=r"a\.weight.*keeps nothing"):
        load_masks(pruned)


def one_more(bits: torch.Tensor) -> torch.Tensor:
    """The packed bits of a mask whose first group keeps one more, or two, as flipped bits make it."""
    bits = bits.clone()
    bits[0] |= 0b1110_0000
    return bits


def test_a_mask_that_breaks_its_pattern_is_said_and_not_handed_on(pruned: Path) -> None:
    change_mask(pruned, "a.weight", one_more)
    with pytest.raises(CheckpointError, match=r"a\.weight: a mask that breaks its pattern: \d+ of \d+ groups"):
        load_masks(pruned)
    (said,) = verify_checkpoint(pruned).contradicted
    assert "the mask of a in bisparse-masks.safetensors breaks" in said


def test_a_layer_of_zeros_has_a_mask_that_keeps_nothing(tmp_path: Path) -> None:
    zeros = model()
    bisparse.prune_(zeros, "2:4")
    zeros["a"].weight.data.zero_()
    save(zeros, tmp_path / "out", "2:4")
    assert not load_masks(tmp_path / "out")["a.weight"].any() and verify_checkpoint(tmp_path / "out").contradicted == ()


def change_layout(folder: Path, **fields: Any) -> None:
    path = folder / "bisparse.json"
    content = json.loads(path.read_text())
    content["layers"][0]["layout"] |= fields
    path.write_text(json.dumps(content))


def test_a_layout_that_the_files_evidence_contradicts_is_said(tmp_path: Path) -> None:
    weight = torch.randn(16, 32)
    weight *= bisparse.solve(weight.abs().T, "2:4").mask.T  # groups along the outputs only
    write_folder(tmp_path / "model", {"a.weight": weight, "a.bias": torch.ones(16)})
    write_folder(tmp_path / "dense", {"a.weight": torch.randn(16, 32), "a.bias": torch.ones(16)})
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", "2:4")
    save_file({"a.weight": weight, "a.bias": torch.ones(16)}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert not verify_checkpoint(tmp_path / "out")
    change_layout(tmp_path / "out", kind="transposed")
    checked = verify_checkpoint(tmp_path / "out")
    assert any("it reads a as 'transposed'" in one for one in checked.contradicted)
    with_layout = verify_checkpoint(tmp_path / "out", layouts={"a": "transposed"})
    assert with_layout and not any("reads a as" in one for one in with_layout.contradicted)


@pytest.mark.parametrize(
    "fields",
    [
        {"parts": 0}, {"parts": -3}, {"groups": 0}, {"parts": 3}, {"kind": "packed", "parts": 7}, {"groups": 4},
        {"kind": "conv"}, {"kind": "experts"}, {"kind": "sideways"}, {"kind": "packed", "parts": 2**40},
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_that_cannot_be_is_an_error_of_the_sidecar(pruned: Path, fields: dict[str, Any]) -> None:
    change_layout(pruned, **fields)
    for call in (verify_checkpoint, read_sidecar, lambda path: load(model(), path), load_masks):
        with pytest.raises(CheckpointError, match=r"bisparse\.json"):
            call(pruned)


@pytest.mark.parametrize(("key", "value"), [("name", ""), ("name", "b"), ("note", "\ud800"), ("parameter", "b.weight")])
def test_a_sidecar_whose_layers_have_other_names_or_no_text_is_refused(pruned: Path, key: str, value: str) -> None:
    change(pruned, key, value)
    for call in (verify_checkpoint, read_sidecar, load_masks):
        with pytest.raises(CheckpointError, match=r"bisparse\.json"):
            call(pruned)
