"""The command line: exit codes, JSON that is only JSON, messages without tracebacks, and what a user sees."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import bisparse
from bisparse.accelerate import advisor
from bisparse.checkpoint import CheckpointError
from bisparse.cli import app
from bisparse.progress_lines import ProgressLines
from bisparse.report import write_report
from forked import exit_code, in_child, start_command

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals")


def run(*arguments: object) -> Result:
    """A command in this process. An exception that is no exit would be a traceback to the user: let it fail the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: object) -> tuple[int, dict[str, object]]:
    """A command with --json: standard output must be one JSON document."""
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # What `bench` says here is what it says on a machine without one, also where there is one, and where grids were measured.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(advisor, "stored_grids", dict)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkpoint; commands in this process do not wait for the disk."""
    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)
    folder = tmp_path / "model"
    folder.mkdir()
    state = {f"layers.{i}.{name}.weight": torch.randn(16, 24) for i in range(3) for name in ("up", "down")}
    save_file({**state, "wte.weight": torch.randn(8, 16), "norm.weight": torch.randn(16)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


# ---- prune and verify


def test_verify_says_what_it_did_not_check(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    sparse = weight * bisparse.solve(weight.abs(), "2:4").mask
    (tmp_path / "m").mkdir()

    def write(state: dict[str, torch.Tensor]) -> None:
        save_file(state, tmp_path / "m" / "model.safetensors")

    packed = {"p.weight": torch.zeros(16, 8, dtype=torch.uint8), "lm_head.weight": weight}
    write({"q.weight": sparse, **packed})
    shown = run("verify", tmp_path / "m", "-p", "2:4")
    assert shown.exit_code == 0
    for text in ("2:4 holds on W of 1 of 2 layers", "1 of 2 layers were not checked", "p ", "U8"):
        assert text in shown.stdout
    for options, code, ok in (([], 0, True), (["--strict"], 1, False), (["--strict", "--exclude", "p"], 0, True)):
        found, content = run_json("verify", tmp_path / "m", "-p", "2:4", *options)
        assert (found, content["ok"]) == (code, ok) and content["checked"] == ["q"]
        assert [one["name"] for one in content["unchecked"]] == ([] if "--exclude" in options else ["p"])
        assert "lm_head" in [one["name"] for one in content["left_out"]]
    write({"q.weight": sparse, "o.weight": weight.to(torch.float8_e4m3fn)})
    shown = run("verify", tmp_path / "m", "-p", "2:4")
    assert shown.exit_code == 1 and "is broken in 1 of 2 layers" in shown.stdout and "holds" not in shown.stdout
    write(packed)
    shown = run("verify", tmp_path / "m", "-p", "2:4")
    assert shown.exit_code == 1 and "No layer was checked" in shown.stdout and "holds" not in shown.stdout
    code, content = run_json("verify", tmp_path / "m", "-p", "2:4")
    assert code == 1 and not content["ok"] and content["checked"] == []


def test_info_of_weights_that_cannot_be_pruned(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    state = {
        "q.weight": (weight * bisparse.solve(weight.abs(), "2:4").mask).to(torch.float8_e4m3fn),
        "small.weight": torch.randn(16, 16),
        "p.weight": torch.zeros(16, 8, dtype=torch.uint8),
    }
    (tmp_path / "m").mkdir()
    save_file(state, tmp_path / "m" / "model.safetensors")
    code, content = run_json("info", tmp_path / "m")
    found = {one["layer"]: one for one in content["layers"]}
    assert code == 0 and found["q"]["notable"] == ["2:4"] and found["q"]["dtype"] == "F8_E4M3"
    assert found["small"]["patterns"] == [] and found["small"]["too_large"] == [32, 64], "padding is no sparsity"
    assert [one["name"] for one in content["unchecked"]] == ["p"]
    shown = run("info", tmp_path / "m").stdout
    assert (
        "M from 32 on is not judged, since a side is shorter" in " ".join(shown.split())
        and "16:64" not in shown
        and "not examined" in shown
    )


@posix
def test_a_report_replaces_no_device_and_no_link(model: Path, tmp_path: Path) -> None:
    run("prune", model, tmp_path / "out", "-p", "2:4")
    (tmp_path / "page").write_text("<!doctype html>old")
    (tmp_path / "link").symlink_to("page")
    assert run("report", tmp_path / "out", "-o", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink() and "<html" in (tmp_path / "page").read_text()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in (os.devnull, tmp_path / "pipe", tmp_path / "folder"):
        refused = run("report", tmp_path / "out", "-o", name)
        assert refused.exit_code == 2 and "name" in refused.stderr
    assert not Path(os.devnull).is_file() and not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize("held", ["model.safetensors", "notes.txt", "empty"])
def test_a_report_replaces_only_web_pages(model: Path, tmp_path: Path, held: str) -> None:
    run("prune", model, tmp_path / "out", "-p", "2:4")
    target = tmp_path / held
    target.write_bytes({"model.safetensors": (model / "model.safetensors").read_bytes(), "empty": b""}.get(held, b"my notes"))
    before = target.read_bytes()
    written = run("report", tmp_path / "out", "-o", target)
    if held == "empty":
        assert written.exit_code == 0 and b"<html" in target.read_bytes()
        assert run("report", tmp_path / "out", "-o", target).exit_code == 0
    else:
        assert written.exit_code == 2 and "is not a web page" in written.stderr
        assert target.read_bytes() == before


def test_prune_then_verify(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned = run("prune", model, out, "--pattern", "4:8-T")
    assert pruned.exit_code == 0, pruned.output
    for text in ("layers.*.up", "layers.*.down", "wte", "looked up", "6 layers", "of |w| kept", f"bisparse verify {out}"):
        assert text in pruned.stdout
    checked = run("verify", out)
    assert checked.exit_code == 0 and "holds on W and W^T of all 6 layers" in checked.stdout
    assert bisparse.verify_checkpoint(out, "4:8-T")


def test_the_figures_of_prune_are_those_of_the_file(model: Path, tmp_path: Path) -> None:
    code, content = run_json("prune", model, tmp_path / "out", "-p", "2:4-T", "--layer-pattern", "*.down=1:4", "--threads", "1")
    assert code == 0 and content["ok"] is True
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert isinstance(content["layers"], list) and len(content["layers"]) == 6
    for layer in content["layers"]:
        weight, old = after[layer["parameter"]].double(), before[layer["parameter"]].double()
        assert layer["density"] == pytest.approx(float((weight != 0).double().mean()))
        assert layer["retained"] == pytest.approx(float(weight.abs().sum() / old.abs().sum()))
        assert layer["pattern"] == ("1:4" if "down" in layer["name"] else "2:4-T")
    assert content["retained"] == pytest.approx(sum(layer["retained"] for layer in content["layers"]) / 6)
    assert content["left_dense"] == [{"name": "wte", "reason": "embedding: looked up, not multiplied"}]


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    shown = run("prune", model, "--dry-run", "-x", "*.down")
    assert shown.exit_code == 0
    for text in ("layers.*.up", "excluded by the caller", "16 x 24", "Nothing was"):
        assert text in shown.stdout
    code, content = run_json("prune", model, tmp_path / "out", "--dry-run")
    assert code == 0 and isinstance(content["layers"], list) and len(content["layers"]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_violation_is_exit_code_1_and_says_where(model: Path, tmp_path: Path) -> None:
    run("prune", model, tmp_path / "out", "-p", "4:8-T")
    state = load_file(tmp_path / "out" / "model.safetensors")
    weight = state["layers.1.up.weight"]
    weight[9, 16:24] = 1.0
    save_file(state, tmp_path / "out" / "model.safetensors")
    broken = run("verify", tmp_path / "out")
    assert broken.exit_code == 1
    assert re.search(r"layers\.1\.up +1 +4:8-T +\d+ +96 +W, row 9, columns 16 to 23: keeps 8", broken.stdout)
    assert "broken in 1 of 6 layers" in broken.stdout
    code, content = run_json("verify", tmp_path / "out")
    assert code == 1 and content["ok"] is False
    assert isinstance(content["layers"], list)
    (layer,) = [one for one in content["layers"] if not one["ok"]]
    expected = {"side": "W", "matrix": 0, "row": 9, "group": 2, "kept": 8, "layer": "layers.1.up", "columns": [16, 23]}
    assert layer["name"] == "layers.1.up" and layer["first"] == expected


def test_verify_takes_checkpoints_of_others(model: Path) -> None:
    assert run("verify", model, "-p", "2:4").exit_code == 1
    assert run("verify", model, "-p", "24:24").exit_code == 0
    result = run("verify", model)
    assert result.exit_code == 2 and "--pattern" in result.stderr


# ---- info, bench, report


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "4:8-seq", "4:8-paired", "50%"])
def test_info_of_a_pattern(pattern: str) -> None:
    shown = run("info", pattern, "--size", "64")
    assert shown.exit_code == 0 and pattern in shown.stdout
    code, content = run_json("info", pattern, "--size", "8x8")
    assert code == 0 and isinstance(content["masks"], dict)
    assert content["masks"]["exact"]["log2"] == pytest.approx(bisparse.mask_diversity(pattern, 64).log2)
    assert content["masks"]["paper"]["log2"] == pytest.approx(bisparse.mask_diversity(pattern, 64, method="paper").log2)


def test_info_shows_the_figures_of_the_paper() -> None:
    shown = run("info", "4:8-T", "--size", "64").stdout
    for text in ("1.170e+11", "1.756e+13", "4 of 5:1", "2 of 3", "at most 0.5"):
        assert text in shown


def test_info_of_a_checkpoint_finds_its_patterns(model: Path, tmp_path: Path) -> None:
    run("prune", model, tmp_path / "out", "-p", "2:4-T", "--layer-pattern", "*.down=4:8")
    shown = run("info", tmp_path / "out").stdout
    assert re.search(r"layers\.\*\.up +3 +16 x 24 +F32 +[\d.]+ +2:4-T", shown)
    code, content = run_json("info", tmp_path / "out")
    assert code == 0 and isinstance(content["layers"], list)
    for layer in content["layers"]:
        assert ("2:4-T" if "up" in layer["layer"] else "4:8") in layer["patterns"]


def test_bench_without_a_gpu_says_so_and_gives_what_is_exact() -> None:
    code, content = run_json("bench", "--model", "4096x14336", "--tokens", "16384")
    assert code == 0 and content["source"] == "exact" and content["speedup"] is None
    (layer,) = content["layers"]
    assert layer["convert"] is None and layer["timing"] is None and layer["forward_flops"] == 2 * 16384 * 4096 * 14336
    shown = run("bench", "-m", "4096x14336", "--inference").stdout
    assert shown.startswith("No times are known: torch sees no CUDA device here, and no grid of measured times is stored")
    assert "117.44 -> 66.06" in shown and "not known" in shown


def test_bench_of_a_checkpoint_tells_what_could_run_sparse_and_why_not(model: Path, tmp_path: Path) -> None:
    code, content = run_json("bench", "-m", model, "--backend", "reference", "--tokens", "8")
    assert code == 0 and content["source"] == "measured"
    assert all(one["convert"] is False and "its weight is dense" in one["reason"] for one in content["layers"])
    assert {one["name"] for one in content["left_dense"]} == {"wte"}
    run("prune", model, tmp_path / "out", "-p", "2:4-T", "--layer-pattern", "*.down=4:8")
    code, content = run_json("bench", "-m", tmp_path / "out", "--backend", "reference", "--tokens", "8")
    for layer in content["layers"]:
        if "up" in layer["name"]:
            assert layer["timing"]["sparse"]["forward_ms"] > 0 and layer["backend"] == "reference"
        else:
            assert re.search(r"not 2:4: row \d+, columns \d+ to \d+", layer["reason"])
    shown = run("bench", "-m", model, "-p", "4:8-T").stdout
    assert "4:8-T does not run on sparse tensor cores" in shown and "layers.*.up" in shown


def test_bench_predicts_from_a_grid(tmp_path: Path) -> None:
    times = {"forward_ms": 4.0, "backward_ms": 8.0, "peak_bytes": None}
    timing = {"dense": times, "sparse": {"forward_ms": 3.0, "backward_ms": 6.0, "peak_bytes": None}}
    point = {"out_features": 512, "in_features": 512, "tokens": 64, "backend": "cusparselt", "training": True, "both_ways": True}
    grid = {"format": 1, "device": "A GPU", "dtype": "bfloat16", "about": {}, "points": [{**point, "timing": timing}]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    shown = run("bench", "-m", "512x512", "-n", "64", "--grid", tmp_path / "grid.json").stdout
    assert shown.startswith("Predicted on A GPU: 64 tokens") and "sparse, cusparselt: 1.33x faster" in shown
    assert "4.000 + 8.000" in shown and "3.000 + 6.000" in shown
    outside = run("bench", "-m", "512x1024", "-n", "64", "--grid", tmp_path / "grid.json").stdout
    assert "not known" in outside and "0 of 1 layers win" in outside


def test_bench_measures_this_processor_and_predicts_others() -> None:
    code, content = run_json("bench", "-m", "64x64", "-n", "4", "--inference", "-p", "4:8-T")
    assert code == 0 and [one["device"] for one in content["predicted"]] == ["A100", "H100", "B200", "RTX4090", "RTX5080", "GB10"]
    if content["source"] == "measured":  # not where the processor has neither AVX-512 nor AVX2
        assert "this CPU" in content["device"] and content["layers"][0]["timing"]["dense"]["forward_ms"] > 0
    wide = run("bench", "-m", "64x64", "-n", "1", "--inference", "-p", "4:8-T", "--dtype", "float32").stdout
    assert re.search(r"Measured on this CPU with \d threads?: 1 token, float32, forward; medians\.", wide)
    assert "Predicted" not in wide and "win at 1 token on" in wide.replace("wins", "win"), "no GPU was measured in float32"
    refused = run("bench", "-m", "64x64", "--dtype", "float32", "--device-name", "A100")
    assert refused.exit_code == 2 and "float32" in refused.stderr
    shown = run("bench", "-m", "4096x4096", "-n", "8192", "--device-name", "rtx 4090").stdout
    assert "Predicted from public measurements of products (forward only" in shown and "RTX4090" in shown and "H100" not in shown
    assert "there are public times for A100" in run("bench", "-m", "64x64", "--device-name", "abacus").stderr


def test_doctor_says_what_works() -> None:
    code, content = run_json("doctor")
    assert code == 0 and content["works"] and content["versions"]["torch"] == torch.__version__
    assert set(content["backends"]["cpu"]) == {"cusparselt", "cutlass", "reference", "cpu"}
    assert set(content["processor"]["packed_products"]) == {"bfloat16", "float16", "float32"}
    shown = run("doctor").stdout
    assert "yes: a small matrix was solved" in shown and content["kernel_cache"]["folder"] in shown.replace("\n", "")


def test_bench_of_a_function_of_yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_bench_model.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(64, 64)\n")
    monkeypatch.chdir(tmp_path)
    code, content = run_json("bench", "-m", "own_bench_model:build", "-p", "2:4", "-n", "4", "--backend", "reference")
    assert code == 0 and content["layers"][0]["shape"] == [64, 64] and content["layers"][0]["timing"] is not None


def test_report_is_one_file_without_links(model: Path, tmp_path: Path) -> None:
    run("prune", model, tmp_path / "out", "-p", "4:8-T")
    code, content = run_json("report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert content["bytes"] == (tmp_path / "page.html").stat().st_size and "layers.0.up" in page
    assert content["holds"] is True and len(content["layers"]) == 6
    assert all(layer["holds"] and layer["fits"].endswith(":8-T") and layer["shape"] == [16, 24] for layer in content["layers"])
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


@pytest.mark.parametrize(
    "place", ["out/page.html", "out/model.safetensors", "model", "model/page.html", "link/page.html", "name"]
)
def test_a_page_never_goes_into_what_it_is_about(model: Path, tmp_path: Path, place: str) -> None:
    run("prune", model, tmp_path / "out", "-p", "2:4")
    (tmp_path / "link").symlink_to(model)
    os.link(tmp_path / "out" / "bisparse.json", tmp_path / "name")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, content = run_json("report", tmp_path / "out", "--against", model, "-o", tmp_path / place)
    assert code == 1 and "checkpoint" in str(content["error"])
    with pytest.raises(CheckpointError, match="checkpoint"):
        write_report(tmp_path / "out", tmp_path / place, model)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_report_of_broken_masks_is_written_and_is_exit_code_1(model: Path, tmp_path: Path) -> None:
    run("prune", model, tmp_path / "out", "-p", "4:8-T")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["layers.1.up.weight"][9, 16:24] = 1.0
    save_file(state, tmp_path / "out" / "model.safetensors")
    shown = run("report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert shown.exit_code == 1 and "layers.1.up: W, row 9, group 2 keeps 8" in (tmp_path / "page.html").read_text()
    assert "1 of 6 layers break their pattern, the first layers.1.up its 4:8-T" in shown.stderr
    code, content = run_json("report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert code == 1 and content["ok"] is False and content["holds"] is False


# ---- wrong use and failed jobs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "MODEL", "OUT", "-p", "5:4"], "5:4 does not exist"),
        (["prune", "MODEL", "OUT", "-p", "2:4-X"], "2:4-X"),
        (["prune", "MODEL"], "--dry-run"),
        (["prune", "MODEL", "OUT", "--remainder", "crop"], "pad, dense, error"),
        (["prune", "MODEL", "OUT", "--solver", "magic"], "two-approximation"),
        (["prune", "MODEL", "OUT", "--layer-pattern", "x"], "GLOB=PATTERN"),
        (["prune", "MODEL", "OUT", "--layer-pattern", "x=9:4"], "9:4"),
        (["prune", "MODEL", "OUT", "-i", "nothing"], "nothing"),
        (["prune", "MODEL", "OUT", "--threads", "0"], "--threads"),
        (["prune", "MODEL", "OUT", "-p", "1:64", "--remainder", "error"], "remainder"),
        (["info", "4:8-Q"], "4:8-Q"),
        (["info", "no/such/folder"], "does not exist"),
        (["info", "2:4", "--size", "0"], "4096x4096"),
        (["bench"], "--model"),
        (["bench", "-m", "nowhere"], "4096x14336"),
        (["bench", "-m", "64x64", "--backend", "magic"], "cusparselt"),
        (["bench", "-m", "64x64", "--backend", "cutlass"], "needs a CUDA device"),
        (["bench", "-m", "64x64", "--device", "cuda"], "no CUDA device"),
        (["bench", "-m", "64x64", "--device", "banana"], "'banana' cannot be used here: Expected one of cpu, cuda"),
        (["bench", "-m", "64x64", "--device", "cpu:-2"], "'cpu:-2' cannot be used here"),
        (["bench", "-m", "64x64", "--device", "meta"], "holds no numbers"),
        (["bench", "-m", "json:loads"], "json:loads is called without arguments, but takes"),
        (["bench", "-m", "builtins:dict"], "must return a model, or a model and its calibration batches, not dict"),
        (["bench", "-m", "64x64", "--dtype", "float64"], "float32"),
        (["bench", "-m", "64x64", "--tokens", "0"], "--tokens"),
        (["bench", "-m", "64x64", "--grid", "MODEL/config.json"], "not a grid of measured times"),
        (["prune", "nowhere", "OUT"], "nowhere: no such folder or file (it does not exist)"),
        (["prune", "nowhere", "--dry-run"], "nowhere does not exist"),
        (["prune", "nowhere", "OUT", "--method", "wanda"], "nowhere: no such folder or file"),
        (["convert", "nowhere", "OUT", "--to", "2:4"], "nowhere: no such folder or file"),
        (["verify", "nowhere", "-p", "2:4"], "nowhere does not exist"),
        (["bench", "-m", "64x64", "--grid", "nowhere"], "'nowhere' does not exist"),
        (["report", "nowhere"], "does not exist"),
        (["report", "MODEL"], "has no bisparse.json, so bisparse did not write it"),
        (["report", "MODEL/config.json"], "is a file"),
        (["report", "MODEL", "--against", "nowhere"], "does not exist"),
        (["fly"], "fly"),
    ],
)
def test_wrong_use_is_exit_code_2(model: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    given = [places.get(one, one).replace("MODEL/", f"{model}/") for one in arguments]
    code, content = run_json(*given)
    assert code == content["exit_code"] == 2 and content["ok"] is False and words in str(content["error"])
    result = run(*given)
    assert result.exit_code == 2
    assert words in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert not (tmp_path / "out").exists() and result.stdout == ""


def test_failed_jobs_are_exit_code_1(model: Path, tmp_path: Path) -> None:
    def failed(words: str, *arguments: object) -> None:
        result = run(*arguments)
        assert result.exit_code == 1 and result.stdout == ""
        assert words in result.stderr and result.stderr.startswith("bisparse: ") and result.stderr.count("\n") == 1
        code, content = run_json(*arguments)
        assert code == 1 and content["ok"] is False and words in str(content["error"])

    out = tmp_path / "out"
    run("prune", model, out)
    failed("exists already", "prune", model, out)
    failed("is inside the source", "prune", model, model / "inside")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    for command in (["prune", model, tmp_path / "new"], ["verify", model, "-p", "2:4"], ["info", model], ["bench", "-m", model]):
        failed("truncated", *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# ---- as a process


def test_help_and_version_do_not_wait_for_torch() -> None:
    script = """
import sys, bisparse.__main__
for sys.argv in (["bisparse", "--version"], ["bisparse", "prune", "--help"], ["bisparse", "prune"]):
    try:
        bisparse.__main__.main()
    except SystemExit as stop:
        print(f"exit {stop.code}, torch {'torch' in sys.modules}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"bisparse {version('bisparse')}"
    assert [line for line in lines if line.startswith("exit")] == [
        "exit 0, torch False",
        "exit 0, torch False",
        "exit 2, torch False",
    ]


def test_without_its_extra_the_command_line_says_what_to_install() -> None:
    hide = (
        "import importlib.util as u, sys\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('typer', 'rich') else find(name, *a)\n"
        "from bisparse.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", hide, "prune"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install '.[cli]'" in done.stderr and "Traceback" not in done.stderr


@posix
@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "terminate"],
)
def test_stopped_by_a_signal_nothing_is_left(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "model").mkdir()
    save_file({f"l{i}.weight": torch.randn(512, 512) for i in range(120)}, tmp_path / "model" / "model.safetensors")
    command = ["prune", tmp_path / "model", tmp_path / "out", "-p", "2:4", "--threads", "1"]

    def heed() -> None:  # a shell has its jobs in the background ignore ctrl-c, and they hand that on
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    with tempfile.TemporaryFile("w+") as log:
        job = start_command(*command, stdout=log.fileno(), stderr=log.fileno(), prepare=heed)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.bisparse-*/output/model.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(job, number)
        returned = exit_code(job)
        log.seek(0)
        errors = log.read()
    assert returned == code, errors
    assert "Traceback" not in errors
    assert f"bisparse: {'stopped by SIGTERM' if code == 143 else 'interrupted'}; nothing was left behind" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


BECOMES_ANOTHER_ERROR = """
import os, signal, typer
from bisparse.cli.console import command, run_app
signal.signal(signal.SIGINT, signal.default_int_handler)
app = typer.Typer()
@app.command()
@command
def job() -> None:
    try:
        os.kill(os.getpid(), {number})
        signal.pause()
    except BaseException:
        raise {error} from None
run_app(app)
"""


@posix
@pytest.mark.parametrize("error", ["OSError(9, 'Bad file descriptor')", "ValueError('could not determine the shape')"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminate"])
def test_a_signal_that_becomes_another_error_is_reported_as_the_signal(error: str, number: signal.Signals, code: int) -> None:
    program = BECOMES_ANOTHER_ERROR.format(error=error, number=int(number))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "interrupted" in done.stderr or "stopped by SIGTERM" in done.stderr


@posix
def test_a_terminal_sees_a_bar_with_an_eta(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    controller, terminal = pty.openpty()
    command = ["prune", model, tmp_path / "out", "-p", "2:4"]
    with (tmp_path / "said").open("w") as said:
        job = start_command(*command, stdout=said.fileno(), stderr=terminal)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error to its reader
        while piece := os.read(controller, 65536):
            seen += piece
    assert exit_code(job) == 0
    os.close(controller)
    assert b"eta" in seen and b"%" in seen


def test_a_folder_with_a_colon_in_its_name_is_a_folder(model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "m:1")
    assert run("prune", tmp_path / "m:1", tmp_path / "out", "-p", "2:4").exit_code == 0
    assert run("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("method", ["magnitude", "adaprune"])
def test_where_there_is_no_terminal_progress_is_lines_with_the_time(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"lined_{method}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn, ones\ndef both(): return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), [ones(8, 16)]"
    )
    save_file({"evil\x1b[31m\nname.weight": torch.randn(16, 16)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = "prune", "model.safetensors" if method == "magnitude" else f"{name}:both", "-p", "2:4", "--method", method
    done = run(*arguments[:2], "out", *arguments[2:])
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  [ \d]{3} %  [ -~]+", line) for line in lines), lines
    assert len(lines) >= 2 and lines[-1].endswith("100 %  " + ("done" if method == "magnitude" else "calibrating  done"))
    assert done.stderr.replace("\n", "").isprintable()
    if method == "magnitude":
        quiet = run(*arguments[:2], "out-json", *arguments[2:], "--json")
        assert quiet.exit_code == 0 and quiet.stderr == "" and json.loads(quiet.stdout)["ok"]
    else:
        with open("said", "w") as said, open("errors", "w") as errors:
            command = *arguments[:2], "out-json", *arguments[2:], "--json"
            job = start_command(*command, stdout=said.fileno(), stderr=errors.fileno())
            assert exit_code(job) == 0
        assert Path("errors").read_text() == "" and json.loads(Path("said").read_text())["ok"]


def test_lines_come_at_the_start_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = ProgressLines("checking")
    for done in range(101):
        now += 1
        lines(f"layer {done}", done, 100)
    lines("again", 100, 100)
    said = [line.split("  ", 1)[1].strip() for line in capsys.readouterr().err.splitlines()]
    assert said == [*(f"{at} %  checking  layer {at}" for at in range(0, 100, 10)), "100 %  checking  done"]


@posix
def test_a_full_disk_under_a_journal_is_a_message_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full.py").write_text(
        "import resource, torch\n"
        "def both():\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), [torch.randn(8, 64)]\n"
    )
    monkeypatch.chdir(tmp_path)

    def job() -> None:
        done = run("prune", "full:both", "out", "-p", "2:4", "--method", "wanda", "--resume", "journal")
        assert done.exit_code == 1, done.output
        assert "the journal" in done.stderr and "cannot be written" in done.stderr

    assert in_child(job) == 0
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
@posix
def test_a_reader_that_stops_early_sees_no_traceback(model: Path) -> None:
    command = f"{sys.executable} -m bisparse info {model} --json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_layouts_from_the_command_line(tmp_path: Path) -> None:
    source = tmp_path / "experts.safetensors"
    save_file({"experts.down_proj": torch.randn(2, 8, 8), "embed.weight": torch.randn(99, 8)}, source)
    refused = run("prune", source, tmp_path / "out", "-p", "2:4")
    assert refused.exit_code == 1 and "experts-transposed" in refused.output
    layout = ("--layout", "experts.*=experts-transposed")
    code, report = run_json("prune", source, tmp_path / "out", "-p", "2:4", *layout)
    assert code == 0 and report["layers"][0]["layout"]["kind"] == "experts-transposed"
    assert report["fraction"] == pytest.approx(128 / 920)
    assert run("verify", tmp_path / "out", "--strict").exit_code == 0
    weight = load_file(tmp_path / "out" / "experts.safetensors")["experts.down_proj"]
    save_file({"experts.down_proj": weight}, tmp_path / "alone.safetensors")
    assert run("verify", tmp_path / "alone.safetensors", "-p", "2:4", *layout).exit_code == 0
    assert run("verify", tmp_path / "alone.safetensors", "-p", "2:4", "--layout", "experts.*=experts").exit_code == 1
    assert "2:4" in run("info", tmp_path / "alone.safetensors", *layout).output
    assert "Warning: only 128 of 920 parameters" in run("prune", source, tmp_path / "two", "-p", "2:4", *layout).output
    for wrong in ("experts.*", "*=lineal"):
        assert run("prune", source, tmp_path / "three", "--layout", wrong).exit_code == 2


HOSTILE = "layers.\x1b[2J\x1b]0;owned\x07.up\nbisparse: all is well\r\u202eweight\x9b31m"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_in_a_file_reaches_a_terminal_as_it_is(tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    source = tmp_path / "model"
    source.mkdir()
    state = {f"{HOSTILE}.{name}.weight": torch.randn(16, 16) for name in ("a", "b", "lm_head")}
    save_file(state, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    (source / "evil\x1b[31m.txt").write_text("a file")
    commands: list[tuple[object, ...]] = [
        ("prune", source, "--dry-run"), ("prune", source, tmp_path / "out", "-p", "2:4"), ("info", source),
        ("verify", source, "-p", "2:4"), ("verify", source), ("prune", source, tmp_path / "x", "--include", "nothing"),
        ("verify", tmp_path / "out", "-p", "1:4"), ("convert", source, tmp_path / "dense", "--to-dense"),
        ("report", tmp_path / "out", "-o", tmp_path / "page.html"),
    ]  # fmt: skip
    for arguments in commands:
        shown = run(*arguments).output
        without_colours = re.sub("\x1b\\[[0-9;]*m", "", shown) if terminal else shown
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", without_colours), arguments
        assert not re.search("^bisparse: all is well", without_colours, re.MULTILINE), arguments
        code, document = run_json(*arguments, *(["--overwrite"] if "-p" in arguments and "prune" in arguments else []))
        assert isinstance(document, dict) and code in (0, 1, 2)


def test_a_key_chooses_a_state_dict_and_to_dense_writes_plain_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)
    weight = torch.randn(16, 16)
    mask = bisparse.solve(weight.abs(), "2:4").mask
    torch.save({"g": {"up.weight_orig": weight, "up.weight_mask": mask.float()}, "d": {"up.weight": weight}}, tmp_path / "gan.pt")
    assert "choose one with --key" in run("verify", tmp_path / "gan.pt", "-p", "2:4").output
    assert run("verify", tmp_path / "gan.pt", "-p", "2:4", "--key", "g").exit_code == 0
    assert run("verify", tmp_path / "gan.pt", "-p", "2:4", "--key", "d").exit_code == 1
    assert run("info", tmp_path / "gan.pt", "--key", "g").exit_code == 0
    assert run("prune", tmp_path / "gan.pt", tmp_path / "d", "-p", "1:4", "--key", "d").exit_code == 0
    shown = run("convert", tmp_path / "gan.pt", tmp_path / "g", "--to-dense", "--key", "g")
    assert shown.exit_code == 0 and "1 weights are stored as weight_orig and weight_mask" in shown.output
    assert torch.equal(load_file(tmp_path / "g" / "gan.safetensors")["up.weight"], weight * mask)
    code, document = run_json("convert", tmp_path / "gan.pt", tmp_path / "h", "--to-dense", "--key", "d")
    assert code == 0 and document["tensors"] == 1
    unused = (
        ["--to", "2:4"],
        ["--regrow"],
        ["--layout", "up=linear"],
        ["--damping", "1"],
        ["--block-epochs", "2"],
        ["--network-epochs", "2"],
        ["--solver", "exact"],
    )
    for wrong in (*(["--to-dense", "--key", "g", *one] for one in unused), ["--key", "g", "--to", "2:4"], []):
        assert run("convert", tmp_path / "gan.pt", tmp_path / "i", *wrong).exit_code == 2
    assert run("prune", tmp_path / "gan.pt", tmp_path / "i", "--method", "wanda", "--key", "g").exit_code == 2
    assert not (tmp_path / "i").exists()


TEXTLESS = [("--sequences", "8"), ("--length", "16")]
UNUSED: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [
    (("prune", "FILE", "out", "-p", "2:4"), [("--order", "parallel"), ("--text-field", "a"), ("--damping", "1"), *TEXTLESS]),
    (("prune", "made_here:one", "out", "-p", "2:4", "--method", "wanda"), [("--text-field", "a"), *TEXTLESS]),
    (("convert", "made_here:one", "out", "--to", "2:4"), [("--text-field", "a"), *TEXTLESS]),
    (("convert", "FILE", "out", "--to-dense"), [("--order", "parallel"), ("--regrow",), ("--threads", "1"), *TEXTLESS]),
    (("quantize", "made_here:one", "out"), [("--damping", "0.01"), *TEXTLESS]),
    (("export", "made_here:one", "out.onnx"), [("--sequences", "8"), ("--calibration", "FILE"), ("--int8-inputs",)]),
    (("info", "2:4"), [("--include", "*"), ("--exclude", "*"), ("--key", "a"), ("--layout", "*=conv")]),
    (("info", "FILE"), [("--size", "64x64"), ("--plot", "a.svg")]),
    (("bench", "-m", "64x64"), [("--include", "*"), ("--exclude", "*")]),
    (("eval", "made_here:one", "--text", "FILE"), [("--labels", "FILE"), ("--against", "FILE"), ("--limit", "3")]),
]


@pytest.mark.parametrize(("command", "option"), [(command, option) for command, options in UNUSED for option in options])
def test_an_option_that_would_have_no_effect_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], option: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    given = ["model.safetensors" if one == "FILE" else one for one in (*command, *option)]
    code, said = run_json(*given)
    assert code == 2 and option[0] in said["error"]
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]
