"""Packed and masked checkpoints become plain ones that transformers loads, with equal logits and without a warning."""

import json
import logging
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
import torch
from checkpoint_files import State, snapshot, write_folder
from formats.test_folded import bitmask
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import bisparse
from bisparse.checkpoint import CheckpointError, prune_checkpoint, to_dense, verify_checkpoint
from bisparse.cli import app
from bisparse.export import QUANTIZATION, save_quantized
from bisparse.quantization import quantize_

SPARSITY = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4"}


def packed(state: State, kind: str = "sparse-24-bitmask") -> State:
    """Every projection of a model as compressed-tensors stores it."""
    result: State = {}
    for name, weight in state.items():
        if name.endswith("proj.weight"):
            result |= bitmask(name, weight, weight != 0, kind=kind)
        else:
            result[name] = weight
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
def test_transformers_loads_what_was_packed_with_equal_logits(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    warnings = BufferingHandler(capacity=1000)
    warnings.setLevel(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [warnings])  # its messages do not reach the root logger
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    bisparse.prune_(model, "2:4")
    model.save_pretrained(tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "model.safetensors")
    content = json.loads((tmp_path / "plain" / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "sparsity_config": SPARSITY,
    }  # fmt: skip
    source = tmp_path / "packed"
    source.mkdir()
    save_file(packed(state, kind), source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(content))
    (source / "generation_config.json").write_bytes((tmp_path / "plain" / "generation_config.json").read_bytes())
    read = to_dense(source, tmp_path / "out")
    assert any("14 weights are stored as bit masks" in note for note in read.notes)
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "out" / "model.safetensors").items())
    text = (tmp_path / "out" / "config.json").read_text()
    assert "quantization_config" not in text and "sparsity_config" not in text
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [record.getMessage() for record in warnings.buffer]
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert verify_checkpoint(tmp_path / "out", "2:4")


@pytest.mark.filterwarnings("ignore")
def test_a_dynamic_training_checkpoint_becomes_one_that_transformers_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    bisparse.sparsify_(model, "2:4")
    source = tmp_path / "checkpoint-20"
    source.mkdir()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    torch.save({"state": {}}, source / "optimizer.pt")
    to_dense(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json", "bisparse-plain.json"}
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1}, {"a": 1}),
        ({"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}}, {}),
        ({"compression_config": {"sparsity_config": SPARSITY, "format": "dense"}, "b": 2}, {"b": 2}),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": {}},
                    "sparsity_config": SPARSITY,
                }
            },
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {}}}},
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ),
    ],
)
def test_the_config_says_nothing_of_sparse_storage_and_keeps_what_is_quantised(
    tmp_path: Path, config: dict[str, object], expected: dict[str, object]
) -> None:
    weight = torch.randn(8, 8) * torch.tensor([1.0, 0, 1, 0]).repeat(2)
    source = write_folder(tmp_path / "model", bitmask("a.weight", weight, weight != 0, kind="sparse-bitmask"), {"x": 1, **config})
    to_dense(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"x": 1, **expected}


