"""The notebooks run: quickly on small budgets in `make check`, and as they are published in the slow tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SMALL = """
import json, sys
import matplotlib
matplotlib.use("Agg")
cells = [cell for cell in json.load(open(sys.argv[1]))["cells"] if cell["cell_type"] == "code"]
namespace = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    exec(compile(cell["metadata"].get("small") or "".join(cell["source"]), f"cell {number}", "exec"), namespace)
"""


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.docs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_a_small_budget(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SMALL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_as_it_is_published(path: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    nbclient.NotebookClient(
        nbformat.read(path, as_version=4), timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_whole_small_and_without_traces_of_a_machine(path: Path) -> None:
    assert path.stat().st_size < 200_000
    cells = code_cells(path)
    assert sum(len(cell["outputs"]) > 0 for cell in cells) >= 3, "run tools/notebooks.py"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert str(ROOT) not in path.read_text() and "site-packages" not in path.read_text()


def test_every_notebook_is_on_the_start_page() -> None:
    assert len(NOTEBOOKS) >= 5
    start = (ROOT / "docs" / "index.md").read_text()
    assert not [path.name for path in NOTEBOOKS if f"notebooks/{path.stem}" not in start]
