"""Every example runs, is short enough to copy, and says what it does."""

import ast
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bisparse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def run(name: str, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_example_can_be_copied(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 80
    assert ast.get_docstring(ast.parse(text)), "an example begins with what it does"
    private = [
        node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and "._" in f".{node.module or ''}"
    ]
    assert not private


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    programs = "".join(path.read_text() for path in PROGRAMS)
    unused = [path.name for path in PROGRAMS if path.name not in tests and f"from {path.stem} import" not in programs]
    assert not unused, f"no test runs {unused}"


def test_prove_a_mask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("prove_a_mask.py", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.startswith("1024 tiles: each mask keeps exactly what no mask can exceed\n")


def test_the_proof_in_the_example_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(bisparse.solvers.Exact):
        """Moves one kept weight: still feasible, no longer the best."""

        def solve_matrix(self, scores, n, m, warm_start=None):  # type: ignore[no-untyped-def]
            mask, certificate = super().solve_matrix(scores, n, m, warm_start)
            mask[tuple(mask.nonzero()[0])] = False
            return mask, certificate

    honest = bisparse.solve
    monkeypatch.setattr(bisparse, "solve", lambda scores, pattern: honest(scores, pattern, Liar()))
    with pytest.raises(AssertionError, match="not proved"):
        run("prove_a_mask.py", monkeypatch=monkeypatch)


def test_prune_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("prune_a_model.py", "2:4-T", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "encoder.self_attn.in_proj_weight" in printed
    assert "dense: output head" in printed
    assert "6 layers (" in printed and "of all parameters) pruned to 2:4-T by magnitude" in printed


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sentence encoder and a set of judged documents in the form of the demo's, but small enough to make."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    root = tmp_path_factory.mktemp("demo")
    words = ["hill", "river", "vote", "party", "rain", "storm"]
    lee50 = root / "lee50"
    lee50.mkdir()
    generator = np.random.default_rng(0)
    documents = [" ".join(generator.choice(words, 12)) for _ in range(50)]
    (lee50 / "lee.cor").write_text("\n".join(documents) + "\n", encoding="latin-1")
    others = [" ".join(generator.choice(words, 12)) for _ in range(60)]
    (lee50 / "lee_background.cor").write_text("\n".join(others) + "\n", encoding="latin-1")
    np.savetxt(lee50 / "similarities0-1.txt", np.triu(generator.random((50, 50))))

    vocabulary = root / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=11, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    BertModel(config).save_pretrained(root / "model")
    BertTokenizerFast(str(vocabulary)).save_pretrained(root / "model")
    return root / "model", lee50


@pytest.mark.transformers
def test_demo(
    small_world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run("demo.py", *small_world, tmp_path / "out", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "/report.html" in printed.replace("\n", "")
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000

    dense = load_file(small_world[0] / "model.safetensors")
    shares = {}
    for method, pattern in (
        ("magnitude", "2:4"),
        *((method, pattern) for method in ("magnitude", "with data") for pattern in ("2:4-T", "4:8-T", "16:32-T")),
    ):
        (line,) = [line for line in printed.splitlines() if f" {pattern} " in line and f" {method} " in line]
        _, _, agreement, cosine, on_w, on_both, gap = [cell.strip() for cell in line.split("│")[1:-1]]
        # The demo's claims, recomputed from the file it left.
        folder = f"model-{pattern.replace(':', '-')}-{method.replace(' ', '-')}"
        weights = load_file(tmp_path / "out" / folder / "model.safetensors")
        pruned = [name for name in dense if not torch.equal(dense[name], weights[name]) and weights[name].ndim == 2]
        assert len(pruned) == 6 and -1 <= float(agreement) <= 1 and float(cosine) <= 1
        kept = sum(float(dense[n][weights[n] != 0].abs().sum()) for n in pruned)
        shares[method, pattern] = kept / sum(float(dense[n].abs().sum()) for n in pruned)
        assert float(gap) < 1e-6
        assert (on_w, on_both) == ("holds", "does not" if pattern == "2:4" else "holds")
        both_ways = pattern.removesuffix("-T") + "-T"
        assert all(bool(bisparse.verify(weights[name], both_ways)) for name in pruned) == (on_both == "holds")
    own = [shares["magnitude", pattern] for pattern in ("2:4-T", "4:8-T", "16:32-T")]
    assert own == sorted(own) and all(
        shares["with data", pattern] < shares["magnitude", pattern] for _, pattern in shares if pattern != "2:4"
    )
    assert "Agreement with people goes from" in printed and "sentences per second" in printed


@pytest.mark.transformers
def test_decode(
    small_world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertTokenizerFast, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    BertTokenizerFast.from_pretrained(small_world[0]).save_pretrained(tmp_path / "model")
    threads = torch.get_num_threads()
    try:
        run("decode.py", tmp_path / "model", "4:8-T", "5", "1", monkeypatch=monkeypatch)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "7 layers (" in printed and "pruned to 4:8-T by magnitude" in printed
    assert " of 5 tokens are the dense model's" in printed and printed.count(" tokens/s, ") == 2
    assert "the head stays dense" in printed


@pytest.mark.transformers
def test_verify_a_checkpoint(
    small_world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            run("verify_a_checkpoint.py", *arguments, monkeypatch=monkeypatch)
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().out

    bisparse.prune_checkpoint(small_world[0], tmp_path / "pruned", "2:4-T")
    code, printed = outcome(tmp_path / "pruned")
    assert code == 0 and "2:4-T holds on" in printed and "BROKEN" not in printed
    code, printed = outcome(tmp_path / "pruned", "1:4")
    assert code == 1 and printed.count("BROKEN") == 7
    code, printed = outcome(small_world[0])
    assert code == 0 and "no pattern" in printed
    for arguments in ((), (small_world[0], "2:4", "4:8")):
        with pytest.raises(SystemExit, match=r"verify_a_checkpoint\.py FOLDER \[PATTERN\]"):
            run("verify_a_checkpoint.py", *arguments, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_readme_shows_what_the_demo_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = EXAMPLES.parent / ".cache" / "assets"
    if not (assets / "lee50").exists():
        pytest.skip("the demo's model and documents are not there; `make demo` fetches them")
    monkeypatch.setenv("COLUMNS", "80")
    run("demo.py", assets / "all-MiniLM-L6-v2", assets / "lee50", tmp_path, monkeypatch=monkeypatch)

    # Neither times, nor the last bits of a gap; ALPS is sensitive to rounding, which another processor may do otherwise.
    def rows(text: str) -> list[list[str]]:
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
        return [row[:6] if row[1] != "with data" else row[:2] + row[4:6] for row in cells]

    readme = (EXAMPLES.parent / "README.md").read_text()
    shown = rows((tmp_path / "summary.txt").read_text())
    assert len(shown) == 8 and rows(readme) == shown
