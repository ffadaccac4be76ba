"""Quantised folders load in transformers with the outputs of the model in memory, and their zeros are verified on the files."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bisparse
from bisparse.checkpoint import CheckpointError, load_masks, to_dense, verify_checkpoint
from bisparse.export import QUANTIZATION, can_be_stored, save_quantized
from bisparse.quantization import quantize_
from bisparse.report import read_figures

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

SCHEMES = {"int8": "pack-quantized", "int4-g32": "pack-quantized", "fp8": "float-quantized"}


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    config = transformers.LlamaConfig(**shape, num_hidden_layers=2, tie_word_embeddings=True, dtype=dtype)
    made: nn.Module = transformers.LlamaForCausalLM(config).to(dtype).eval()
    return made


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) * 3
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def loaded(folder: Path) -> nn.Module:
    made: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_the_same_logits_and_the_file_keeps_the_mask(tmp_path: Path, scheme: str) -> None:
    model = llama()
    report = bisparse.prune_(model, "2:4")
    bisparse.save(model, tmp_path / "pruned", report=report)
    done = quantize_(model, scheme)
    save_quantized(model, tmp_path / "quantised", done, pruned=report)
    assert torch.equal(outputs(loaded(tmp_path / "quantised")), outputs(model))
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    assert config["quantization_config"]["format"] == SCHEMES[scheme]
    assert "sparsity_config" not in json.dumps(config)
    checked = verify_checkpoint(tmp_path / "quantised")
    assert checked and len(checked.layers) == len(report) == 14 and checked.contradicted == ()
    figures = read_figures(tmp_path / "quantised", tmp_path / "pruned")
    assert figures.holds and figures.contradicted == () and figures.change is None
    pruned, kept = load_masks(tmp_path / "pruned"), load_masks(tmp_path / "quantised")
    assert not any(bool((kept[name] & ~mask).any()) for name, mask in pruned.items())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_paired_4_of_8_in_fp4_is_written_as_nvfp4_with_its_zeros(tmp_path: Path, method: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from safetensors.torch import load_file

    model = llama(torch.bfloat16)
    report = bisparse.prune_(model, "4:8-paired")
    bisparse.save(model, tmp_path / "pruned", report=report)
    batches = [{"input_ids": torch.arange(24).view(2, 12) * 3}] if method == "gptq" else None
    done = quantize_(model, "fp4", data=batches, method=method)
    folder = tmp_path / "quantised"
    save_quantized(model, folder, done, pruned=report)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["format"] == "nvfp4-pack-quantized"
    state, masks = load_file(folder / "model.safetensors"), load_masks(tmp_path / "pruned")
    for layer in done:
        # The file by the format's description: two e2m1 to a byte, the first in the lower bits, float8 scales over a factor.
        packed = state[f"{layer.name}.weight_packed"].numpy()
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
        numbers = codes.view(ml_dtypes.float4_e2m1fn).astype("float32")
        scale = state[f"{layer.name}.weight_scale"].float() / state[f"{layer.name}.weight_global_scale"]
        whole = torch.from_numpy(numbers) * scale.repeat_interleave(16, 1)
        assert torch.equal(whole, model.state_dict()[layer.parameter].float())
        assert not bool((torch.from_numpy(numbers) != 0)[~masks[layer.parameter]].any())
    checked = verify_checkpoint(folder, "4:8-paired", include=[one.name for one in report])
    assert checked and len(checked.layers) == len(report) == 14
    model.save_pretrained(tmp_path / "plain")  # the quantised weights in bfloat16
    assert torch.equal(outputs(loaded(folder)), outputs(loaded(tmp_path / "plain")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_load_as_they_were_quantised(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama(dtype)
    done = quantize_(model, "int8")
    save_quantized(model, tmp_path / "quantised", done)
    again = loaded(tmp_path / "quantised")
    outputs(again)  # the package unpacks weights at the first pass
    weights = again.state_dict()
    for layer in done:
        assert torch.equal(weights[layer.parameter], model.state_dict()[layer.parameter]), layer.name


@pytest.mark.parametrize(("scheme", "form"), [("int8", "int-quantized"), ("fp8", "float-quantized")])
def test_dynamic_activations_are_stored_for_integer_products(tmp_path: Path, scheme: str, form: str) -> None:
    model = llama()
    report = bisparse.prune_(model, "2:4")
    save_quantized(model, tmp_path / "quantised", quantize_(model, scheme), pruned=report, activations="dynamic")
    said = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    assert said["format"] == form and said["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert verify_checkpoint(tmp_path / "quantised", "2:4")
    difference = (outputs(loaded(tmp_path / "quantised")) - outputs(model)).abs().max()
    assert 0 < difference < 0.1


def test_a_broken_zero_in_packed_numbers_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama()
    report = bisparse.prune_(model, "2:4")
    folder = tmp_path / "quantised"
    save_quantized(model, folder, quantize_(model, "int4-g32"), pruned=report)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_packed"
    row = state[name][5]
    state[name][5, 2] = (row[2] & ~0xFFFF) | 0x9999  # four non-zeros in a group
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = verify_checkpoint(folder)
    assert not found and "model.layers.1.mlp.up_proj" in found.message


def test_packed_numbers_are_not_written_as_weights(tmp_path: Path) -> None:
    model = llama()
    save_quantized(model, tmp_path / "quantised", quantize_(model, "int4-g32"))
    with pytest.raises(CheckpointError, match=r"packed numbers of a quantised weight \(and 13 others\)"):
        to_dense(tmp_path / "quantised", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    model = llama()
    done = quantize_(model, "int8")
    with pytest.raises(ValueError, match="expected 'none' or 'dynamic'"):
        save_quantized(model, tmp_path / "quantised", done, activations="static")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(ValueError, match="was changed after it was quantised"):
        save_quantized(changed, tmp_path / "quantised", done)
    with pytest.raises(ValueError, match="to bfloat16 only"):
        save_quantized(model, tmp_path / "quantised", quantize_(copy.deepcopy(model), "fp4"))
    convolution = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="only stores quantised Linear layers"):
        save_quantized(convolution, tmp_path / "quantised", quantize_(convolution, "int8", include="*"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match=QUANTIZATION):
        save_quantized(model, tmp_path / "quantised", done, overwrite=True)


def test_a_model_that_is_one_layer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"quantise torch\.nn\.Sequential\(model\)"):
        save_quantized(model, tmp_path / "quantised", quantize_(model, "int8"))
    assert not list(tmp_path.iterdir())
    whole = torch.nn.Sequential(model)
    save_quantized(whole, tmp_path / "quantised", quantize_(whole, "int8"))


def test_the_filter_names_what_can_be_stored() -> None:
    assert can_be_stored("a", nn.Linear(2, 2)) and not can_be_stored("a", nn.Conv2d(2, 2, 1))


def tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(95)} | {"[UNK]": 95}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def test_one_command_prunes_and_quantises(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bisparse.cli import app

    llama().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")  # type: ignore[attr-defined]
    command = ["prune", str(tmp_path / "dense"), str(tmp_path / "out"), "-p", "2:4", "--quantize", "int8"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert verify_checkpoint(tmp_path / "out-int8") and (tmp_path / "out-int8" / "tokenizer.json").exists()
    pruned, kept = load_masks(tmp_path / "out"), load_masks(tmp_path / "out-int8")
    assert not any(bool((kept[name] & ~mask).any()) for name, mask in pruned.items())
    again = CliRunner().invoke(app, ["quantize", str(tmp_path / "out-int8"), str(tmp_path / "twice")], catch_exceptions=False)
    assert again.exit_code == 1 and "already quantised" in again.output
    refused = CliRunner().invoke(app, [*command[:2], str(tmp_path / "new"), "--quantize", "int3"], catch_exceptions=False)
    assert refused.exit_code == 2 and not (tmp_path / "new").exists()
