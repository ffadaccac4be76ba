"""Models and data by name, the two commands, and transformers models block by block."""

from __future__ import annotations

import copy
import hashlib
import html
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from bisparse import verify
from bisparse.checkpoint import CheckpointError, read_sidecar, save
from bisparse.cli import app
from bisparse.cli.calibration_text import text_batches, token_batches
from bisparse.cli.model_source import open_source
from bisparse.layers import find_layers
from bisparse.pruning import ALPS, AdaPrune, CalibrationError, Wanda, prune_
from bisparse.pruning.calibration.block_chain import find_chains
from bisparse.pruning.calibration.calibrate import Walk, calibrate
from bisparse.pruning.journal import Journal, remove_journal

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def llama(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config).eval()


def tokens(count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(64, (2, 16))} for _ in range(count)]


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_transformers_are_chains_of_blocks_and_prune_to_transposable_patterns(make) -> None:
    model, batches = make(), tokens()
    layers, _ = find_layers(model)
    inner = [layer for layer in layers if "pooler" not in layer.name]
    chains = find_chains(model, inner, {layer.name: 1 for layer in inner}, batches[:1], None)
    assert len(chains) == 1 and len(chains[0].blocks) in (2, 3)
    assert all(chains[0].holds(layer) for layer in inner)
    report = prune_(model, "4:8-T", AdaPrune(), batches)
    for layer in report:
        verify(model.get_parameter(layer.parameter), "4:8-T", layout=layer.layout).check()
        assert layer.error < layer.error_before
    assert not [one for one in report.left_dense if "no calibration" in one.reason]


def test_the_stages_of_a_llama_block_are_those_that_share_an_input() -> None:
    model = llama()
    layers, _ = find_layers(model)
    stages = [[layer.name.rsplit(".", 1)[1] for layer in s.layers] for s in calibrate(model, layers, tokens(), Wanda().needs)]
    assert stages == 3 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_block_by_block_gives_what_the_whole_network_would() -> None:
    """The chain against a plain run of the model as pruned so far, key-value cache and rotary embeddings included."""
    model, batches = llama(), tokens()
    layers, _ = find_layers(model)
    for stage in calibrate(model, layers, batches, AdaPrune().needs):
        layer, statistics = stage.layers[0], stage.statistics[0].merged()
        seen: list[torch.Tensor] = []
        handle = layer.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        x = torch.cat(seen)
        torch.testing.assert_close(statistics.gram[0], x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for layer in stage.layers:
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.7)


def test_memory_is_that_of_one_stage_and_the_activations_between_two_blocks() -> None:
    small, large = Walk(), Walk()
    for depth, walk in ((2, small), (8, large)):
        model = llama(num_hidden_layers=depth)
        for _ in calibrate(model, find_layers(model)[0], tokens(), Wanda().needs, walk=walk):
            pass
    assert large.statistics_bytes == small.statistics_bytes
    assert large.activation_bytes < 1.1 * small.activation_bytes


def test_use_of_the_cache_is_given_back() -> None:
    model = llama()
    assert model.config.use_cache
    prune_(model, "2:4", Wanda(), tokens())
    assert model.config.use_cache


def test_upstream_correction_pays_on_a_language_model() -> None:
    model, batches = llama(num_hidden_layers=2), tokens(20)
    judge = {"input_ids": torch.randint(64, (16, 16))}
    with torch.no_grad():
        goal = model(**judge).logits
    errors = []
    for method in (Wanda(), AdaPrune(correct_upstream=False), AdaPrune(), ALPS(iterations=15)):
        pruned = copy.deepcopy(model)
        prune_(pruned, "4:8-T", method, batches)
        with torch.no_grad():
            errors.append(float((pruned(**judge).logits - goal).norm()))
    assert errors[3] < errors[2] < errors[1] < errors[0]


