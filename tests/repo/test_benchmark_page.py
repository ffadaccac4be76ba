"""The benchmark page is what the rows say, its verdicts are right, and the rows that need no clock are what the code says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of benchmarks/ for the length of a test: programs in its folders have files of these names too."""
    own = {path.stem for path in BENCHMARKS.iterdir()}

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in own]

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in loaded():
        del sys.modules[name]


def rows_of(**figures: Any) -> dict[str, Any]:
    environment = {
        "device": "A processor",
        "vector": "AVX2",
        "cores": 2,
        "versions": {"torch": "2"},
        "commit": "abc",
        "date": "2026-01-02",
    }
    return {**environment, **figures}


def timed(
    contender: str, time_ms: float, threads: int = 1, pattern: str = "2:4-T", side: int = 1024, **more: Any
) -> dict[str, Any]:
    place = {"input": "gaussian", "side": side, "pattern": pattern, "contender": contender, "threads": threads}
    figures = {"time_ms": time_ms, "ns_per_weight": time_ms, "share": 1.0, "scaled_from_weights": None, **more}
    return rows_of(benchmark="solvers", **place, **figures)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_committed_page_is_what_the_committed_rows_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tables

    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().out


def test_a_page_that_differs_is_found_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tables

    page = tmp_path / "speed.md"
    page.write_text("# Benchmarks\n\n| 2:4-T | 1500 x |\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check", "--folder", str(tmp_path)])
    assert tables.main() == 1
    said = capsys.readouterr().out
    assert "-| 2:4-T | 1500 x |" in said and "make fix" in said
    assert page.read_text().endswith("1500 x |\n")


@pytest.mark.parametrize(
    ("or_tools", "one", "two", "expected"),
    [
        (1501.0, 1.0, 0.5, "| 2:4-T | 1,501 | 1 | 1,501 x | 1500 x | met | 1 | 0.55 | 2.00 x | 1.7 x: met |"),
        (1499.0, 1.0, 0.6, "| 2:4-T | 1,499 | 1 | 1,499 x | 1500 x | **missed** | 1 | 0.55 | 1.67 x | 1.7 x: **missed** |"),
    ],
)
def test_targets_are_judged_by_the_ratio(or_tools: float, one: float, two: float, expected: str, tmp_path: Path) -> None:
    import tables

    write(tmp_path / "solvers.jsonl", [timed("Exact", one), timed("Exact", two, threads=2), timed("OR-tools", or_tools)])
    assert expected in "".join(tables.render(tmp_path).values())


def test_the_latest_row_counts_and_scaled_ones_are_marked(tmp_path: Path) -> None:
    import tables

    old, new = timed("OR-tools", 111.0), timed("OR-tools", 222.0, scaled_from_weights=1 << 20)
    write(tmp_path / "solvers.jsonl", [old, timed("Exact", 1.0), new])
    page = "".join(tables.render(tmp_path).values())
    assert "~222" in page and "111" not in page


def test_start_up_is_held_to_its_limits(tmp_path: Path) -> None:
    import tables

    startup = [
        rows_of(benchmark="startup", what="import", pattern="", time_s=0.31),
        rows_of(benchmark="startup", what="cold: mask", pattern="4:8-T", time_s=29.9),
        rows_of(benchmark="startup", what="second process: mask", pattern="4:8-T", time_s=0.1, until_mask_s=2.1, process_s=2.3),
    ]
    write(tmp_path / "solvers.jsonl", startup)
    page = "".join(tables.render(tmp_path).values())
    assert "0.31 s | under 0.3 s | **missed** |" in page
    assert "29.90 s | under 30 s | met |" in page
    assert "2.10 s (2.30 s) | under 2 s | **missed** |" in page


def test_a_page_without_rows_says_so(tmp_path: Path) -> None:
    import tables

    page = "".join(tables.render(tmp_path).values())
    assert "Not measured yet: `make bench`." in page and "Not measured yet: `python benchmarks/quality.py`." in page


def test_a_table_in_a_page_that_is_written_by_hand_comes_from_the_rows(tmp_path: Path) -> None:
    import tables

    page = tmp_path / "deploy.md"
    page.write_text(
        "Mine.\n<!-- table of deploy.jsonl, by benchmarks/tables.py -->\nOUT OF DATE\n<!-- end of deploy.jsonl -->\n"
        "<!-- table of openvino.jsonl, by benchmarks/tables.py -->\n<!-- end of openvino.jsonl -->\nMine too.\n"
    )
    common = {"model": "smollm", "pattern": "2:4", "method": "wanda", "dtype": "bfloat16"}
    kept = rows_of(**common, step="int8", perplexity=123.46, mb=99.5, cpu_s=7.2, broken=0, difference=0.0, largest=8.0)
    write(tmp_path / "deploy.jsonl", [{**kept, "perplexity": 1.0}, kept])
    (text,) = tables.inserted(tmp_path, tmp_path).values()
    assert text.startswith("Mine.\n") and text.endswith("Mine too.\n") and "OUT OF DATE" not in text
    assert "| + int8 | perplexity 123.5 | 99.5 | 7 | 0 | 0 of 8 |" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        tables.inserted(tmp_path, tmp_path)