def test_a_target_that_exists_or_overlaps_is_refused_and_nothing_is_half_written(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    source = write_folder(tmp_path / "model", {"a.weight_orig": weight, "a.weight_mask": torch.ones(8, 8)})
    before = snapshot(tmp_path)
    for target in (source, source / "out", tmp_path):
        with pytest.raises(CheckpointError):
            to_dense(source, target)
    torch.save(torch.jit.script(nn.Linear(2, 2)).state_dict(), tmp_path / "x.pt")
    save_file({"a.weight_orig": weight, "a.weight_mask": torch.full((8, 8), 2.0)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a mask"):
        to_dense(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 2
    assert snapshot(tmp_path).keys() == before.keys() | {"x.pt"}


@pytest.mark.parametrize("first", ["plain", "pruned"])
@pytest.mark.parametrize("second", ["plain", "pruned"])
def test_what_one_command_wrote_another_replaces_with_overwrite_and_nothing_else_is(
    tmp_path: Path, first: str, second: str
) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(8, 8)})
    jobs = {"plain": to_dense, "pruned": lambda *paths, **options: prune_checkpoint(*paths, "2:4", **options)}
    jobs[first](source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        jobs[second](source, tmp_path / "out")
    jobs[second](source, tmp_path / "out", overwrite=True)
    marks = {name for name in ("bisparse.json", "bisparse-plain.json") if (tmp_path / "out" / name).exists()}
    assert marks == {"bisparse-plain.json" if second == "plain" else "bisparse.json"}
    for content in ("{}", "[", '{"written_by": "me"}'):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "bisparse-plain.json").write_text(content)
        with pytest.raises(CheckpointError, match="was not written by bisparse"):
            jobs[second](source, tmp_path / "mine", overwrite=True)


def test_a_single_files_name_is_kept_its_permissions_too_and_both_are_said(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(8, 8)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").chmod(0o600)
    for _ in range(2):
        command = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to-dense", "--overwrite"]
        shown = CliRunner().invoke(app, command, catch_exceptions=False)
        assert shown.exit_code == 0 and f"{tmp_path}/out/x.safetensors" in shown.stdout
    said = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert said["files"] == ["x.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "out").iterdir())
    mark = json.loads((tmp_path / "out" / "bisparse-plain.json").read_text())
    assert mark["source"] == "x.pt" and "torch" in mark["versions"]


PACKED: dict[str, State] = {
    "pack-quantized": {"a.weight_packed": torch.ones(8, 4, dtype=torch.int32), "a.weight_shape": torch.tensor([8, 32])},
    "nvfp4": {"a.weight_packed": torch.ones(8, 8, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 1)},
    "gptq": {"a.qweight": torch.ones(4, 8, dtype=torch.int32), "a.scales": torch.ones(1, 8)},
    "bitsandbytes": {"a.weight": torch.ones(128, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(4)},
    "bitsandbytes in bfloat16": {"a.weight": torch.ones(128, 1, dtype=torch.bfloat16), "a.weight.absmax": torch.ones(4)},
    "hqq": {"a.W_q": torch.ones(8, 4, dtype=torch.bfloat16), "a.scale": torch.ones(8, 1), "a.zero": torch.ones(8, 1)},
    "exl2": {"a.q_weight": torch.ones(4, 8, dtype=torch.int32), "a.q_scale": torch.ones(1, 8, dtype=torch.int32)},
    "aqlm": {"a.codes": torch.ones(4, 8, 1, dtype=torch.int16), "a.codebooks": torch.ones(1, 16, 1, 8)},
    "eight in an int32": {"a.weight": torch.ones(8, 4, dtype=torch.int32), "a.weight_scale": torch.ones(8, 1)},
    "one dimension": {"a.weight_packed": torch.ones(32, dtype=torch.int32), "a.weight_shape": torch.tensor([8, 32])},
    "fused experts": {"experts.up_proj": torch.ones(2, 8, 4, dtype=torch.uint8), "experts.up_proj_scale": torch.ones(2, 8, 1)},
    "mxfp4": {"experts.gate_blocks": torch.ones(2, 8, 4, 16, dtype=torch.uint8), "experts.gate_scales": torch.ones(2, 8, 4)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_numbers_of_quantised_weights_are_refused(tmp_path: Path, kind: str) -> None:
    source = write_folder(
        tmp_path / "model", {"b.weight": torch.randn(8, 8), **PACKED[kind]}, {"quantization_config": {"bits": 4}}
    )
    with pytest.raises(CheckpointError, match=r"packed numbers of a quantised weight, which are not unpacked; use"):
        to_dense(source, tmp_path / "out")
    ran = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--to-dense"])
    assert ran.exit_code == 1 and "packed numbers" in ran.output
    assert not (tmp_path / "out").exists()


def test_names_that_look_packed_are_no_evidence(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(8, 8), "a.num_blocks": torch.tensor(3), "b.qweight": torch.randn(8, 8),
        "b.first_blocks": torch.tensor([1, 2]), "c.weight_mask": torch.ones(8, 8, dtype=torch.uint8),
        "norm.weight": torch.ones(8, dtype=torch.uint8), "dec_blocks": torch.ones(4, 4, dtype=torch.int64),
        "table.weight": torch.ones(8, 8, dtype=torch.uint8), "other.weight": torch.ones(8, 8, dtype=torch.uint16),
    }  # fmt: skip
    to_dense(write_folder(tmp_path / "model", state, {}), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[name], value) for name, value in state.items())


def test_what_marks_a_quantised_folder_is_not_copied_and_numbers_that_are_copied_are_said(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = nn.Sequential(nn.Linear(32, 32))
    save_quantized(model, tmp_path / "int8", quantize_(model, "int8"), activations="dynamic")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    read = to_dense(tmp_path / "int8", tmp_path / "out")
    assert any("numbers of 1 quantised weights" in note for note in read.notes)
    assert (tmp_path / "int8" / QUANTIZATION).exists() and not (tmp_path / "out" / QUANTIZATION).exists()
    assert all(torch.equal(value, stored[name]) for name, value in load_file(tmp_path / "out" / "model.safetensors").items())
