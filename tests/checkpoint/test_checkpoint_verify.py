"""verify_checkpoint: the answer of `verify` on the whole tensor, for checkpoints of ours and of others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_folder
from safetensors.torch import load_file, save_file

import bisparse
from bisparse.checkpoint import CheckpointError, detect_patterns, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.layer_selection import StoredLayer
from bisparse.checkpoint.reader import open_source
from bisparse.checkpoint.verify import verify_stored
from bisparse.tiles import Layout, LayoutKind, from_matrices, to_matrices

LAYOUTS = {
    "linear": ((40, 72), Layout()),
    "transposed": ((40, 72), Layout(LayoutKind.TRANSPOSED)),
    "packed": ((72, 20), Layout(LayoutKind.PACKED, parts=3)),
    "experts": ((3, 24, 36), Layout(LayoutKind.EXPERTS)),
    "conv": ((24, 20, 3, 2), Layout(LayoutKind.CONV)),
    "grouped": ((24, 10, 3), Layout(LayoutKind.CONV, groups=2)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "3:8-seq", "40%", "6:10-T"])
@pytest.mark.parametrize("flips", [0, 1, 500])
def test_band_by_band_as_on_the_whole(
    tmp_path: Path, small_bands: Callable[[], None], kind: str, pattern: str, flips: int
) -> None:
    small_bands()
    shape, layout = LAYOUTS[kind]
    weight = torch.rand(shape) + 0.1
    weight = weight * bisparse.solve(weight, pattern, layout=layout).mask
    zeros = (weight.flatten() == 0).nonzero()[:, 0]
    weight.view(-1)[zeros[torch.randperm(len(zeros))[:flips]]] = 1.0
    source = write_folder(tmp_path / "model", {"a.weight": weight})
    stored = open_source(source).tensors["a.weight"]
    ours = verify_stored(StoredLayer("a", stored, layout, bisparse.Pattern.parse(pattern)))
    whole = bisparse.verify(weight, pattern, layout=layout, name="a")
    assert ours == whole
    assert bool(ours) == (flips == 0)


@pytest.mark.parametrize(("side", "row", "column"), [("W", 21, 13), ("W^T", 21, 13)])
def test_one_flipped_weight_is_named(tmp_path: Path, small_bands: Callable[[], None], side: str, row: int, column: int) -> None:
    small_bands()
    weight = torch.zeros(32, 24)
    if side == "W":
        weight[row, 8:12] = 1.0  # the row's group is full, its columns are not
    else:
        weight[16:20, column] = 1.0
    source = write_folder(tmp_path / "model", {"layers.3.up.weight": weight})
    assert verify_checkpoint(source, "4:8-T")
    weight[row, column] = 1.0
    save_file({"layers.3.up.weight": weight}, source / "model.safetensors")
    result = verify_checkpoint(source, "4:8-T")
    assert result.violations == 1
    first = result.first
    assert first is not None and first.layer == "layers.3.up" and first.side == side and first.kept == 5
    assert (first.row, first.group) == ((row, column // 8) if side == "W" else (column, row // 8))


def test_each_layer_is_held_to_its_own_pattern_in_the_sidecar(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(16, 16), "b.weight": torch.randn(16, 16), "lm_head.weight": torch.randn(16, 16)}
    source = write_folder(tmp_path / "model", state)
    prune_checkpoint(source, tmp_path / "out", "4:8-T", patterns={"b": "1:4"}, include=["a", "b"])
    result = verify_checkpoint(tmp_path / "out")
    assert result and {one.layer: str(one.pattern) for one in result.layers} == {"a": "4:8-T", "b": "1:4"}
    assert not verify_checkpoint(tmp_path / "out", "1:4"), "a pattern given is for all of them"
    assert verify_checkpoint(tmp_path / "out", "1:4", exclude="a")
    assert [str(one.pattern) for one in verify_checkpoint(tmp_path / "out", include="b").layers] == ["1:4"]


def test_a_mask_lost_after_pruning_is_found(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(16, 16), "b.weight": torch.randn(16, 16)})
    prune_checkpoint(source, tmp_path / "out", "4:8-T")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["b.weight"] += 1e-6  # as fine-tuning without the mask does
    save_file(state, tmp_path / "out" / "model.safetensors")
    result = verify_checkpoint(tmp_path / "out")
    assert not result and [bool(one) for one in result.layers] == [True, False]
    assert result.violations == 64 and "b: " in result.message


def test_checkpoints_of_others_need_a_pattern(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    source = write_folder(tmp_path / "model", {"a.weight": weight * bisparse.solve(weight.abs(), "2:4").mask})
    assert verify_checkpoint(source, "2:4") and verify_checkpoint(source / "model.safetensors", "2:4")
    with pytest.raises(ValueError, match="--pattern"):
        verify_checkpoint(source)


def test_a_sidecar_that_does_not_fit(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(16, 16)})
    prune_checkpoint(source, tmp_path / "out", "2:4")
    save_file({"b.weight": torch.randn(16, 16)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight.*not in the weights"):
        verify_checkpoint(tmp_path / "out")
    save_file({"a.weight": torch.randn(8, 16)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\(8, 16\)"):
        verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("layout", [Layout(), Layout(LayoutKind.TRANSPOSED)])
@pytest.mark.parametrize(
    ("pattern", "found"), [("2:4", ["2:4"]), ("4:8-T", ["4:8-T"]), ("2:4-T", ["2:4-T"]), ("100%", []), ("1:16-T", ["1:16-T"])]
)
def test_patterns_are_detected(tmp_path: Path, layout: Layout, pattern: str, found: list[str]) -> None:
    weight = torch.rand(128, 64) + 0.1
    weight = weight * bisparse.solve(weight, pattern, layout=layout).mask
    config: dict[str, object] = {"model_type": "gpt2" if layout.kind is LayoutKind.TRANSPOSED else "llama"}
    source = write_folder(tmp_path / "model", {"c_fc.weight": weight}, config)
    (detected,) = detect_patterns(source)
    assert [str(one) for one in detected.notable] == found
    assert detected.density == pytest.approx(float((weight != 0).double().mean()))
    for one in detected.patterns:  # each holds, and is the tightest of its M
        assert bisparse.verify(weight, one, layout=layout)
        if one.n > 1:
            tighter = bisparse.Pattern(one.n - 1, one.m, one.transposable)
            assert not bisparse.verify(weight, tighter, layout=layout)


def test_layouts_of_this_file_are_the_ones_meant() -> None:
    for shape, layout in LAYOUTS.values():
        weight = torch.randn(shape)
        assert torch.equal(from_matrices(to_matrices(weight, layout), layout, shape), weight)
