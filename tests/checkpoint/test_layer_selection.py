"""Which tensors of a checkpoint are pruned, by names alone: the same as the model's own layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import State, write_folder

from bisparse.checkpoint import plan_checkpoint
from bisparse.layers import find_layers
from bisparse.tiles import Layout, LayoutKind

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
TINY_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 32}
TINY_SEQ2SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "bert": TINY,
    "electra": {**TINY, "embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 64},
    "llama": {**TINY, "num_key_value_heads": 2},
    "gpt2": TINY_GPT,
    "openai-gpt": TINY_GPT,
    "gpt_neox": TINY,
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64, "d_kv": 8},
    "bart": TINY_SEQ2SEQ,
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "convnext": {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
}  # fmt: skip


@pytest.mark.transformers
@pytest.mark.parametrize("name", MODELS)
def test_the_same_layers_as_in_the_model_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **MODELS[name]))
    model.save_pretrained(tmp_path / "model")
    plan = plan_checkpoint(tmp_path / "model", "2:4-T")
    by_name = {layer.tensor.name: layer.layout for layer in plan.layers}
    in_model = {layer.parameter_name: layer.layout for layer in find_layers(model)[0]}
    assert by_name == in_model
    assert by_name, "a model with nothing to prune would prove nothing"


@pytest.mark.transformers
def test_causal_language_models_keep_their_head_dense(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", **MODELS["llama"], tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    plan = plan_checkpoint(tmp_path / "model", "2:4-T")
    assert "lm_head" in {left.name for left in plan.left_dense}
    assert "embed_tokens" in {left.name.rsplit(".", 1)[-1] for left in plan.left_dense}


def planned(
    tmp_path: Path, state: State, config: dict[str, object] | None = None, **options: Any
) -> tuple[dict[str, Layout], dict[str, str]]:
    """Layouts of the layers that would be pruned, and the reasons of those left dense."""
    source = write_folder(tmp_path / "model", state, config or {"x": 1})
    plan = plan_checkpoint(source, options.pop("pattern", "2:4-T"), **options)
    return {one.name: one.layout for one in plan.layers}, {one.name: one.reason for one in plan.left_dense}


def test_names_decide(tmp_path: Path) -> None:
    dense = {
        "wte.weight": "looked up", "encoder.embed_positions.weight": "looked up", "shared.weight": "looked up",
        "x.relative_attention_bias.weight": "looked up", "lm_head.weight": "head", "model.fc.weight": "head",
        "classifier.weight": "head", "cls.predictions.decoder.weight": "head", "moe.gate.weight": "router",
        "text_projection": "not named",
    }  # fmt: skip
    pruned = [
        "moe.experts.0.w1.weight",
        "a.fc1.weight",
        "a.gate.weight",
        "pooler.dense.weight",
        "embedding_hidden_mapping_in.weight",
    ]
    layers, reasons = planned(tmp_path, {name: torch.randn(8, 8) for name in [*dense, *pruned]})
    assert set(layers) == {name.removesuffix(".weight") for name in pruned}
    for name, word in dense.items():
        assert word in reasons[name.removesuffix(".weight")]


def test_shapes_decide(tmp_path: Path) -> None:
    state = {
        "stem.weight": torch.randn(8, 3, 3, 3),
        "depthwise.weight": torch.randn(8, 1, 3, 3),
        "conv.weight": torch.randn(8, 8, 3, 3),
        "up.deconv.weight": torch.randn(8, 8, 3, 3),
        "mlp.experts.up_proj": torch.randn(2, 8, 8),
        "attention.in_proj_weight": torch.randn(24, 8),
        "cls_token": torch.randn(1, 1, 8),
        "packed.weight": torch.zeros(8, 8, dtype=torch.uint8),
        "empty.weight": torch.zeros(0, 8),
    }
    layers, reasons = planned(tmp_path, state)
    assert layers == {
        "conv": Layout(LayoutKind.CONV),
        "mlp.experts.up_proj": Layout(LayoutKind.EXPERTS),
        "attention.in_proj_weight": Layout(LayoutKind.PACKED, parts=3),
    }
    words = {
        "stem": "first",
        "depthwise": "depthwise",
        "up.deconv": "transposed",
        "packed": "U8",
        "empty": "empty",
        "cls_token": "not named",
    }
    for name, word in words.items():
        assert word in reasons[name]


@pytest.mark.parametrize(
    ("config", "transposed"),
    [
        ({"model_type": "gpt2"}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"model_type": "llama"}, False),
        ({"architectures": ["NanoGPT"]}, False),
    ],
)
def test_gpt2_stores_inputs_first_by_architecture(tmp_path: Path, config: dict[str, object], transposed: bool) -> None:
    layers, _ = planned(
        tmp_path, {"h.0.attn.c_attn.weight": torch.randn(16, 48), "h.0.attn.c_proj.weight": torch.randn(16, 16)}, config
    )
    expected = Layout(LayoutKind.TRANSPOSED) if transposed else Layout()
    assert layers == {"h.0.attn.c_attn": expected, "h.0.attn.c_proj": expected}


@pytest.mark.parametrize("transposed", [True, False])
def test_without_a_config_the_biases_tell_gpt2_from_its_imitations(tmp_path: Path, transposed: bool) -> None:
    state = {
        "c_attn.weight": torch.randn(16, 48) if transposed else torch.randn(48, 16),
        "c_attn.bias": torch.randn(48),
        "c_proj.weight": torch.randn(16, 16),
        "c_proj.bias": torch.randn(16),
    }
    torch.save(state, tmp_path / "gpt.pt")
    plan = plan_checkpoint(tmp_path / "gpt.pt", "2:4")
    assert {layer.layout for layer in plan.layers} == {Layout(LayoutKind.TRANSPOSED) if transposed else Layout()}


@pytest.mark.parametrize(("pattern", "pruned"), [("4:8-T", True), ("2:4", False)])
def test_experts_stored_inputs_first_take_transposable_patterns_only(tmp_path: Path, pattern: str, pruned: bool) -> None:
    state = {"mlp.experts.down_proj": torch.randn(2, 8, 16), "a.weight": torch.randn(8, 8)}
    layers, reasons = planned(tmp_path, state, {"text_config": {"model_type": "llama4_text"}}, pattern=pattern)
    assert ("mlp.experts.down_proj" in layers) is pruned
    assert pruned or "only transposable" in reasons["mlp.experts.down_proj"]


def test_include_overrules_names_and_exclude_wins(tmp_path: Path) -> None:
    state = {name: torch.randn(8, 8) for name in ("lm_head.weight", "a.weight", "b.weight", "text_projection")}
    layers, reasons = planned(tmp_path, state, include=["lm_head", "b*", "text_projection"], exclude="re:b")
    assert set(layers) == {"lm_head", "text_projection"}
    assert reasons == {"a": "not among the layers asked for", "b": "excluded by the caller"}


def test_parameter_names_match_too(tmp_path: Path) -> None:
    state = {name: torch.randn(8, 8) for name in ("a.weight", "b.weight")}
    assert set(planned(tmp_path, state, include="a.weight")[0]) == {"a"}


@pytest.mark.parametrize("option", ["include", "patterns", "layouts"])
def test_a_filter_that_matches_nothing_is_an_error(tmp_path: Path, option: str) -> None:
    value: Any = "nothing" if option == "include" else {"nothing": "2:4" if option == "patterns" else Layout()}
    with pytest.raises(ValueError, match=r"nothing.*\['a'\]"):
        planned(tmp_path, {"a.weight": torch.randn(8, 8)}, **{option: value})


def test_remainders(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(8, 12), "b.weight": torch.randn(12, 8)}
    source = write_folder(tmp_path / "model", state)
    left = {one.name: one.reason for one in plan_checkpoint(source, "4:8-T", remainder="pad").left_dense}
    assert not left
    plan = plan_checkpoint(source, "4:8", remainder="dense")
    assert [layer.name for layer in plan.layers] == ["b"] and "8 does not divide" in plan.left_dense[0].reason
    with pytest.raises(ValueError, match=r"a: 8 does not divide the sides of its 8 x 12 matrix"):
        plan_checkpoint(source, "4:8", remainder="error")
    with pytest.raises(ValueError, match="remainder='crop'"):
        plan_checkpoint(source, "4:8", remainder="crop")


def test_the_plan_of_a_config_that_is_no_object(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.randn(8, 8)})
    (source / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"config.json.*list"):
        plan_checkpoint(source, "2:4")
