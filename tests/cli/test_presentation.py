"""What is printed: short tables in the order of their numbers, names that break at dots, help in panels, objects in a line."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import bisparse
from bisparse.accelerate import accelerate_, advise
from bisparse.cli import app
from bisparse.cli.tables import SHOWN, natural, print_table, table
from bisparse.quantization import quantize_


def shown(*arguments: object) -> str:
    """What a command prints on standard output and standard error."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return result.output


def written(state: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return folder


def test_verify_of_a_dense_model_is_a_row_for_each_kind_of_layer_in_their_order(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.{kind}" for i in range(40) for kind in ("up_proj", "down_proj")]
    folder = written({f"{name}.weight": torch.randn(8, 8) for name in names}, tmp_path / "m")
    rows = [line for line in shown("verify", folder, "-p", "2:4").splitlines() if line.startswith("model.")]
    assert sorted(row.split()[0] for row in rows) == ["model.layers.*.mlp.down_proj", "model.layers.*.mlp.up_proj"]
    for row in rows:
        assert row.split()[1] == "40" and "640" in row and "model.layers.0.mlp." in row
    assert len(json.loads(CliRunner().invoke(app, ["verify", str(folder), "-p", "2:4", "--json"]).stdout)["layers"]) == 80


def test_a_long_list_is_cut_with_a_count_and_the_place_of_the_rest(tmp_path: Path) -> None:
    names = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}_proj" for i in range(SHOWN + 15)]
    folder = written({f"{name}.weight": torch.randn(8, 8) for name in names}, tmp_path / "m")
    for command in (("verify", folder, "-p", "2:4"), ("info", folder), ("prune", folder, "-p", "2:4", "--dry-run")):
        text = shown(*command)
        assert sum(line.split()[0] in names for line in text.splitlines() if line.strip()) == SHOWN, text
        assert "... and 15 more rows; --json lists all layers." in text


def test_names_sort_by_their_numbers() -> None:
    names = [f"h.{i}.{kind}" for i in (0, 2, 10, 100) for kind in ("a", "b2", "b10")]
    assert sorted(reversed(names), key=natural) == names


@pytest.mark.parametrize("width", [40, 60, 80])
def test_names_break_at_their_dots_and_no_cell_is_lost(width: int) -> None:
    name, why = "model.language_model.encoder.layers.3.block_sparse_moe.experts.w1", "its zeros cannot be read from a packed file"
    console = Console(width=width, record=True)
    console.print(table(("not checked", " n", "why"), [(name, "12", why)]))
    lines = console.export_text().splitlines()[1:]
    column = next(number for number, one in enumerate(lines[0]) if lines[0][number:].startswith("12")) - 1
    parts = [line[:column].strip() for line in lines if line[:column].strip()]
    assert "".join(parts) == name
    if max(map(len, name.split("."))) + 1 <= column - 2:
        assert all(part.endswith(".") for part in parts[:-1])
    assert " ".join(" ".join(line[column + 3 :].split()) for line in lines).split() == why.split()


def test_a_name_is_no_markup_and_sends_no_escape_sequence() -> None:
    console = Console(width=80, record=True)
    print_table(console, ("layer",), [("[red]a.[/red]\x1b[2J",)])
    assert "[red]a.[/red]\\x1b[2J" in console.export_text()


def test_help_of_long_commands_is_in_panels_and_flags_have_no_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    for name, long in (("prune", True), ("convert", True), ("verify", False), ("doctor", False)):
        text = shown(name, "--help")
        assert "<bool>" not in text and "BOOLEAN" not in text
        assert all((f"─ {panel} ─" in text) == long for panel in ("What to prune", "How", "Calibration data")), text
    options = set(re.findall(r"--[a-z-]+", shown("prune", "--help")))
    assert {"--pattern", "--calibration", "--quantize", "--resume", "--json", "--layer-pattern"} <= options


@pytest.mark.parametrize(
    ("given", "meant"),
    [("2:4-t", "2:4-T"), ("2:4T", "2:4-T"), ("4:8_transposable", "4:8-T"), ("2/4", "2:4"), ("4:8-sequential", "4:8-seq"),
     ("4:8 pair", "4:8-paired"), ("0.5", "50%"), ("50", "50%")],
)  # fmt: skip
def test_a_misspelt_pattern_gets_a_suggestion_that_is_a_pattern(given: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'") as error:
        bisparse.solve(torch.rand(8, 8), given)
    assert str(bisparse.pattern.parse_pattern(meant)) == meant and given in str(error.value)
    assert f"did you mean '{meant}'" in " ".join(shown("verify", tmp_path, "-p", given).replace("│", " ").split())


@pytest.mark.parametrize("given", ["5:4-t", "2:4:8", "2:4-x", "", "nothing", "0", "150"])
def test_what_resembles_no_pattern_gets_no_suggestion(given: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(given))) as error:
        bisparse.solve(torch.rand(8, 8), given)
    assert "did you mean" not in str(error.value)


def reports() -> list[tuple[Any, int]]:
    """Each report on a model of layers, with how many of them it has."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(30))).eval()
    pruned = bisparse.prune_(model, "2:4-T")
    quantized = quantize_(nn.Sequential(*(nn.Linear(64, 64) for _ in range(30))).eval(), "int8")
    advice = advise(model, tokens=8, training=False, device="cpu", backend="cpu")
    return [(pruned, 30), (quantized, 30), (advice, 30), (accelerate_(model, "reference"), 30)]


def test_reports_are_indexed_by_number_and_by_name_and_print_in_a_line() -> None:
    for report, count in reports():
        layers = list(report)
        assert len(layers) == len(report) == count
        for place in (0, 7, -1):
            assert report[place] is layers[place] and report[layers[place].name] is layers[place]
        for missing in ("70", "7.weights", True, None):
            with pytest.raises(KeyError, match="is no layer of the report"):
                report[missing]
        with pytest.raises(IndexError):
            report[count]
        assert max(len(str(report)), len(repr(report))) < 400


def test_objects_print_in_a_line_whatever_their_size() -> None:
    scores = torch.rand(64, 32)
    solution = bisparse.solve(scores, "2:4-T")
    assert str(solution) == f"2:4-T mask of 64 x 32: keeps {int(solution.mask.sum()):,} of 2,048 weights"
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(99)))
    broken = bisparse.verify(model, "2:4-T")
    assert str(broken) == broken.message and broken.message.startswith("12672 of 12672 groups break 2:4-T")
    for one in (solution, broken, bisparse.mask_diversity("2:4", (1024, 1024)), bisparse.mask_diversity("4:8-T", 64)):
        assert len(str(one)) < 200 and len(repr(one)) < 300 and "\n" not in f"{one}{one!r}"


def test_a_sidecar_and_a_plan_print_in_a_line(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(60)))
    bisparse.prune_(model, "2:4-T")
    sidecar = bisparse.save(model, tmp_path / "out", "2:4-T")
    for one in (sidecar, bisparse.checkpoint.plan_checkpoint(tmp_path / "out", "2:4")):
        assert len(repr(one)) < 600


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--model", "\x1b[2J", "--tokens", "64"),
        ("verify", "\x1b[2J", "-p", "2:4"),
        ("quantize", "model", "out", "--device", "\x1b[2J"),
        ("prune", "model", "out", "-p", "2:4", "--calibration", "\x1b[2J"),
        ("\x1b[2J",),
        ("prune", "model", "out", "--no\x1b[2J"),
    ],
)
def test_what_was_given_is_quoted_without_escape_sequences(arguments: tuple[str, ...]) -> None:
    from bisparse.cli import app

    shown = CliRunner().invoke(app, list(arguments))
    assert shown.exit_code == 2 and "\x1b[2J" not in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prune", "model", "", "-p", "2:4"), "Invalid value for target: it is empty"),
        (("prune", "", "out", "-p", "2:4"), "Invalid value for source: it is empty"),
        (("prune", "model", "out", "-p", "2:4", "--resume", ""), "Invalid value for --resume: it is empty"),
        (("eval", "", "--tasks", "piqa"), "Invalid value for model: it is empty"),
        (("report", "model", "-o", ""), "Invalid value for --output"),
        (("verify", "model", "--threads", "99999"), "Invalid value for --threads"),
    ],
)
def test_values_that_no_command_can_use_are_refused_by_the_name_of_the_option(arguments: tuple[str, ...], said: str) -> None:
    shown = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert shown.exit_code == 2 and said in json.loads(shown.stdout)["error"].replace("'", "")


def test_json_has_null_for_numbers_that_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    from bisparse.cli.console import print_json

    content = {"nan": float("nan"), "inner": [(float("inf"), 1.5)], "path": Path("a"), "array": np.float64("-inf")}
    print_json(content)
    found = json.loads(capsys.readouterr().out, parse_constant=lambda said: pytest.fail(f"{said} is no JSON"))
    assert found == {"nan": None, "inner": [[None, 1.5]], "path": "a", "array": None}


def test_the_command_that_checks_a_folder_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    source, out = written({"a.weight": torch.randn(16, 16)}, tmp_path / "dense"), tmp_path / "it's a (2:4) $model"
    said = shown("prune", source, out, "-p", "2:4").partition("Check it: ")[2]
    assert shlex.split(said) == ["bisparse", "verify", str(out)]