def test_the_committed_diversity_rows_are_what_the_code_says() -> None:
    import diversity

    lines = (BENCHMARKS / "results" / "diversity.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(diversity.rows()))


def test_a_row_is_found_again_only_in_the_same_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import record

    path = tmp_path / "rows.jsonl"
    record.Record(path).add({"pattern": "2:4"}, {"time_ms": 1.5})
    with path.open("a") as file:
        file.write('{"pattern": "4:8", "tim')  # a run that was killed while it wrote
    again = record.Record(path)
    found = again.find({"pattern": "2:4"})
    assert found is not None and found["time_ms"] == 1.5
    assert again.find({"pattern": "4:8"}) is None
    for field in ("device", "versions", "sources", "commit", "date"):
        assert found[field]
    monkeypatch.setattr(record, "sources", lambda: "other code")
    assert record.Record(path).find({"pattern": "2:4"}) is None
    assert record.Record(path, fresh=True).rows == [] and not path.exists()


@pytest.mark.slow
def test_the_solver_benchmark_runs_resumes_and_fills_the_page(tmp_path: Path) -> None:
    pytest.importorskip("ortools")
    import tables

    results = tmp_path / "solvers.jsonl"
    command = [
        sys.executable,
        str(BENCHMARKS / "solvers.py"),
        "--quick",
        "--side",
        "64",
        "--skip-startup",
        "--results",
        str(results),
    ]
    command += ["--pattern", "4:8-T", "--input", "gaussian", "--rounds", "1"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    rows = results.read_text().splitlines()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0 and second.stdout == "" and results.read_text().splitlines() == rows
    by_name = {row["contender"]: row for row in map(json.loads, rows)}
    assert by_name["OR-tools"]["share"] == pytest.approx(1, abs=1e-6) and by_name["Exact"]["share"] == 1
    assert by_name["2-approximation"]["share"] < by_name["torch greedy"]["share"] < by_name["Sinkhorn"]["share"] <= 1
    assert "| 4:8-T |" in "".join(tables.render(tmp_path).values())


def law_row(density: int, method: str | None, accuracy: float, violated: float = 0.0) -> dict[str, Any]:
    budget = {"side": 14, "epochs": 5, "tuning": 100, "test_images": 200, "dtype": "bfloat16"}
    to = None if method is None else "2:4"
    return rows_of(**budget, origin_density=density, to=to, method=method, accuracy=accuracy, violated_weights=violated)


def test_the_law_says_where_each_method_breaks() -> None:
    from sections.pruning import curves_of_law, law

    rows = [law_row(density, None, 90.0) for density in (50, 70, 90)]
    for density, violated, lost in ((50, 0.1, 0.5), (70, 0.3, 1.5), (90, 0.4, 0.5)):
        rows += [law_row(density, "one", 90 - lost, violated), law_row(density, "two", 90.0, violated)]
    page = "".join(law(rows))
    # A later point that holds does not mend the curve.
    assert (
        "one: loses at most 1 point up to v_w = 10.0 %, breaks at 30.0 %; up to the paper's 10 % it loses at most 0.50." in page
    )
    assert "two: loses at most 1 point up to v_w = 40.0 %, does not break" in page
    curves = curves_of_law(rows)["to 2:4, batch norms re-estimated"]
    assert curves["one"] == pytest.approx({"10.0 %": 0.5, "30.0 %": 1.5, "40.0 %": 0.5})
    assert "| 30.0 % | 1.50 | 0.00 |" in page
    assert "batch norms as they were" not in page
    worse = [dict(row, accuracy_norms_as_they_were=row["accuracy"] - 2) if row["to"] else row for row in rows]
    page = "".join(law(worse))
    assert page.index("**To 2:4, batch norms as they were**") < page.index("**To 2:4, batch norms re-estimated**")
    assert "two: loses at most 1 point up to v_w = 0 %, breaks at 10.0 %; up to the paper's 10 % it loses at most 2.00." in page


def test_packed_products_are_compared_with_the_faster_of_torchs() -> None:
    from sections.cpu import cpu

    common = {"rows": 64, "columns": 32, "pattern": "4:8-T", "threads": 1, "bytes": 9, "bytes_dense": 16, "load": 0.5}
    times = {"packed_ms": 2.0, "torch_bf16_ms": 3.0, "torch_f32_ms": 5.0, "dense_loop_ms": 4.0}
    old = rows_of(**common, tokens=1, **times, one_pass_ms=1.0)
    rows = [old, dict(old, packed_ms=1.5, int8_ms=1.2), rows_of(**common, tokens=4, **times)]
    page = "".join(cpu(rows))
    assert (
        "| 64 x 32 | 4:8-T | 1 | 1.5 | 3 | 2.00 | 1.2 | 4 | 1 | 56.2 % | 0.5 |" in page and "| 2 | 3 | 1.50 |  | 4 |  |" in page
    )
    assert page.index("**1 token**") < page.index("**4 tokens**")
    assert "Not measured yet" in "".join(cpu([]))


def test_every_section_is_on_one_page_and_every_plot_is_drawn_from_rows(tmp_path: Path) -> None:
    from sections import PAGES, SECTIONS
    from sections.plots import draw_plots

    files = [file for page in PAGES.values() for file in page.files]
    assert sorted(files) == sorted(SECTIONS)
    draw_plots(BENCHMARKS / "results", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"law.svg", "solver-times.svg", "training-gpt.svg"}
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "benchmarks").glob("*.md"))
    assert all(f"../images/{path.name}" in pages for path in tmp_path.iterdir())


