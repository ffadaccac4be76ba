"""CONTRIBUTING.md taken at its word: a new solver or method is one file and one line, and the conformance suite runs on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> str:
    """The code block of CONTRIBUTING.md that defines a class, without the lines that use it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    block = next(one for one in blocks if f"class {name}(" in one)
    head, _, body = block.partition("@dataclass")
    lines = (f"@dataclass{body}").splitlines()
    end = next((number for number, line in enumerate(lines) if number > 1 and re.match(r"\w", line)), len(lines))
    return head + "\n".join(lines[:end]) + "\n"


KINDS = {
    # The class of the page, its name, the file, the line's table, and the suite.
    "solver": ("Diagonals", "diagonals", "solvers", "SOLVERS", "tests/test_solvers.py"),
    "method": ("Checkerboard", "checkerboard", "pruning/methods", "METHODS", "tests/pruning/methods/test_methods.py"),
}


def contribute(kind: str, folder: Path, *, line: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the conformance suite on a copy of the package to which the page's example was added."""
    cls, name, package, table, suite = KINDS[kind]
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    home = folder / "src" / "bisparse" / package
    (home / f"{name}.py").write_text(example(cls))
    if line:
        page = home / "__init__.py"
        module = f"bisparse.{package.replace('/', '.')}.{name}"
        text, found = re.subn(
            rf"(?m)^({table}(?:: .*=|\.update\(\n   ) \{{)$",
            rf'from {module} import {cls}\n\n\1\n    "{name}": {cls},',
            page.read_text(),
        )
        assert found == 1
        page.write_text(text)
    chosen = f"{cls} or {name} or has_its_line"
    command = [sys.executable, "-m", "pytest", suite, "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize(("kind", "least"), [("solver", 20), ("method", 10)])
def test_the_example_of_the_page_passes_the_conformance_suite(kind: str, least: int, tmp_path: Path) -> None:
    done = contribute(kind, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, "the suite must run on what was added"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_its_line_is_noticed(kind: str, tmp_path: Path) -> None:
    done = contribute(kind, tmp_path, line=False)
    assert done.returncode == 1 and "lacks a line for" in done.stdout, done.stdout[-3000:]