def test_sequences_are_spread_over_the_text_and_never_repeat() -> None:
    batches = token_batches(torch.arange(1000), sequences=5, length=64, batch_size=2)
    starts = sorted(int(row[0]) for batch in batches for row in batch["input_ids"])
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert starts[0] == 0 and starts[-1] == 14 * 64 and len(set(starts)) == 5
    assert len(token_batches(torch.arange(130), sequences=9, length=64, batch_size=8)[0]["input_ids"]) == 2
    with pytest.raises(CalibrationError, match="63 tokens, fewer than one sequence of 64"):
        token_batches(torch.arange(63), length=64)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_for_tests.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def both():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), [torch.randn(8, 16) for _ in range(6)]\n"
        "def model():\n    return both()[0]\n"
        "def wrong():\n    return 3\n"
        "def raises():\n    raise RuntimeError('first\\nsecond')\n"
        "def asks(x, *, y=1):\n    return model()\n"
        "def breaks_off():\n    return model(), (1 // (2 - i) for i in range(3))\n"
        "def one_tensor():\n    return model(), torch.zeros(3, 16)\n"
        "def one_batch():\n    return model(), {'input': torch.zeros(3, 16)}\n"
        "class Leaves(nn.Linear):\n    def forward(self, x):\n        import sys\n        sys.exit(5)\n"
        "def leaving():\n    return nn.Sequential(Leaves(16, 16)), [torch.zeros(3, 16)]\n"
        "def three():\n    return model(), [], 1\n"
        "def half():\n    from bisparse import prune_\n    found = both()[0]\n    prune_(found, '4:8')\n    return found\n"
        "def relu():\n    return nn.Sequential(nn.ReLU()), [torch.zeros(3, 16)]\n"
        "def head():\n    return nn.ModuleDict({'lm_head': nn.Linear(16, 16)}), [torch.zeros(3, 16)]\n"
        "def interrupted():\n    found, batches = both()\n    found.insert(2, Stops(found[0]))\n    return found, batches\n"
        "class Stops(nn.Module):\n"
        "    def __init__(self, first):\n        super().__init__()\n        self.first = [first]\n"
        "    def forward(self, x):\n"
        "        if bool((self.first[0].weight == 0).any()):\n            raise KeyboardInterrupt\n"
        "        return x\n"
    )
    (tmp_path / "unreadable_for_tests.py").write_text("def f(:\n")
    (tmp_path / "leaving_for_tests.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "raising_for_tests.py").write_text("\nraise KeyError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_for_tests", raising=False)
    return tmp_path


def test_a_source_is_a_function_of_yours(beside: Path) -> None:
    assert len(open_source("mine_for_tests:both").batches) == 6
    assert open_source("mine_for_tests:model").batches is None
    for name, message in {
        "mine_for_tests:wrong": "must return a model",
        "mine_for_tests:absent": "has no function 'absent'",
        "mine_for_tests:zzz": "^mine_for_tests:zzz: mine_for_tests has no function 'zzz'",
        "no_such_module_here:both": "no module 'no_such_module_here'",
        "no/such/folder": "no such folder",
        "mine_for_tests:raises": r"raises\(\) failed: RuntimeError: first second \(.*mine_for_tests.py:11\)$",
        "mine_for_tests:asks": r"asks is called without arguments, but takes \(x, \*, y=1\)",
        "mine_for_tests:breaks_off": r"reading its calibration batches failed: ZeroDivisionError: .*tests.py:15\)$",
        "mine_for_tests:one_tensor": r"an iterable such as a list .* not Tensor of shape .*; return a single batch .* \[batch\]",
        "mine_for_tests:one_batch": "an iterable such as a list .* not dict",
        "mine_for_tests:three": "not a tuple of Sequential, list, int",
        "unreadable_for_tests:f": r"SyntaxError: .*unreadable_for_tests.py:1\)$",
        "leaving_for_tests:f": r"importing leaving_for_tests failed: SystemExit: 3 \(.*leaving_for_tests.py:2\)$",
        "raising_for_tests:f": r"importing raising_for_tests failed: KeyError: 'at import' \(.*raising_for_tests.py:2\)$",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            open_source(name)
        assert "\n" not in str(raised.value)
        result = CliRunner().invoke(app, ["prune", name, "out", "--method", "wanda"], catch_exceptions=False)
        assert result.exit_code == 2 and name in result.output, "no :name: becomes a picture"


def test_a_model_that_calls_sys_exit_is_an_error_with_a_message(beside: Path) -> None:
    result = CliRunner().invoke(app, ["prune", "mine_for_tests:leaving", "out", "--method", "wanda", "--pattern", "4:8-T"])
    assert result.exit_code == 2 and "SystemExit: 5" in result.output


def test_a_transformers_folder_that_cannot_be_loaded_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama(num_hidden_layers=1).save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    for name, message in ((weights, "is a file: pass the folder"), (config, "is a file: pass the folder")):
        with pytest.raises(ValueError, match=f"{name.name} {message}"):
            open_source(str(name))
    with pytest.raises(ValueError, match="model: transformers cannot load the tokenizer: "):
        open_source(str(folder))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        open_source(str(folder))
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace('"llama"', '"nollama"').replace("LlamaForCausalLM", "NoLlama"))
    with pytest.raises(ValueError, match=r"model: transformers cannot load the model: .*nollama"):
        open_source(str(folder))
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        open_source(str(folder))
    config.unlink()
    with pytest.raises(ValueError, match=r"model has no config\.json, .*: add the config\.json .* or pass module:function"):
        open_source(str(folder))


def invoke(*arguments: str | Path) -> tuple[int, dict]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    text = result.stdout[result.stdout.index("{") :] if "{" in result.stdout else "{}"
    return result.exit_code, json.loads(text)


def test_prune_then_convert_by_commands(beside: Path) -> None:
    code, report = invoke("prune", "mine_for_tests:both", beside / "out", "-p", "4:8", "--method", "adaprune")
    assert code == 0 and report["method"] == "adaprune"
    assert all(layer["error"] < layer["error_before"] for layer in report["layers"])
    code, _ = invoke("verify", beside / "out", "-p", "4:8")
    assert code == 0
    code, report = invoke("convert", "mine_for_tests:both", beside / "converted", "--to", "2:4-T", "--regrow")
    assert code == 0 and all(layer["violated_groups"] == 1.0 for layer in report["layers"])
    assert all(layer["unstructured_weights"] > 0.3 and layer["fitted"] == "" for layer in report["layers"])
    assert invoke("verify", beside / "converted", "-p", "2:4-T")[0] == 0
    command = ["convert", "mine_for_tests:half", "shown", "--to", "2:4"]
    lines = CliRunner().invoke(app, command).output.splitlines()
    assert lines[0].split()[4:8] == ["fitted", "violation", "by", "chance"]
    assert lines[1].split()[4] == "3:4" and lines[1].split()[6] == "0.1875"


def test_wrong_use_of_the_commands_is_said_with_code_two(beside: Path) -> None:
    for arguments in (
        ("prune", "mine_for_tests:model", "out", "--method", "wanda"),
        ("prune", "mine_for_tests:both", "out", "--method", "sparsegtp"),
        ("prune", "mine_for_tests:both", "out", "--method", "wanda", "--order", "sideways"),
        ("prune", "mine_for_tests:both", "out", "--method", "wanda", "--device", "abacus"),
        ("prune", "mine_for_tests:both", "out", "--method", "wanda", "--device", "meta"),
        ("prune", "no_such_folder", "out", "--order", "sideways"),
        ("convert", "mine_for_tests:both", "out", "--to", "2:4", "--device", "cuda:99"),
        ("convert", "mine_for_tests:both", "out", "--to", "2:4", "--include", "re:("),
        ("convert", "mine_for_tests:both", "out", "--to", "5:4"),
        ("convert", "mine_for_tests:nothing", "out", "--to", "2:4"),
    ):
        assert CliRunner().invoke(app, list(arguments)).exit_code == 2
        assert not (beside / "out").exists()


def test_an_interrupted_job_says_what_it_leaves_and_how_to_go_on(beside: Path) -> None:
    command = ["prune", "mine_for_tests:interrupted", "out", "--method", "wanda", "--order", "sequential"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 130 and "interrupted; nothing was left behind" in result.output
    result = CliRunner().invoke(app, [*command, "--resume", "journal"], catch_exceptions=False)
    assert result.exit_code == 130 and "kept in journal, and the same command continues from there" in result.output
    assert list((beside / "journal").glob("done-*")) and not (beside / "out").exists()


@pytest.mark.parametrize("command", [["prune", "-p", "2:4"], ["convert", "--to", "2:4"]])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("relu", r"Sequential has no layer to prune \(none that a pattern applies to\)"),
        ("head", r"ModuleDict has no layer to prune \(lm_head: output head"),
    ],
)
def test_nothing_to_prune_is_said_with_the_reason(command: list[str], function: str, reason: str, beside: Path) -> None:
    name, *rest = command
    result = CliRunner().invoke(app, [name, f"mine_for_tests:{function}", "out", *rest], catch_exceptions=False)
    assert result.exit_code == 2 and re.search(f"the model {reason}", result.output)
    assert not (beside / "out").exists()