def test_least_squares_is_judged_against_adam_by_conversion() -> None:
    from sections.pruning import gradient_against_least_squares

    def conversion(to: str, method: str, seed: int, error: float, seconds: float) -> dict[str, Any]:
        errors = {"held_out_error": error, "held_out_error_own_inputs": 2 * error}
        return rows_of(origin="dense", to=to, method=method, seed=seed, cpu_seconds=seconds, **errors)

    adam, same, default = "adaprune (a), Adam", "adaprune (b), same mask and inputs", "adaprune (b), default"
    rows = [conversion("2:4", adam, seed, 0.2 + 0.02 * seed, 40.0) for seed in (0, 1)]
    rows += [conversion("2:4", same, 0, 0.2, 4.0), conversion("2:4", default, 0, 0.3, 5.0)]
    rows += [conversion("4:8", same, 0, 0.1, 1.0)]  # nothing to compare with
    page = "".join(gradient_against_least_squares(rows))
    figures = "| dense -> 2:4 | 2 | 0.2100 ± 0.0141 | 0.2000 | 0.4200 ± 0.0283 | 0.6000 | 40.0 ± 0.0 | 4.0 | 5.0 |"
    assert f"{figures} met, met (10 x) | **missed**, **missed** (8 x) |" in page
    assert "4:8" not in page and gradient_against_least_squares(rows[-1:]) == []


@pytest.mark.parametrize(("ours", "met"), [(0.2, "met"), (0.3, "**missed**")])
def test_a_layer_is_compared_with_the_same_method_of_others(ours: float, met: str) -> None:
    from sections.pruning import peers

    common = {"layer": "l", "tokens": 10, "error_held_out": 0.5, "seconds": 0.1}
    rows = [
        rows_of(**common, by="bisparse", method="SparseGPT", error=ours, mask_error=0.4),
        rows_of(**common, by="bisparse", method="Wanda", error=0.1),
        rows_of(**common, by="other", method="SparseGPT", error=0.25),
        rows_of(**common, by="another", method="SparseGPT, mask only", error=0.41),
        rows_of(layer="l", by="absent", method="SparseGPT", missing="not installed"),
    ]
    page = "".join(peers(rows))
    assert f"l, SparseGPT: ours {ours:.4f}, other 0.2500; at most theirs: {met}" in page
    assert "ours 0.4000, another 0.4100; at most theirs: met" in page
    assert "absent" not in page


@pytest.mark.parametrize(
    ("ours", "met"), [(0.76, "1.200 of what stripe groups gain; at least as much: met"), (0.74, "**missed**")]
)
def test_permutation_is_compared_with_stripe_groups(ours: float, met: str) -> None:
    from sections.pruning import permutation

    common = {"tensor": "l.weight", "shape": [8, 16], "escapes": 100, "kept_before": 0.7, "seconds": 1.0}
    page = "".join(
        permutation([rows_of(**common, method="ours", kept=ours), rows_of(**common, method="stripe groups", kept=0.75)])
    )
    assert met in page and "| l | 8 x 16 | ours |" in page


@pytest.mark.parametrize("program", sorted(path for path in BENCHMARKS.rglob("*.py") if '"--quick"' in path.read_text()))
def test_a_quick_run_never_writes_into_the_committed_results(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with --quick takes its file from `results_file`, or records nothing at all in that case."""
    import record

    text = program.read_text()
    users = [path for path in BENCHMARKS.rglob("*.py") if re.search(rf"from {program.stem} import .*arguments", path.read_text())]
    records = [path for path in (program, *users) if "--results" in path.read_text()]
    for path in records:
        assert "quick=options.quick" in path.read_text() and "default=RESULTS" not in path.read_text(), path
    assert records or "if not quick:" in text
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert not record.results_file(None, "x.jsonl", quick=True).is_relative_to(record.RESULTS)
    assert record.results_file(None, "x.jsonl") == record.RESULTS / "x.jsonl"
    assert record.results_file(tmp_path / "y", "x.jsonl", quick=True) == tmp_path / "y"
