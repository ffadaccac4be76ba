"""verify_checkpoint: the answer of `verify` on the whole tensor, for checkpoints of ours and of others."""

import itertools
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_folder, write_shards
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
    weight = weight * bisparse.solve(weight, pattern, "greedy", layout=layout).mask
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
    ("pattern", "found"),
    [
        ("2:4", ["2:4"]), ("4:8-T", ["4:8-T"]), ("2:4-T", ["2:4-T"]), ("100%", []), ("1:16-T", ["1:16-T"]),
        *((one, [one]) for one in ("4:6", "4:6-T", "2:6", "3:6-T", "6:8-T", "2:3", "1:3-T", "5:10", "7:14-T", "3:5", "16:32")),
    ],
)  # fmt: skip
def test_patterns_are_detected(tmp_path: Path, layout: Layout, pattern: str, found: list[str]) -> None:
    weight = torch.rand(128, 64) + 0.1
    weight = weight * bisparse.solve(weight, pattern, "greedy", layout=layout).mask
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


READABLE = [
    torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", READABLE)
@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "50%"])
def test_zeros_are_read_in_every_dtype(tmp_path: Path, small_bands: Callable[[], None], dtype: torch.dtype, pattern: str) -> None:
    small_bands()
    dense = (torch.rand(32, 24) + 1).mul(torch.randint(0, 2, (32, 24)) * 2 - 1).mul(10)
    sparse = dense * bisparse.solve(dense.abs(), pattern).mask  # with zeros of both signs
    source = write_folder(tmp_path / "model", {"a.weight": sparse.to(dtype)})
    result = verify_checkpoint(source, pattern)
    whole = bisparse.verify(sparse != 0, pattern)
    assert result and not result.unchecked and [one.layer for one in result.layers] == ["a"]
    assert (result.groups, result.density) == (whole.groups, pytest.approx(whole.density))
    save_file({"a.weight": sparse.to(dtype), "o.weight": dense.to(dtype)}, source / "model.safetensors")
    result = verify_checkpoint(source, pattern)
    assert not result and [bool(one) for one in result.layers] == [True, False], "a dense layer is seen, whatever its dtype"


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A safetensors file of dtypes that torch may lack: name -> (dtype, shape, bytes)."""
    offsets = [0, *itertools.accumulate(size for *_, size in tensors.values())]
    entries = zip(tensors.items(), itertools.pairwise(offsets), strict=True)
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": list(at)} for (name, (dtype, shape, _)), at in entries}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offsets[-1]))
    return path


UNREADABLE: dict[str, dict[str, torch.Tensor]] = {
    "unsigned": {"q.weight": torch.zeros(16, 16, dtype=torch.uint8)},
    "packed into bytes of one column": {"q.weight": torch.zeros(128, 1, dtype=torch.uint8)},
    "with a zero point": {"q.weight": torch.zeros(16, 16, dtype=torch.int8), "q.weight_zero_point": torch.full((16, 1), 3)},
    "gptq": {"q.qweight": torch.zeros(2, 16, dtype=torch.int32), "q.scales": torch.ones(1, 16)},
    "compressed-tensors": {"q.weight_packed": torch.zeros(16, 2, dtype=torch.int32), "q.weight_scale": torch.ones(16, 1)},
    "sparse-24-bitmask": {"q.weight.compressed": torch.ones(128), "q.weight.bitmask": torch.zeros(16, 2, dtype=torch.uint8)},
    "parametrized": {"q.parametrizations.weight.original": torch.ones(16, 16)},
    "weight norm": {"q.weight_v": torch.zeros(16, 16), "q.weight_g": torch.ones(16, 1)},
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("alone", [True, False])
def test_a_layer_whose_zeros_cannot_be_seen_is_named_and_nothing_is_said_about_it(tmp_path: Path, kind: str, alone: bool) -> None:
    weight = torch.randn(16, 16)
    other = {} if alone else {"a.weight": weight * bisparse.solve(weight.abs(), "2:4").mask}
    source = write_folder(tmp_path / "model", {**UNREADABLE[kind], **other})
    result = verify_checkpoint(source, "2:4")
    assert [one.name for one in result.unchecked] == ["q"] and result.unchecked[0].reason
    assert [one.layer for one in result.layers] == ([] if alone else ["a"])
    assert bool(result) == (not alone)
    assert ("no layer was checked" if alone else "holds on 1 of 2 layers") in result.message
    assert "1 was not checked: q (" in result.message and (not alone or "holds" not in result.message)


def test_dtypes_that_torch_lacks_are_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "w.safetensors", {"q.weight": ("F4", [16, 16], 128), "a.weight": ("F32", [16, 16], 1024)})
    result = verify_checkpoint(path, "2:4")
    assert result and [(one.name, "F4" in one.reason) for one in result.unchecked] == [("q", True)]


def test_packed_experts_are_named_once(tmp_path: Path) -> None:
    state = {
        "layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 16, 4, 8, dtype=torch.uint8),
        "layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(2, 16, 4, dtype=torch.uint8),
        "layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(2, 16),
    }
    result = verify_checkpoint(write_folder(tmp_path / "model", state), "2:4")
    assert not result and [one.name for one in result.unchecked] == ["layers.0.mlp.experts.gate_up_proj"]


def test_a_zero_point_of_zero_changes_nothing(tmp_path: Path) -> None:
    state = {"q.weight": torch.zeros(16, 16, dtype=torch.int8), "q.weight_zero_point": torch.zeros(16, 1, dtype=torch.int8)}
    result = verify_checkpoint(write_folder(tmp_path / "model", state), "2:4")
    assert result and not result.unchecked


def test_what_is_no_layer_is_left_out_with_a_reason_in_any_dtype(tmp_path: Path) -> None:
    names = ("embed_tokens.weight", "lm_head.weight", "a.weight", "b.weight")
    state = {name: torch.zeros(16, 16, dtype=torch.int8) for name in names} | {"position_ids": torch.zeros(1, 9).long()}
    result = verify_checkpoint(write_folder(tmp_path / "model", state), "2:4", exclude="b")
    assert [one.layer for one in result.layers] == ["a"] and not result.unchecked
    reasons = {one.name: one.reason for one in result.left_out}
    assert "embedding" in reasons["embed_tokens"] and "head" in reasons["lm_head"] and "excluded" in reasons["b"]
    assert set(reasons) == {"embed_tokens", "lm_head", "b", "position_ids"}


def test_layers_that_the_sidecar_does_not_name_are_unchecked(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {f"{name}.weight": torch.randn(16, 16) for name in "ab"})
    prune_checkpoint(source, tmp_path / "out", "2:4", exclude="b")
    state = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**state, "c.weight": torch.randn(16, 16)}, tmp_path / "out" / "model.safetensors")
    for result in (verify_checkpoint(tmp_path / "out"), verify_checkpoint(tmp_path / "out", "2:4")):
        assert result and [one.layer for one in result.layers] == ["a"]
        reasons = {one.name: one.reason for one in result.unchecked}
        assert set(reasons) == {"b", "c"} and "excluded by the caller" in reasons["b"] and "bisparse.json" in reasons["c"]
    assert not verify_checkpoint(tmp_path / "out", exclude=["b", "c"]).unchecked
    state["a.weight"] = (state["a.weight"] * 9).to(torch.uint8)
    save_file(state, tmp_path / "out" / "model.safetensors")
    result = verify_checkpoint(tmp_path / "out")
    assert not result and [one.name for one in result.unchecked] == ["a", "b"], "what was pruned can be quantised afterwards"


@pytest.mark.parametrize(("key", "value"), [("parts", 0), ("parts", -4), ("groups", 0), ("groups", True), ("parts", 2.0)])
def test_a_sidecar_whose_layout_covers_nothing_is_refused(tmp_path: Path, key: str, value: object) -> None:
    prune_checkpoint(write_folder(tmp_path / "model", {"a.weight": torch.randn(16, 16)}), tmp_path / "out", "2:4")
    sidecar = json.loads((tmp_path / "out" / "bisparse.json").read_text())
    sidecar["layers"][0]["layout"] |= {"kind": "packed" if key == "parts" else "conv", key: value}
    (tmp_path / "out" / "bisparse.json").write_text(json.dumps(sidecar))
    with pytest.raises(CheckpointError, match="is not valid"):
        verify_checkpoint(tmp_path / "out")


def test_a_layout_that_does_not_cover_the_weight_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.zeros(16, 16)})
    stored = open_source(source).tensors["a.weight"]
    with pytest.raises(CheckpointError, match="240 of 256"):
        verify_stored(StoredLayer("a", stored, Layout(LayoutKind.PACKED, parts=3), bisparse.Pattern(2, 4)))


def test_a_single_file_is_not_judged_by_its_neighbours(tmp_path: Path) -> None:
    states = [{"a.weight": torch.randn(16, 16)}, {"b.weight": torch.randn(16, 16), "c.weight": torch.randn(16, 16)}]
    prune_checkpoint(write_shards(tmp_path / "model", states), tmp_path / "out", "4:8-T", patterns={"b": "1:4"})
    first, second = sorted(path for path in (tmp_path / "out").glob("model-*.safetensors"))
    for given in (None, "4:8-T"):
        result = verify_checkpoint(first, given)
        assert result and [one.layer for one in result.layers] == ["a"] and not result.unchecked
    assert [str(one.pattern) for one in verify_checkpoint(second).layers] == ["1:4", "4:8-T"]
    assert next(iter(detect_patterns(first))).layer == "a"
    model = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(16, 16, bias=False)))
    bisparse.load(model, first)
    # A file that the sidecar does not tell of, of one known name but another shape.
    save_file({"a.weight": torch.zeros(8, 8), "z.weight": torch.zeros(8, 8)}, tmp_path / "out" / "other.safetensors")
    assert [one.layer for one in verify_checkpoint(tmp_path / "out" / "other.safetensors", "2:4").layers] == ["a", "z"]
    with pytest.raises(ValueError, match="--pattern"):
        verify_checkpoint(tmp_path / "out" / "other.safetensors")
    (tmp_path / "out" / "bisparse.json").write_text("[]")
    assert verify_checkpoint(first, "4:8-T"), "a damaged neighbour matters only where it is needed"
    with pytest.raises(CheckpointError, match=r"bisparse\.json"):
        verify_checkpoint(first)
    with pytest.raises(CheckpointError, match=r"bisparse\.json"):
        verify_checkpoint(tmp_path / "out", "4:8-T")


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [((16, 16), "16:64-T"), ((16, 16), "16:64"), ((99, 2), "2:4"), ((4, 4), "4:8-T"), ((2, 2), "2:4-T"), ((8, 2), "2:8-paired")],
)
def test_a_pattern_that_allows_every_weight_of_a_small_layer_is_not_said_to_hold(
    tmp_path: Path, shape: tuple[int, int], pattern: str
) -> None:
    assert bisparse.verify(torch.ones(shape), pattern), "as padded, nothing breaks it"
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(shape)})
    result = verify_checkpoint(source, pattern)
    assert not result and result.violations == 0 and "holds" not in result.message
    assert [one.name for one in result.unchecked] == ["a"] and "side shorter than M" in result.unchecked[0].reason


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "3:8", "4:8-T", "16:32-T", "6:8-seq", "4:8-paired", "50%"])
def test_a_dense_layer_never_holds_a_pattern(tmp_path: Path, pattern: str) -> None:
    shapes = [(rows, columns) for rows in (1, 2, 3, 5, 8, 17, 40) for columns in (1, 2, 3, 5, 8, 17, 40)]
    state = {f"l{rows}x{columns}.weight": torch.ones(rows, columns) for rows, columns in shapes}
    result = verify_checkpoint(write_folder(tmp_path / "model", state), pattern)
    assert len(result.layers) + len(result.unchecked) == len(shapes) and not any(result.layers)
    for one in detect_patterns(tmp_path / "model"):
        assert not one.patterns


def test_detection_judges_no_side_that_is_shorter_than_m(tmp_path: Path) -> None:
    weight = torch.rand(40, 16) + 0.1
    weight = weight * bisparse.solve(weight, "2:4-T").mask
    (found,) = detect_patterns(write_folder(tmp_path / "model", {"a.weight": weight}))
    assert [str(one) for one in found.notable] == ["2:4-T"]
    assert {"2:4-T", "4:8-T", "8:16-T"} <= {str(one) for one in found.patterns}
    assert found.too_large == (32, 64)
    (found,) = detect_patterns(write_folder(tmp_path / "turned", {"a.weight": weight.t().contiguous()}))
    assert {one.m for one in found.patterns if not one.transposable} <= {*range(2, 17), 32}
    assert {4, 8, 16} <= {one.m for one in found.patterns if one.transposable} <= {*range(2, 17)}
    assert found.too_large == (32, 64)


@pytest.mark.parametrize("kind", ["linear", "transposed", "experts", "experts-transposed", "conv"])
def test_groups_that_span_two_bands_are_counted_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bisparse.checkpoint.bands.BAND_WEIGHTS", 500)
    shape = {"experts": (3, 40, 66), "experts-transposed": (3, 66, 40), "conv": (40, 66, 1, 1)}.get(kind, (40, 66))
    layout = bisparse.layers.parse_layout(kind, shape, "a")
    torch.manual_seed(0)
    weight = torch.rand(shape) * (torch.rand(shape) < 0.2)
    (found,) = detect_patterns(write_folder(tmp_path / "model", {"a.weight": weight}), layouts={"a": kind})
    for m in (2, 3, 5, 6, 7, 8, 12, 13, 16):
        for transposable in (False, True):
            n = next(n for n in range(1, m + 1) if bisparse.verify(weight, f"{n}:{m}{'-T' * transposable}", layout=layout))
            own = [one.n for one in found.patterns if (one.m, one.transposable) == (m, transposable)]
            plain = [one.n for one in found.patterns if one.m == m]
            # A plain pattern that the transposable one equals is not listed as well.
            assert own == [n] or n == m or (not transposable and plain == [n])


def test_layouts_of_this_file_are_the_ones_meant() -> None:
    for shape, layout in LAYOUTS.values():
        weight = torch.randn(shape)
        assert torch.equal(from_matrices(to_matrices(weight, layout), layout, shape), weight)


@pytest.mark.parametrize(("layout", "shape"), [("experts-transposed", (2, 3, 8)), ("conv-transposed", (3, 8, 1, 1))])
def test_a_short_reduction_counts_as_unchecked_in_every_layout(tmp_path: Path, layout: str, shape: tuple[int, ...]) -> None:
    source = write_folder(tmp_path / "model", {"short.weight": torch.ones(shape), "a.weight": torch.zeros(8, 8)})
    result = verify_checkpoint(source, "3:4", layouts={"short": layout})
    assert [one.name for one in result.unchecked] == ["short"] and "a 8 x 3 matrix" in result.unchecked[0].reason


def test_a_layout_of_tiny_parts_does_not_make_w_transposed_hold(tmp_path: Path) -> None:
    weight = torch.rand(32, 32) + 1
    source = write_folder(tmp_path / "model", {"l.weight": weight * bisparse.solve(weight, "2:4").mask})
    assert not verify_checkpoint(source, "2:4-T")
    for parts in (32, 16):
        result = verify_checkpoint(source, "2:4-T", layouts={"l": f"parts:{parts}"})
        assert not result and [one.name for one in result.unchecked] == ["l"]
    assert verify_checkpoint(source, "2:4", layouts={"l": "parts:32"})