@pytest.mark.parametrize("calibration", ["absent.txt", "."])
def test_a_text_that_is_not_there_is_said_before_the_model_is_loaded(calibration: str, beside: Path) -> None:
    for command in (["prune", "no:model", "out", "--method", "wanda"], ["convert", "no:model", "out", "--to", "2:4"]):
        result = CliRunner().invoke(app, [*command, "--calibration", calibration], catch_exceptions=False)
        assert result.exit_code == 2 and "--calibration" in result.output and "no:model" not in result.output


@pytest.mark.parametrize(
    ("command", "needing"),
    [
        (["prune", "--method", "wanda"], "wanda"),
        (["prune", "--block-epochs", "2"], "--block-epochs"),
        (["prune", "--network-epochs", "2"], "--network-epochs"),
        (["convert", "--to", "2:4", "--method", "magnitude", "--network-epochs", "2"], "--network-epochs"),
        (["convert", "--to", "2:4", "--method", "sparsegpt"], "sparsegpt"),
        (["convert", "--to", "2:4", "--regrow"], "--regrow"),
    ],
)
def test_a_function_without_batches_is_told_to_return_them(command: list[str], needing: str, beside: Path) -> None:
    name, *options = command
    code, said = invoke(name, "mine_for_tests:model", "out", *options)
    assert code == 2
    assert f"{needing} needs calibration data: return (model, batches)" in said["error"]


