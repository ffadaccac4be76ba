"""Which tensors of a checkpoint are pruned, by names alone: the same as the model's own layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import State, write_folder
from safetensors.torch import load_file, save_file
from transformers_sweep import differs_once_saved, disagreements, model_types

import bisparse
from bisparse.checkpoint import plan_checkpoint, prune_checkpoint, verify_checkpoint
from bisparse.layers import find_layers, parse_layout
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
        "vision_tower.patchifier.weight": "looked up", "audio_tower.encoder.weight": "looked up",
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
        "mlp.experts.up_proj": torch.randn(2, 16, 8),
        "mlp.router.weight": torch.randn(2, 8),
        "attention.in_proj_weight": torch.randn(24, 8),
        "cls_token": torch.randn(1, 1, 8),
        "packed.weight": torch.zeros(8, 8, dtype=torch.uint8),
        "empty.weight": torch.zeros(0, 8),
    }
    layers, reasons = planned(tmp_path, state)
    assert layers == {
        "conv": Layout(LayoutKind.CONV),
        "up.deconv": Layout(LayoutKind.CONV_TRANSPOSED),
        "mlp.experts.up_proj": Layout(LayoutKind.EXPERTS),
        "attention.in_proj_weight": Layout(LayoutKind.PACKED, parts=3),
    }
    words = {
        "stem": "first",
        "depthwise": "depthwise",
        "packed": "U8",
        "empty": "empty",
        "cls_token": "token",
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


GLOBAL = {"num_local_experts": 2, "hidden_size": 8}


@pytest.mark.parametrize(
    ("state", "config", "expected"),
    [
        # What config.json says of the sizes, without a telling name; both directions.
        ({"moe.input_linear.weight": (2, 32, 8), "moe.output_linear.weight": (2, 8, 16)}, GLOBAL, "experts"),
        ({"m.gate_up_proj": (2, 8, 32), "m.experts.down_proj": (2, 16, 8)}, {}, None),
        ({"experts.gate_up_proj": (2, 8, 32), "experts.down_proj": (2, 16, 8)}, {}, "experts-transposed"),
        ({"experts.up_proj": (2, 16, 8), "experts.down_proj": (2, 8, 16)}, GLOBAL, "experts"),
        ({"experts.up_proj": (2, 8, 16), "experts.down_proj": (2, 16, 8)}, GLOBAL, "experts-transposed"),
        # A width that the experts do not have: up and down projection fit one way only.
        ({"experts.gate_up_proj": (2, 32, 16), "experts.down_proj": (2, 16, 16)}, {"hidden_size": 32}, "experts"),
        # The router next to them; their biases; the model's type where all sides are equal.
        ({"f.experts.up_proj": (2, 16, 8), "f.router.weight": (2, 8)}, {}, "experts"),
        ({"experts.down_proj": (2, 8, 16), "experts.down_proj_bias": (2, 16)}, {}, "experts-transposed"),
        ({"experts.down_proj": (2, 8, 8)}, {"text_config": {"model_type": "llama4_text"}}, "experts-transposed"),
        # Nothing tells.
        ({"experts.down_proj": (2, 8, 8)}, {"hidden_size": 8}, None),
        ({"w.weight": (2, 16, 8)}, {"model_type": "new", "hidden_size": 8}, None),
    ],
)
def test_stacks_of_experts_go_by_evidence(
    tmp_path: Path, state: dict[str, tuple[int, ...]], config: dict[str, Any], expected: str | None
) -> None:
    stacks = [name.removesuffix(".weight") for name, shape in state.items() if len(shape) == 3]
    tensors = {"a.weight": torch.randn(8, 8)} | {name: torch.randn(shape) for name, shape in state.items()}
    layers, reasons = planned(tmp_path, tensors, config, pattern="2:4")
    if expected is None:
        assert not set(stacks) & set(layers) and all("layout" in reasons[name] for name in stacks)
        layers, _ = planned(tmp_path / "given", tensors, config, layouts={name: "experts" for name in stacks})
        expected = "experts"
    assert {str(layers[name]) for name in stacks} == {expected}


@pytest.mark.parametrize(
    ("name", "shape", "bias", "expected"),
    [
        ("up", (8, 16, 2, 2), 16, "conv-transposed"),
        ("any", (8, 16, 3, 3), 16, "conv-transposed"),
        ("upscale_conv1", (8, 8, 2, 2), 8, "conv-transposed"),
        ("deconv", (8, 8, 3, 3), None, "conv-transposed"),
        ("upconv", (8, 8, 3, 3), 8, None),
        ("any", (8, 8, 2, 2), 8, None),
        ("downsample", (8, 8, 2, 2), 8, "conv"),
        ("any", (16, 8, 3, 3), 16, "conv"),
        ("any", (8, 8, 3, 3), None, "conv"),
        ("reader", (16, 2, 3, 3), 16, None),
        ("any", (24, 4, 3, 3), 8, "conv-transposed, 2 groups"),
        ("any", (24, 4, 3, 3), 10, None),
        ("any", (24, 4, 3, 3), 20, None),
        ("deconv", (16, 4, 4, 4), 16, None),
        ("any", (8, 3, 3, 8), None, None),
    ],
)
def test_convolutions_go_by_evidence(
    tmp_path: Path, name: str, shape: tuple[int, ...], bias: int | None, expected: str | None
) -> None:
    state = {"before.weight": torch.randn(8, 8), f"{name}.weight": torch.randn(shape)}
    if bias is not None:
        state[f"{name}.bias"] = torch.randn(bias)
    layers, reasons = planned(tmp_path, state, pattern="2:4")
    assert (str(layers[name]) if name in layers else None) == expected
    assert expected is not None or "give its layout" in reasons[name]


def test_groups_of_convolutions_from_the_config_or_the_caller(tmp_path: Path) -> None:
    state = {"norm.weight": torch.randn(32), "conv.weight": torch.randn(32, 8, 3, 3)}
    assert "groups" in planned(tmp_path / "a", state | {"l.weight": torch.randn(32, 32)})[1]["conv"]
    assert planned(tmp_path / "b", state, {"conv_groups": 4})[0] == {"conv": Layout(LayoutKind.CONV, groups=4)}
    assert planned(tmp_path / "c", state, layouts={"conv": "groups:4"})[0] == {"conv": Layout(LayoutKind.CONV, groups=4)}


def test_mlx_files_have_their_channels_last(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {})
    weight = torch.randn(16, 3, 3, 8)
    save_file({"conv.weight": weight, "l.weight": torch.randn(8, 16)}, folder / "model.safetensors", {"format": "mlx"})
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    pruned = load_file(tmp_path / "out" / "model.safetensors")["conv.weight"]
    assert bool(((pruned.reshape(16, 3, 3, 2, 4) != 0).sum(-1) == 2).all())
    assert verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("name", ["encoder.weight_ih_l0", "encoder.weight_hh_l1_reverse", "cell.weight_ih"])
def test_recurrent_weights_are_matrices(tmp_path: Path, name: str) -> None:
    assert planned(tmp_path, {name: torch.randn(16, 8)})[0] == {name: Layout()}


@pytest.mark.parametrize(
    "name",
    [
        "output.weight", "tok_emb.weight", "layers.0.q_proj.lora_A.weight", "l.block_sparse_moe.router.layer.weight",
        "mask_decoder.mask_tokens.weight", "linear.weight", "decoder.output_projection.weight", "classifier.6.weight",
        "model.embed_positions.weight", "unet.to_q_lora.down.weight", "value_head.weight",
    ],
)  # fmt: skip
def test_what_is_no_layer_by_its_name_stays_dense_unless_asked_for(tmp_path: Path, name: str) -> None:
    state = {name: torch.randn(8, 8), "a.weight": torch.randn(8, 8)}
    assert set(planned(tmp_path / "default", state)[0]) == {"a"}
    assert set(planned(tmp_path / "asked", state, include=name)[0]) == {name.removesuffix(".weight")}


def test_a_vocabulary_in_the_config_shows_what_is_looked_up(tmp_path: Path) -> None:
    state = {"w.weight": torch.randn(96, 8), "a.weight": torch.randn(8, 8)}
    _, reasons = planned(tmp_path, state, {"vocab_size": 96, "hidden_size": 8})
    assert "96 rows are the vocabulary" in reasons["w"]


@pytest.mark.parametrize("legacy", [False, True])
def test_tied_tensors_of_a_torch_file_are_pruned_alike_or_not_at_all(tmp_path: Path, legacy: bool) -> None:
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    state = {"a.weight": a, "a_again.weight": a, "b.weight": b, "b_seen.weight": b.t(), "c.weight": torch.randn(8, 8)}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    plan = plan_checkpoint(tmp_path / "m.pt", "2:4")
    assert {one.name for one in plan.layers} == {"a", "a_again", "c"}
    assert {one.name for one in plan_checkpoint(tmp_path / "m.pt", "2:4", include=["a", "c"]).layers} == {"c"}
    prune_checkpoint(tmp_path / "m.pt", tmp_path / "out", "2:4")
    written = load_file(tmp_path / "out" / "m.safetensors")
    assert torch.equal(written["a.weight"], written["a_again.weight"]) and not torch.equal(written["a.weight"], a)
    assert torch.equal(written["b.weight"], b) and torch.equal(written["b_seen.weight"], b.t())


def test_the_report_says_how_much_of_the_model_was_pruned_and_warns_below_half(tmp_path: Path) -> None:
    state = {"embed.weight": torch.randn(100, 8), "a.weight": torch.randn(8, 8)}
    source = write_folder(tmp_path / "model", state)
    report = prune_checkpoint(source, tmp_path / "out", "2:4")
    assert report.fraction == 64 / 864
    assert report.coverage.startswith("Warning: only 64 of 864 parameters (7.4%)") and "7.4% of all parameters" in str(report)
    report = prune_checkpoint(source, tmp_path / "all", "2:4", include="*")
    assert report.fraction == 1 and report.coverage == "864 of 864 parameters (100.0%) are in pruned layers."


@pytest.mark.slow
@pytest.mark.transformers
def test_no_model_type_of_transformers_is_read_differently_from_its_file(tmp_path: Path) -> None:
    """Prints the types that could not be built, with the reason."""
    pytest.importorskip("transformers")
    built = differing = saved = 0
    missing, found = [], []
    for one in model_types():
        if one.model is None:
            missing.append(f"{one.type}: {one.problem}")
            continue
        built += 1
        own = disagreements(one)
        differing += bool(own)
        found += own
        if (other := differs_once_saved(one, tmp_path / one.type)) is not None:
            saved += 1
            found += other
    assert saved > 20, "the small ones are written to disk, too"
    print(f"{saved} saved")  # noqa: T201
    print(f"{built} built, {differing} differ; {len(missing)} not built:", *missing, sep="\n")  # noqa: T201
    assert not found, "\n".join(found[:20])
    assert built > 300, "a sweep over few types would prove little"


def test_include_overrules_names_and_exclude_wins(tmp_path: Path) -> None:
    state = {name: torch.randn(8, 8) for name in ("lm_head.weight", "a.weight", "b.weight", "text_projection")}
    layers, reasons = planned(tmp_path, state, include=["lm_head", "b*", "text_projection"], exclude="re:b",
                              layouts={"text_projection": "linear"})  # fmt: skip
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


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((32, 24, 3, 1), "conv-transposed"), ((16, 3, 2, 24), "conv-last"), ((3, 24, 32), "experts-transposed")],
)
@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "50%"])
def test_layouts_are_pruned_on_disk_as_in_memory(
    tmp_path: Path, small_bands: Callable[[], None], shape: tuple[int, ...], layout: str, pattern: str
) -> None:
    small_bands()
    weight = torch.randn(shape)
    source = write_folder(tmp_path / "model", {"a.weight": weight})
    prune_checkpoint(source, tmp_path / "out", pattern, layouts={"a": layout})
    written = load_file(tmp_path / "out" / "model.safetensors")["a.weight"]
    best = bisparse.solve(weight.abs(), pattern, layout=parse_layout(layout, shape, "a"))
    assert torch.equal(written, weight * best.mask)
    assert verify_checkpoint(tmp_path / "out")
    written.flatten()[:] = 1
    save_file({"a.weight": written}, tmp_path / "out" / "model.safetensors")
    assert not verify_checkpoint(tmp_path / "out")


def test_verify_does_not_call_checked_what_has_no_known_layout(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.zeros(8, 8), "experts.down_proj": torch.zeros(2, 8, 8)})
    result = verify_checkpoint(source, "2:4")
    assert [one.name for one in result.unchecked] == ["experts.down_proj"]
    assert not verify_checkpoint(source, "2:4", layouts={"experts.*": "experts"}).unchecked
