"""`bisparse prune --budget`: from a function of yours to a folder that verifies, and options that do not go together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bisparse.checkpoint import read_sidecar
from bisparse.cli import app

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
PATTERNS = ("-p", "2:4-T", "-p", "4:8-T", "-p", "6:8-T", "-p", "dense")


def invoke(*arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)
    (tmp_path / "budgets_for_tests.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def both():\n    torch.manual_seed(0)\n    sides = (16, 32, 32, 16)\n"
        "    layers = [nn.Linear(i, o) for i, o in zip(sides, sides[1:])]\n"
        "    return nn.Sequential(*layers), [torch.randn(32, 16) for _ in range(5)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", ["magnitude", "adaprune"])
def test_a_budget_gives_a_folder_of_several_patterns_that_verifies(method: str, tmp_path: Path) -> None:
    code, said = invoke("prune", "budgets_for_tests:both", "out", "--budget", "60%", *PATTERNS, "--method", method, "-i", "*")
    assert code == 0
    used = {layer["pattern"] for layer in said["layers"]}
    kept = sum(layer["density"] * layer["shape"][0] * layer["shape"][1] for layer in said["layers"])
    dense = {one["name"] for one in said["left_dense"]}
    total = kept + sum({"0": 512, "1": 1024, "2": 512}[name] for name in dense)
    assert total <= 0.6 * 2048 and used <= {"2:4-T", "4:8-T", "6:8-T"}
    assert {layer.pattern for layer in read_sidecar(tmp_path / "out").report} == used
    code, said = invoke("verify", "out")
    assert code == 0 and said["ok"]


@pytest.mark.parametrize(
    "command",
    [("prune", "--budget", "60%", *PATTERNS), ("quantize", "-s", "int8")],
    ids=["budget", "quantize"],
)
def test_a_model_without_tokenizer_needs_none_where_no_text_is_read(command: tuple[str, ...], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES)).save_pretrained("model")
    verb, *options = command
    code, said = invoke(verb, "model", "out", *options)
    assert code == 0 and said["ok"] and (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_without_tokenizer_and_a_method_that_needs_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES)).save_pretrained("model")
    code, said = invoke("prune", "model", "out", "-p", "2:4", "--method", "wanda")
    assert code == 2 and "needs calibration data" in str(said) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (PATTERNS, "several patterns need --budget"),
        (("--budget", "50%"), "needs patterns to choose from"),
        (("--budget", "50%", "-p", "dense"), "needs patterns to choose from"),
        (("--budget", "half", "-p", "2:4"), "percentage of the weights"),
        (("--budget", "150%", "-p", "2:4"), "at most 1"),
        (("--budget", "50%", "-p", "2:4", "--layer-pattern", "0=2:4"), "does not work with --budget"),
        (("--budget", "50%", "-p", "5:4"), "5:4"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: tuple[str, ...], said: str) -> None:
    code, content = invoke("prune", "budgets_for_tests:both", "out", *options)
    assert code == 2 and said in content["error"] and not Path("out").exists()