def test_a_text_that_is_none_is_named(beside: Path) -> None:
    (beside / "picture.png").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(CalibrationError, match=r"picture\.png is not UTF-8 text"):
        text_batches(None, beside / "picture.png", causal=True)


def test_what_magnitude_would_not_use_is_refused_and_so_is_a_target_that_exists_before_any_work(beside: Path) -> None:
    (beside / "text.txt").write_text("some text")
    result = CliRunner().invoke(app, ["prune", "in", "out", "--calibration", "text.txt"])
    assert result.exit_code == 2 and "magnitude" in result.output
    (beside / "out").mkdir()
    (beside / "out" / "kept").touch()
    for command in (("prune", "no:model", "out", "--method", "wanda"), ("convert", "no:model", "out", "--to", "2:4")):
        result = CliRunner().invoke(app, list(command))
        assert result.exit_code == 1 and "exists already" in result.output  # before the model is looked for


def test_a_language_model_from_folder_to_folder(tmp_path: Path) -> None:
    stored(tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)
    text = " ".join(f"w{i}" for i in torch.randint(62, (2000,), generator=generator).tolist())
    (tmp_path / "text.txt").write_text(text)
    code, report = invoke(
        "prune", tmp_path / "dense", tmp_path / "sparse", "-p", "4:8-T", "--method", "alps",
        "--calibration", tmp_path / "text.txt", "--sequences", "20", "--length", "32",
    )  # fmt: skip
    assert code == 0 and len(report["layers"]) == 14
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for layer in report["layers"]:
        verify(loaded.get_parameter(layer["parameter"]), "4:8-T").check()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "sparse")("w3 w4")["input_ids"] == [3, 4]


def test_an_encoder_and_decoder_are_calibrated_on_text_and_have_no_perplexity(tmp_path: Path) -> None:
    config = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 63, "eos_token_id": 63}
    models = {
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_kv=16, d_ff=64, num_layers=1, num_heads=2, **config)
        ),
        "bart": transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                bos_token_id=63,
                **config,
            )
        ),
    }
    for name, model in models.items():
        dense = stored(tmp_path / name, model)
        data = [
            "-p",
            "2:4",
            "--method",
            "sparsegpt",
            "--calibration",
            tmp_path / "text.txt",
            "--sequences",
            "10",
            "--length",
            "32",
        ]
        code, report = invoke("prune", dense, tmp_path / f"{name}-sparse", *data, "--network-epochs", "1")
        notes = " ".join(report["notes"])
        assert code == 0 and "nats per position" in notes, report
        assert any("decoder" in layer["name"] for layer in report["layers"])
        assert all(0 < layer["error"] < 1 for layer in report["layers"])  # measured on inputs that every layer saw
        code, said = invoke("eval", dense, "--text", tmp_path / "text.txt", "--context", "32")
        assert code and "its encoder reads the tokens to predict" in said["error"]


def test_an_encoder_and_decoder_that_classify_are_calibrated_without_labels(tmp_path: Path) -> None:
    """Their labels are classes, and no tokens; the decoder is given the text by the model."""
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=62, eos_token_id=61,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = stored(tmp_path / "t5", transformers.T5ForSequenceClassification(config))
    words = tokenizer()
    words.pad_token = "[UNK]"
    words.save_pretrained(dense)
    (tmp_path / "lines.txt").write_text("".join(f"w{i} w{i + 1} w61\n" for i in range(20)))
    code, report = invoke(
        "prune", dense, tmp_path / "sparse", "-p", "2:4", "--method", "wanda", "--calibration", tmp_path / "lines.txt"
    )
    assert code == 0 and any("decoder" in layer["name"] for layer in report["layers"]), report


