"""`bisparse eval` and `prune --eval`: a transformers folder, arrays, and options that measure nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bisparse.checkpoint import read_sidecar
from bisparse.cli import app
from bisparse.evaluation import perplexity

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers


def invoke(*arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout)


def expected(folder: Path, **settings: int) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return perplexity(model, torch.tensor([7 * i % 61 for i in range(2000)]), **settings).perplexity


@pytest.mark.parametrize("method", [(), ("--method", "wanda", "--calibration", "text.txt", "--sequences", "8", "--length", "32")])
def test_pruning_measures_before_and_after_and_records_both(method: tuple[str, ...], folder: Path) -> None:
    text, out = folder.parent / "text.txt", folder.parent / "out"
    options = [text if one == "text.txt" else one for one in method]
    code, _ = invoke("prune", folder, out, "-p", "2:4", *options, "--eval", text, "--eval-tokens", "1100")
    assert code == 0
    before, after = read_sidecar(out).evaluation
    assert (before["when"], after["when"], after["corpus"], after["tokens"]) == ("before", "after", "text.txt", 1024)
    assert before["perplexity"] == pytest.approx(expected(folder, tokens=1100), rel=1e-4)
    assert after["perplexity"] == pytest.approx(expected(out, tokens=1100), rel=1e-4) != before["perplexity"]
    assert f"{after['perplexity']:.4g}" in (out / "README.md").read_text()


def test_eval_states_its_protocol_and_records_on_request(folder: Path) -> None:
    text, out = folder.parent / "text.txt", folder.parent / "out"
    code, said = invoke("eval", folder, "--text", text, "--context", "16", "--stride", "4", "--tokens", "100")
    (figure,) = said["figures"]
    assert code == 0 and (figure["context"], figure["stride"], figure["tokens"], figure["dtype"]) == (16, 4, 100, "float32")
    assert figure["perplexity"] == pytest.approx(expected(folder, context=16, stride=4, tokens=100), rel=1e-4)
    code, said = invoke("eval", folder, "--text", text, "--record")
    assert code == 2 and "bisparse.json" in said["error"]
    assert invoke("prune", folder, out, "-p", "4:8")[0] == 0
    assert invoke("eval", out, "--text", text, "--record")[0] == 0
    (figure,) = read_sidecar(out).evaluation
    assert figure["when"] == "after" and figure["perplexity"] == pytest.approx(expected(out), rel=1e-4)


def test_eval_of_a_classifier_against_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classifiers_for_tests.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def one():\n    torch.manual_seed(0)\n    return nn.Linear(6, 3)\n"
        "def other():\n    torch.manual_seed(1)\n    return nn.Linear(6, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import classifiers_for_tests

    images = np.random.default_rng(0).normal(size=(40, 6))
    classes = [
        torch.from_numpy(images).float() @ model.weight.T + model.bias
        for model in (classifiers_for_tests.one(), classifiers_for_tests.other())
    ]
    first, second = (one.argmax(1).numpy() for one in classes)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", second)
    code, said = invoke(
        "eval", "classifiers_for_tests:one", "--images", tmp_path / "x.npy", "--labels", tmp_path / "y.npy",
        "--against", "classifiers_for_tests:other",
    )  # fmt: skip
    assert code == 0
    assert [one.get("accuracy", one.get("agreement")) for one in said["figures"]] == [float((first == second).mean())] * 2


def test_a_model_of_few_positions_is_measured_with_these_and_says_so_where_more_are_asked_for(folder: Path) -> None:
    text, out = folder.parent / "text.txt", folder.parent / "out"
    config = transformers.GPT2Config(vocab_size=64, n_positions=24, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    code, _ = invoke("prune", folder, out, "-p", "2:4", "--eval", text)
    assert code == 0
    before, after = read_sidecar(out).evaluation
    assert (before["context"], before["stride"]) == (after["context"], after["stride"]) == (24, 24)
    for options in (
        ["eval", folder, "--text", text, "--context", 25],
        ["prune", folder, folder.parent / "other", "--method", "wanda", "--calibration", text],
        ["quantize", folder, folder.parent / "other", "--method", "gptq", "--calibration", text],
    ):
        code, content = invoke(*options)
        assert code == 2 and "has only 24 positions; pass" in content["error"]
    assert not (folder.parent / "other").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to measure"),
        (["--pairs", "text.txt", "--tokens", "8"], "--text"),
        (["--images", "text.txt"], "--labels, --against"),
        (["--images", "text.txt", "--labels", "text.txt"], "not a .npy file"),
        (["--text", "text.txt", "--stride", "600"], "more than the context"),
        (["--text", "text.txt", "--tokens", "100"], "fewer than one window"),
        (["--pairs", "text.txt", "--context", "8"], "--text"),
        (["--tasks", "arc_easy"], "pip install lm-eval"),
    ],
)
def test_options_that_measure_nothing_are_refused(
    options: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, content = invoke("eval", folder, *(folder.parent / one if one.endswith(".txt") else one for one in options))
    assert code == 2 and said in content["error"]


def test_prune_refuses_an_evaluation_that_it_cannot_make_before_it_begins(folder: Path) -> None:
    text, out = folder.parent / "text.txt", folder.parent / "out"
    for options, said in (
        (["--dry-run", "--eval", text], "--dry-run"),
        ([out, "--eval-tokens", 600], "requires --eval"),
        ([out, "--eval", text, "--eval-tokens", 100], "fewer than one window"),
    ):
        code, content = invoke("prune", folder, *options)
        assert code == 2 and said in content["error"] and not out.exists()
    code, content = invoke("prune", "no_module:f", out, "--method", "wanda", "--eval", text)
    assert code == 2 and "transformers model" in content["error"]
