"""prune_checkpoint against `solve` on the whole tensor, read and written by other libraries."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import State, snapshot, write_folder, write_shards
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import bisparse
from bisparse.checkpoint import MASKS, SIDECAR, load_masks, plan_checkpoint, prune_checkpoint, read_sidecar
from bisparse.tiles import Layout, LayoutKind

PATTERNS = ["2:4", "1:4-T", "4:8-T", "3:8-seq", "4:8-paired", "37%", "5:10-T", "16:32-T"]
ON_EVERY_LAYOUT = ["2:4", "4:8-T", "37%", "5:10-T"]
LAYOUTS = {
    "linear": ((40, 72), Layout()),
    "transposed": ((40, 72), Layout(LayoutKind.TRANSPOSED)),
    "packed": ((72, 20), Layout(LayoutKind.PACKED, parts=3)),
    "experts": ((3, 24, 36), Layout(LayoutKind.EXPERTS)),
    "conv": ((24, 20, 3, 2), Layout(LayoutKind.CONV)),
    "grouped": ((24, 10, 3), Layout(LayoutKind.CONV, groups=2)),
    "conv3d": ((16, 8, 2, 2, 2), Layout(LayoutKind.CONV)),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def unpack(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """A mask as the documentation says it is stored."""
    bits = np.unpackbits(load_file(path)[name].numpy(), bitorder="big")
    count = int(np.prod(shape))
    assert not bits[count:].any()
    return torch.from_numpy(bits[:count].reshape(shape)).bool()


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("linear", pattern) for pattern in PATTERNS]
    + [(kind, pattern) for kind in LAYOUTS if kind != "linear" for pattern in ON_EVERY_LAYOUT],
)
def test_bands_find_what_solve_finds_on_the_whole(
    tmp_path: Path, small_bands: Callable[[], None], kind: str, pattern: str
) -> None:
    small_bands()
    shape, layout = LAYOUTS[kind]
    weight = torch.randn(shape)
    source = write_folder(tmp_path / "model", {"body.weight": weight})
    report = prune_checkpoint(source, tmp_path / "out", pattern, include="body", layouts={"body": layout})
    whole = bisparse.solve(weight.abs(), pattern, layout=layout)
    written = load_file(tmp_path / "out" / "model.safetensors")["body.weight"]
    assert torch.equal(written, weight * whole.mask)
    assert torch.equal(unpack(tmp_path / "out" / MASKS, "body.weight", shape), whole.mask)
    assert torch.equal(load_masks(tmp_path / "out")["body.weight"], whole.mask)
    (result,) = report
    assert result.value == pytest.approx(whole.value, rel=1e-12)
    assert result.retained == pytest.approx(whole.retained, rel=1e-12)
    assert result.density == pytest.approx(float(whole.mask.double().mean()))
    assert result.gap == pytest.approx(whole.relative_gap, abs=1e-9)
    assert result.layout == layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["4:8-T", "2:4", "30%"])
def test_dtypes_survive_to_the_bit(tmp_path: Path, dtype: torch.dtype, pattern: str) -> None:
    weight = torch.randn(48, 64).to(dtype)
    weight[0, :3] = torch.tensor([0.0, -0.0, 1e-30]).to(dtype)
    source = write_folder(tmp_path / "model", {"a.weight": weight})
    prune_checkpoint(source, tmp_path / "out", pattern)
    written = load_file(tmp_path / "out" / "model.safetensors")["a.weight"]
    mask = load_masks(tmp_path / "out")["a.weight"]
    assert written.dtype == dtype
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(written.view(integers)[mask], weight.view(integers)[mask])
    assert not written[~mask].any()


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_the_density_is_that_of_the_weights_where_a_mask_keeps_zeros(tmp_path: Path, pattern: str) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(32, 32) * (torch.rand(32, 32) < 0.1)})
    report = prune_checkpoint(source, tmp_path / "out", pattern)
    found = float((load_file(tmp_path / "out" / "model.safetensors")["a.weight"] != 0).double().mean())
    assert report.density == found < 0.2
    assert read_sidecar(tmp_path / "out").report.density == bisparse.verify_checkpoint(tmp_path / "out").density == found


@pytest.mark.parametrize("numbers", ["ties", "zeros", "few", "subnormal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("density", ["50%", "1%", "0.001%", "100%"])
def test_unstructured_thresholds_on_hard_numbers(
    tmp_path: Path, small_bands: Callable[[], None], numbers: str, dtype: torch.dtype, density: str
) -> None:
    small_bands()
    weight = {
        "ties": torch.randint(-2, 3, (24, 30)).double(),
        "zeros": torch.zeros(24, 30, dtype=torch.float64),
        "few": torch.where(torch.rand(24, 30) > 0.99, torch.randn(24, 30), 0).double(),
        "subnormal": torch.randn(24, 30, dtype=torch.float64) * torch.finfo(dtype).tiny,
    }[numbers].to(dtype)
    source = write_folder(tmp_path / "model", {"a.weight": weight})
    report = prune_checkpoint(source, tmp_path / "out", density)
    assert torch.equal(load_masks(tmp_path / "out")["a.weight"], bisparse.solve(weight.abs(), density).mask)
    assert report.layers[0].gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("density", ["50%", "0.0001%", "100%"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unstructured_masks_of_large_weights_are_those_of_the_whole(tmp_path: Path, dtype: torch.dtype, density: str) -> None:
    weight = (torch.randn(1100, 1024) * 0.02).to(dtype)  # two bands, and many equal numbers in 16 bits
    source = write_folder(tmp_path / "model", {"a.weight": weight})
    (result,) = prune_checkpoint(source, tmp_path / "out", density)
    solution = bisparse.solve(weight.float().abs(), density)
    assert torch.equal(load_masks(tmp_path / "out")["a.weight"], solution.mask)
    assert result.gap == pytest.approx(0, abs=1e-12)
    assert result.value == pytest.approx(solution.value, rel=1e-12)


def test_everything_else_is_carried_over(folder: Path, state: State, tmp_path: Path) -> None:
    before = snapshot(folder)
    report = prune_checkpoint(folder, tmp_path / "out", "2:4")
    assert snapshot(folder) == before, "the source is only read"
    written = load_file(tmp_path / "out" / "model.safetensors")
    pruned = {"layers.0.up.weight", "layers.0.down.weight"}
    assert {result.parameter for result in report} == pruned
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype
        if name not in pruned:
            assert torch.equal(written[name], tensor), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    for name in ("config.json", "tokenizer.json", "sub/pooling.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}, "no temporary folder is left"


def test_every_matrix_left_dense_has_its_reason(folder: Path, tmp_path: Path) -> None:
    report = prune_checkpoint(folder, tmp_path / "out", "2:4")
    reasons = {left.name: left.reason for left in report.left_dense}
    assert set(reasons) == {"embed_tokens", "lm_head", "position_ids"}
    assert "looked up" in reasons["embed_tokens"] and "head" in reasons["lm_head"] and "I64" in reasons["position_ids"]
    assert any("2 vectors" in note for note in report.notes)


def test_packed_numbers_in_a_floating_dtype_are_left_as_they_are(tmp_path: Path) -> None:
    """bitsandbytes stores 4-bit weights in bfloat16 where FSDP asks for it."""
    state = {
        "a.weight": torch.randn(32, 16), "q.weight": torch.randn(512, 1).bfloat16(), "p.weight": torch.randn(64, 64).bfloat16(),
        "q.weight.absmax": torch.ones(16), "p.weight.quant_map": torch.ones(16),
        "p.weight.quant_state.bitsandbytes__nf4": torch.zeros(60, dtype=torch.uint8),
    }  # fmt: skip
    source = write_folder(tmp_path / "model", state)
    report = prune_checkpoint(source, tmp_path / "out", "2:4-T")
    assert [layer.name for layer in report] == ["a"]
    reasons = {one.name: one.reason for one in report.left_dense}
    assert all("packed numbers of bitsandbytes" in reasons[name] for name in ("p", "q"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items() if name != "a.weight")
    unchecked = {one.name: one.reason for one in bisparse.checkpoint.verify_checkpoint(source, "2:4-T").unchecked}
    assert all("packed numbers of bitsandbytes" in unchecked[name] for name in ("p", "q"))


def test_the_sidecar_says_what_the_report_says(folder: Path, tmp_path: Path) -> None:
    report = prune_checkpoint(folder, tmp_path / "out", "4:8-T", patterns={"*.down": "2:4"}, remainder="pad")
    content = json.loads((tmp_path / "out" / SIDECAR).read_text())
    assert content["schema_version"] == 1
    assert content["pattern"] == "4:8-T" and content["patterns"] == {"*.down": "2:4"} and content["method"] == "magnitude"
    assert {layer["name"]: layer["pattern"] for layer in content["layers"]} == {"layers.0.up": "4:8-T", "layers.0.down": "2:4"}
    assert content["versions"]["torch"] == torch.__version__
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and sidecar.report == report
    assert sidecar.source == "model"
    assert read_sidecar(folder) is None


def test_sample_tiles_are_cut_from_the_weights(folder: Path, state: State, tmp_path: Path) -> None:
    prune_checkpoint(folder, tmp_path / "out", "4:8-T")
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and {sample.layer for sample in sidecar.samples} == {"layers.0.up", "layers.0.down"}
    for sample in sidecar.samples:
        weight = state[f"{sample.layer}.weight"].double()
        mask = load_masks(tmp_path / "out")[f"{sample.layer}.weight"]
        square = slice(sample.row, sample.row + 16), slice(sample.column, sample.column + 16)
        np.testing.assert_allclose(np.array(sample.weights), weight[square].numpy(), rtol=1e-3)
        assert np.array_equal(np.array(sample.kept), mask[square].int().numpy())
        assert sample.row % 8 == 0 and sample.column % 8 == 0, "it shows whole tiles"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_stay_shards(tmp_path: Path, kind: str) -> None:
    states: list[State] = [{"a.weight": torch.randn(16, 24), "z.bias": torch.randn(3)}, {"b.weight": torch.randn(24, 16).half()}]
    source = write_shards(tmp_path / "model", states, kind=kind)
    report = prune_checkpoint(source, tmp_path / "out", "4:8-T")
    assert {result.name for result in report} == {"a", "b"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    original = json.loads(next(source.glob("*.index.json")).read_text())
    assert index["metadata"] == original["metadata"] and index["weight_map"].keys() == original["weight_map"].keys()
    for number, state in enumerate(states, start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        written = load_file(tmp_path / "out" / name)
        assert written.keys() == state.keys()
        assert {index["weight_map"][tensor] for tensor in state} == {name}
    assert not list((tmp_path / "out").glob("*.bin*")), "no dense copy is carried over"
    assert bisparse.verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_torch_state_dicts(tmp_path: Path, state: State, suffix: str, legacy: bool) -> None:
    base = torch.randn(40, 16)
    state["layers.0.up.weight"] = base.t().contiguous().t()  # a transposed view: no row of it is contiguous in the file
    state["tied.weight"] = state["lm_head.weight"]  # two names, one storage
    state["part.weight"] = torch.randn(64, 16)[8:24]  # a window into a larger storage
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    report = prune_checkpoint(path, tmp_path / "out", "2:4-T")
    written = load_file(tmp_path / "out" / "weights.safetensors")
    assert written.keys() == state.keys()
    assert {result.name for result in report} == {"layers.0.up", "layers.0.down", "part"}
    reasons = {one.name: one.reason for one in report.left_dense}
    assert "shares its storage with lm_head.weight, which stays dense" in reasons["tied"]
    assert torch.equal(written["tied.weight"], written["lm_head.weight"])
    for result in report:
        best = bisparse.solve(state[result.parameter].float().abs(), "2:4-T")
        assert torch.equal(written[result.parameter], state[result.parameter] * best.mask)
    assert torch.equal(written["embed_tokens.weight"], state["embed_tokens.weight"])


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_weights_in_a_training_checkpoint(tmp_path: Path, key: str) -> None:
    weight = torch.randn(16, 16)
    torch.save({key: {"a.weight": weight, "steps": 7}, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "last.pt")
    report = prune_checkpoint(tmp_path / "last.pt", tmp_path / "out", "2:4")
    assert load_file(tmp_path / "out" / "last.safetensors").keys() == {"a.weight"}
    notes = " ".join(report.notes)
    assert "optimizer" in notes and "steps" in notes, "what is lost is said"


def test_a_single_safetensors_file(folder: Path, tmp_path: Path) -> None:
    prune_checkpoint(folder / "model.safetensors", tmp_path / "out", "2:4")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", SIDECAR, MASKS, "README.md"}


def test_a_pruned_folder_can_be_pruned_again(folder: Path, tmp_path: Path) -> None:
    prune_checkpoint(folder, tmp_path / "first", "4:8-T")
    prune_checkpoint(tmp_path / "first", tmp_path / "second", "2:4-T")
    assert bisparse.verify_checkpoint(tmp_path / "second", "2:4-T") and bisparse.verify_checkpoint(tmp_path / "second", "4:8-T")
    sidecar = read_sidecar(tmp_path / "second")
    assert sidecar is not None and sidecar.report.pattern == "2:4-T"


def test_dense_copies_in_other_formats_are_not_carried_over(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.onnx", "tf_model.h5", "flax_model.msgpack"):
        (folder / name).write_bytes(b"weights")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"a part of the model")
    (folder / "modules.json").write_text('[{"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]')
    report = prune_checkpoint(folder, tmp_path / "out", "2:4")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"pytorch_model.bin", "model.onnx", "tf_model.h5", "flax_model.msgpack"}
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()
    assert any("tf_model.h5" in note and "not copied" in note for note in report.notes)


def test_no_sparsity_config_is_ever_written(tmp_path: Path) -> None:
    config: dict[str, object] = {"a": 1, "quantization_config": {"sparsity_config": {"format": "dense"}, "b": 2}}
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(8, 8)}, config)
    report = prune_checkpoint(source, tmp_path / "out", "2:4")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1, "quantization_config": {"b": 2}}
    assert any("sparsity_config" in note for note in report.notes)
    assert not any(b"sparsity_config" in content for name, content in snapshot(tmp_path / "out").items() if name == "config.json")


def test_a_dry_run_reads_headers_only_and_tells_the_plan(folder: Path, tmp_path: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:  # NaN in every weight: nobody may look
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header)
        size = (folder / "model.safetensors").stat().st_size - 8 - header
        file.write(b"\xff" * size)
    plan = plan_checkpoint(folder, "4:8-T", remainder="dense")
    assert {layer.name for layer in plan.layers} == {"layers.0.up", "layers.0.down"}
    assert plan.output_bytes >= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - 1000


def test_the_same_masks_as_the_model_in_memory_gets(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32, 24)
    )
    source = write_folder(tmp_path / "model", model.state_dict())
    in_file, in_memory = prune_checkpoint(source, tmp_path / "out", "4:8-T"), bisparse.prune_(model, "4:8-T")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())
    assert [(a.name, a.value) for a in in_file] == [(b.name, pytest.approx(b.value)) for b in in_memory]
    assert {left.name for left in in_file.left_dense} == {left.name for left in in_memory.left_dense} == {"0"}


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_a_folder_of_links_such_as_a_download_cache(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / "cache" / name).symlink_to(folder / name)
    (tmp_path / "cache" / "sub").symlink_to(folder / "sub")
    report = prune_checkpoint(tmp_path / "cache", tmp_path / "out", "2:4")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir()), "the output stands on its own"
    assert any("links to folders" in note and "sub" in note for note in report.notes)