def test_a_language_model_is_fitted_as_a_whole(tmp_path: Path) -> None:
    dense = stored(tmp_path / "dense")
    data = ["--calibration", tmp_path / "text.txt", "--sequences", "20", "--length", "32"]
    how = ["-p", "2:4-T", "--method", "wanda", *data]
    fits = ["--block-epochs", "1", "--network-epochs", "2", "--resume", tmp_path / "journal"]
    code, report = invoke("prune", dense, tmp_path / "fitted", *how, *fits)
    notes = " ".join(report["notes"])
    assert code == 0 and "reconstructed" in notes and "fitted the whole network" in notes and "nats per position" in notes
    assert "on 16 batches" in notes  # of 20 sequences, of which every fifth is held out: one per step
    assert not (tmp_path / "journal").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    for layer in report["layers"]:
        verify(loaded.get_parameter(layer["parameter"]), "2:4-T").check()
    code, report = invoke("convert", tmp_path / "fitted", tmp_path / "other", "--to", "1:4", *data, "--network-epochs", "1",
                          "--network-sequences", "40")  # fmt: skip
    assert code == 0 and "fitted the whole network to the dense one's outputs on 32 batches" in " ".join(report["notes"])
    made_from = json.loads((tmp_path / "other" / "bisparse.json").read_text())["provenance"]["calibration"]
    assert made_from["sequences"] == 20 and made_from["network_sequences_at_most"] == 40
    for given in (["--network-epochs", "0", *data], ["--network-epochs", "1"]):
        code, said = invoke("prune", dense, tmp_path / "x", *how[:4], *given, "--network-sequences", "40")
        assert code == 2 and "requires --" in said["error"]
    for command in (["prune", dense, tmp_path / "x", *how], ["convert", dense, tmp_path / "x", "--to", "2:4", *data]):
        code, said = invoke(*command, "--network-epochs", "1", "--order", "parallel")
        assert code == 2 and "--order sequential" in said["error"]
    assert not (tmp_path / "x").exists()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(62)} | {"[UNK]": 62, "</s>": 63}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="</s>")


def stored(folder: Path, model: nn.Module | None = None, **options: object) -> Path:
    """A model as it comes from a hub: weights, configurations, tokenizer, and what its authors add."""
    (model or llama(num_hidden_layers=2)).save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    for name in ("README.md", "LICENSE", "assets/logo.svg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of the authors")
    (folder.parent / "text.txt").write_text(" ".join(f"w{7 * i % 61}" for i in range(2000)))
    return folder


