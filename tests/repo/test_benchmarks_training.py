"""The experiments' programs run at their smoke budget, resume, and the page is made from their rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "training"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent)]


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_grid_holds_every_run_that_the_experiment_needs():
    import resnet

    data, training = resnet.BUDGETS["reduced"]
    base = resnet.Recipe("", model=resnet.ModelRecipe("resnet20"), data=data, training=training)
    wanted_runs = list(resnet.grid(base, Path("runs"), 3))
    listed = [f"{study}: {recipe.name}, seed {recipe.seed}" for study, recipe in wanted_runs]
    assert len({(study, str(recipe)) for study, recipe in wanted_runs}) == len(wanted_runs)  # no run twice
    for wanted in (
        "dense: dense", "static: dense, trained on",
        "static: static 4:8-T", "dynamic: dynamic STE 16:32-T", "dynamic: dynamic SR-STE 2:4",
        "dynamic: dynamic masked decay 4:8-seq", "dynamic: dynamic masked decay 50%", "greedy: greedy 4:8-T",
        "refresh: refresh 100 4:8-T",
    ):  # fmt: skip
        assert sum(line.startswith(f"{wanted}, seed") for line in listed) == 3, wanted
    assert len([line for line in listed if "seed" in line]) == 3 * (1 + 12 + 4 + 3 + 2 + 3 + 20)


@pytest.mark.slow
def test_programs_run_and_the_page_shows_them(tmp_path):
    rows = tmp_path / "rows"
    shared = ("--runs", str(tmp_path / "runs"), "--seeds", "2")
    gpt = ("--budget", "smoke", "--results", str(rows / "training-gpt.jsonl"), *shared)
    run("gpt.py", *gpt)
    first = (rows / "training-gpt.jsonl").read_text()
    assert len(first.splitlines()) == 18 and "curve" in json.loads(first.splitlines()[0])
    run("gpt.py", *gpt)
    assert (rows / "training-gpt.jsonl").read_text() == first  # nothing is run twice
    run(
        "search_cost.py", "--models", "resnet20", "--patterns", "4:8-T", "--steps", "1", "--batch", "2", "--threads", "1",
        "--results", str(rows / "training-search.jsonl"), *shared,
    )  # fmt: skip
    import tables
    from sections.plots import draw_plots

    page = "".join(tables.render(rows).values())
    for wanted in ("OR-tools flow", "16:32-T with MVUE", "Not measured yet: `python benchmarks/training/resnet.py`"):
        assert wanted in page, wanted
    draw_plots(rows, tmp_path)
    assert (tmp_path / "training-gpt.svg").stat().st_size > 1000