def described(folder: Path, **changes: object) -> None:
    """Change a stored configuration; None removes an entry."""
    content = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def refused(folder: Path, *options: str) -> str:
    """What both commands say, the same; nothing is written."""
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    said = []
    for command in (["prune", "-p", "2:4", "--method", "wanda"], ["convert", "--to", "2:4"]):
        name, *rest = command
        text = folder.parent / "text.txt"
        code, content = invoke(name, folder, folder.parent / "out", *rest, "--calibration", text, "--length", "32", *options)
        assert code == 1
        said.append(content["error"])
    assert said[0] == said[1]
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before
    return said[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"18 missing \(model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.\)"),
        ({"num_hidden_layers": 1}, r"9 unexpected \(model\.layers\.1\.input_layernorm\.weight, .*, \.\.\.\)"),
        ({"intermediate_size": 64}, r"6 of a different shape \(model\.layers\.0\.mlp\.down_proj\.weight, stored as \(32, 48\)"),
        ({"attention_bias": True}, r"8 missing \(model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"architectures": ["LlamaModel"]}, r"1 unexpected \(lm_head\.weight\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"1 missing \(score\.weight\); 1 unexpected \(lm_head\.weight\)"),
        ({"architectures": None}, r"config\.json names no architectures; add the class"),
        ({"architectures": []}, r"config\.json names no architectures"),
        ({"architectures": ["NoSuchModel"]}, r"has architectures \['NoSuchModel'\], which is not a model class of transformers"),
        ({"architectures": ["AutoModel"]}, "is not a model class of transformers"),
        ({"architectures": [5]}, "is not a model class of transformers"),
    ],
)  # fmt: skip
def test_a_model_that_its_files_do_not_hold_whole_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    folder = stored(tmp_path / "model")
    described(folder, **changes)
    assert re.search(message, refused(folder))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_a_model_has_no_place_for_are_refused(tmp_path: Path, sharded: bool) -> None:
    """Some are reported by transformers, others renamed or left out in silence."""
    options = {"max_shard_size": "20KB"} if sharded else {}
    folder = stored(tmp_path / "one", gpt2(), **options)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        state = load_file(file)
        save_file({name.removeprefix("transformer."): value for name, value in state.items()}, file, {"format": "pt"})
    if sharded:
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace('"transformer.', '"'))
    message = refused(folder)
    assert "would be lost (h.0." in message and " transformer.h.0." in message.partition("would be added")[2]
    assert "save_pretrained" in message
    for number, extra in enumerate(("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "mine")):
        folder = stored(tmp_path / str(number) / "model", gpt2())
        file = folder / "model.safetensors"
        save_file({**load_file(file), extra: torch.ones(3)}, file, {"format": "pt"})
        assert re.search(rf"1 (unexpected|would be lost) \({re.escape(extra)}\)", refused(folder))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_names_shapes_and_all_other_files_are_those_of_the_source(tmp_path: Path, tied: bool, sharded: bool) -> None:
    model = llama(num_hidden_layers=1, tie_word_embeddings=tied)
    model.generation_config.max_new_tokens = 77
    folder = stored(tmp_path / "model", model, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (len(list(folder.glob("*.safetensors"))) > 1) is sharded
    data = ("--calibration", tmp_path / "text.txt", "--length", "32", "--sequences", "8")
    commands = {
        "pruned": ("prune", "-p", "2:4", "--method", "wanda", *data),
        "converted": ("convert", "--to", "2:4", *data),
        "magnitude": ("prune", "-p", "2:4"),
    }
    for out, (name, *options) in commands.items():
        assert invoke(name, folder, tmp_path / out, *options)[0] == 0
    before = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    assert ("lm_head.weight" in before) is not tied

    def others(place: Path) -> dict[str, bytes]:
        found = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        return {key: value for key, value in found.items() if "safetensors" not in key and key != "bisparse.json"}

    assert {"generation_config.json", "README.md", "LICENSE", "assets/logo.svg", "tokenizer.json"} <= set(others(folder))
    source = others(folder)
    for out in commands:
        written = others(tmp_path / out)
        assert source["README.md"] in written.pop("README.md"), "the model card keeps the authors' text"
        assert written == {name: data for name, data in source.items() if name != "README.md"}
    for out in ("pruned", "converted"):
        after = load_file(tmp_path / out / "model.safetensors")
        assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out, output_loading_info=True)
        assert not any(info.values()) and loaded.generation_config.max_new_tokens == 77
        assert invoke("verify", tmp_path / out)[0] == 0


def test_a_job_that_changes_names_or_shapes_is_not_written(tmp_path: Path) -> None:
    """What is said before a job is checked again after it."""
    folder = stored(tmp_path / "model")
    for change, message in {
        "bias": r"1 would be added \(model\.layers\.0\.mlp\.up_proj\.bias\)",
        "drop": r"1 would be lost \(model\.layers\.0\.mlp\.up_proj\.weight\)",
        "grow": r"1 would be written in another shape \(lm_head\.weight \(64, 32\) as \(65, 32\)\)",
    }.items():
        model = open_source(str(folder)).model
        report = prune_(model, "2:4", include="*down_proj*")
        projection = model.model.layers[0].mlp.up_proj
        if change == "bias":
            projection.bias = nn.Parameter(torch.zeros(48))
        elif change == "drop":
            del projection.weight
        else:
            model.lm_head.weight = nn.Parameter(torch.zeros(65, 32))
        with pytest.raises(CheckpointError, match=message):
            save(model, tmp_path / "out", report=report, source=folder)
        assert not (tmp_path / "out").exists()


def test_save_writes_the_configuration_of_generation(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    model.generation_config.max_new_tokens = 77
    report = prune_(model, "2:4")
    save(model, tmp_path / "out", report=report, beside=tokenizer().save_pretrained)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 77
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w3")["input_ids"] == [3]


@pytest.mark.parametrize("command", [("prune", "-p", "2:4", "--method", "wanda"), ("convert", "--to", "2:4")])
def test_a_calibrated_job_never_writes_into_what_it_reads(tmp_path: Path, command: tuple[str, ...]) -> None:
    model = llama(num_hidden_layers=1)
    report = prune_(model, "2:4")
    save(model, tmp_path / "model", report=report, beside=tokenizer().save_pretrained)  # one that --overwrite may replace
    text = tmp_path / "texts" / "text.txt"
    text.parent.mkdir()
    text.write_text(" ".join(f"w{7 * i % 61}" for i in range(2000)))
    for name in ("texts", "around"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "bisparse.json").write_text("{}")
    (tmp_path / "around" / "within").mkdir()
    (tmp_path / "link").symlink_to("model")
    shutil.copytree(tmp_path / "model", tmp_path / "around" / "within" / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name, *options = command
    options += ["--calibration", str(text), "--length", "32", "--sequences", "8"]
    for source, target, resume, message in (
        ("model", "model", None, "model is the source"),
        ("model", "link", None, "link is the source"),
        ("link", "model", None, "model is the source"),
        ("model", "model/out", None, "out is inside the source"),
        ("link", "model/out", None, "out is inside the source"),
        ("around/within/model", "around", None, "around contains the source"),
        ("model", "texts", None, "texts contains the calibration text"),
        ("model", "out", "out", "out is the target"),
        ("model", "out", "out/journal", "journal is inside the target"),
        ("model", "out/deeper", "out", "out contains the target"),
        ("model", "out", "model", "model is the source"),
        ("model", "out", "link/journal", "journal is inside the source"),
        ("model", "out", "texts", "texts contains the calibration text"),
    ):
        for overwrite in ((), ("--overwrite",)):
            more = () if resume is None else ("--resume", tmp_path / resume)
            code, said = invoke(name, tmp_path / source, tmp_path / target, *options, *overwrite, *more)
            assert code == 1 and message in said["error"], (source, target, resume)
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is the model's own files"):
        save(loaded, tmp_path / "link", "2:4", include="*proj", overwrite=True)
    with pytest.raises(CheckpointError, match="is inside the model's own files"):
        prune_(loaded, "2:4", Wanda(), tokens(), resume=tmp_path / "model" / "journal")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_function_s_module_and_the_model_that_it_loads_are_never_replaced(beside: Path) -> None:
    llama(num_hidden_layers=1).save_pretrained(beside / "model")
    for folder in (beside, beside / "model"):
        (folder / "bisparse.json").write_text('{"schema_version": 1, "layers": []}')
    (beside / "mine_for_tests.py").write_text(
        "import transformers\ndef loads():\n    return transformers.AutoModelForCausalLM.from_pretrained('model')\n"
    )
    before = {path: path.read_bytes() for path in beside.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    for target, message in (
        (".", "contains the source"),
        ("model", "is the model's own files"),
        ("model/x", "inside the model's own"),
    ):
        code, said = invoke("convert", "mine_for_tests:loads", target, "--to", "2:4", "--overwrite")
        assert code == 1 and message in said["error"]
    assert before == {path: path.read_bytes() for path in beside.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_the_sidecar_says_how_a_job_was_called_and_on_what_data(tmp_path: Path, beside: Path) -> None:
    folder = stored(tmp_path / "model")
    text = tmp_path / "text.txt"
    options = ("--calibration", text, "--sequences", "12", "--length", "32", "--order", "parallel")
    for command in (("prune", folder, "a b", "-p", "2:4", "--method", "wanda"), ("convert", folder, "c", "--to", "2:4")):
        assert invoke(*command, *options)[0] == 0
        said = read_sidecar(command[2]).provenance
        assert shlex.split(said["command"]) == ["bisparse", *map(str, (*command, *options)), "--json"]
        assert said["source"] == str(folder) and said["order"] == "parallel"
        assert said["calibration"] == {
            "files": [
                {
                    "name": str(text),
                    "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
                    "bytes": text.stat().st_size,
                    "sequences": 12,
                }
            ],
            "text_field": None,
            "sequences": 12,
            "length": 32,
            "tokens": 12 * 32,
            "seed": 0,
            "batches": 12,
        }
        assert said["versions"].keys() == {"transformers", "tokenizers"}
        shown = " ".join(
            CliRunner().invoke(app, ["report", command[2], "-o", "page.html"], catch_exceptions=False).output.split()
        )
        for words in (f"made by: {said['command']}"[:60], str(text), "sha256", "12 sequences of at most 32 tokens", "seed 0"):
            assert words in shown
            assert words in html.unescape((beside / "page.html").read_text())
    assert invoke("prune", "mine_for_tests:both", "d", "-p", "2:4", "--method", "wanda")[0] == 0
    assert read_sidecar("d").provenance["calibration"] == {"function": "mine_for_tests:both", "batches": 6}


@pytest.mark.parametrize("name", ["adaprune_a_model.py", "convert_a_model.py"])
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert "ALPS" in printed or "channel spaces permuted" in printed


def test_what_stands_beside_a_model_is_written_with_it_or_not_at_all(tmp_path: Path) -> None:
    model = torch.nn.Linear(16, 16)
    report = prune_(model, "2:4")

    def fails(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        raise OSError("the disk is full")

    with pytest.raises(CheckpointError, match="the disk is full"):
        save(model, tmp_path / "out", report=report, beside=fails)
    assert not any(tmp_path.iterdir())
    save(model, tmp_path / "out", report=report, beside=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "command", [("prune", "-p", "2:4", "--method", "adaprune"), ("convert", "--to", "2:4")], ids=lambda one: one[0]
)
def test_a_job_that_cannot_be_saved_goes_on_from_its_journal(
    command: tuple[str, ...], beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *options = command
    job = (name, "mine_for_tests:both", beside / "out", *options, "--resume", beside / "journal")

    def fails(*_: object, **__: object) -> None:
        raise CheckpointError(beside / "out", "could not be written: the disk is full", "free space")

    with monkeypatch.context() as context:
        context.setattr("bisparse.checkpoint.save", fails)
        assert invoke(*job)[0] == 1
    done = len(list((beside / "journal").glob("done-*")))
    assert done == 2

    def again(*_: object) -> None:
        raise AssertionError("nothing is left to be pruned")

    with monkeypatch.context() as context:
        context.setattr("bisparse.pruning.job.prune_layer", again)
        code, report = invoke(*job)
    assert code == 0 and len(report["layers"]) == done
    assert (beside / "out" / "bisparse.json").exists() and not (beside / "journal").exists()


@pytest.mark.parametrize(
    "command", [("prune", "-p", "2:4", "--method", "adaprune"), ("convert", "--to", "2:4")], ids=lambda one: one[0]
)
def test_a_target_that_cannot_be_written_is_refused_before_the_model_is_built(command: tuple[str, ...], beside: Path) -> None:
    (beside / "file").write_text("")
    name, *options = command
    code, report = invoke(name, "no_such_module:both", beside / "file" / "out", *options)
    assert code == 1 and "is a file, where a folder is needed" in report["error"]


def test_the_journals_of_ranks_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for rank in range(2):
        Journal(tmp_path / "j" / f"rank-{rank}-of-2", {"what": 1}, keep=True).close(remove=False)
    (tmp_path / "j" / "thesis.tex").write_text("years of work")
    remove_journal(tmp_path / "j")
    assert [path.name for path in (tmp_path / "j").iterdir()] == ["thesis.tex"]
    (tmp_path / "j" / "thesis.tex").unlink()
    remove_journal(tmp_path / "j")
    remove_journal(tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_a_dry_run_with_data_shows_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model")
    text = tmp_path / "text.txt"
    chat = tmp_path / "more.jsonl"
    chat.write_text("\n".join(json.dumps({"body": "w1 w2 w3 w4"}) for _ in range(200)))
    before = sorted(tmp_path.rglob("*"))
    options = ["-p", "2:4", "--method", "adaprune", "--calibration", text, "--calibration", chat, "--text-field", "body"]
    options += ["--sequences", "12", "--length", "32", "--dry-run"]
    code, plan = invoke("prune", folder, *options)
    assert code == 0 and plan["dry_run"] and plan["method"] == "adaprune"
    assert len(plan["layers"]) == 14 and {one["pattern"] for one in plan["layers"]} == {"2:4"}
    assert {one["name"] for one in plan["left_dense"]} >= {"lm_head"}
    data = plan["calibration"]
    assert (data["sequences"], data["tokens"]) == (12, 12 * 32) and [one["sequences"] for one in data["files"]] == [6, 6]
    assert {"model.safetensors", "bisparse.json", "tokenizer.json", "README.md"} <= set(plan["files"])
    shown = " ".join(CliRunner().invoke(app, [str(one) for one in ("prune", folder, *options)]).output.split())
    assert "12 sequences, 384 tokens" in shown and "Nothing was written." in shown
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for target in (tmp_path / "out", folder):
        code, refused_plan = invoke("prune", folder, target, *options)
        assert code == 1 and "error" in refused_plan


def test_a_model_that_brings_code_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model")
    described(folder, model_type="of_mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    code, said = invoke("prune", folder, tmp_path / "out", "--method", "wanda")
    assert code == 2 and "custom code" in said["error"] and not Path("ran").exists()


def test_the_command_that_a_quantised_folder_names_works_and_such_folders_can_be_replaced(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    for source, out in (("model", "dense out"), ("pruned", "sparse out")):
        if source == "pruned":
            assert run("prune", tmp_path / "model", tmp_path / source, "-p", "2:4").exit_code == 0
        done = run("quantize", tmp_path / source, tmp_path / out, "--scheme", "int8")
        assert done.exit_code == 0, done.output
        command = shlex.split(re.search(r"it: bisparse (.*)", done.stdout)[1])
        assert command[0] == ("info" if source == "model" else "verify") and run(*command).exit_code == 0
    replaced = run("convert", tmp_path / "model", tmp_path / "dense out", "--to-dense", "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    assert not (tmp_path / "dense out" / "bisparse-quantization.json").exists()


def run(*given: object) -> object:
    return CliRunner().invoke(app, [str(one) for one in given])
