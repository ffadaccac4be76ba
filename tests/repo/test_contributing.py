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
COMPILED = ("kernels", "pruning/channels")
"""Folders that are linked and not copied, so that what is compiled there is compiled once."""


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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], str]]:
    """The conformance suites on a copy of the package to which the page's examples were added: passed, failures, output.

    Each example is added twice: with its line, and under another name without one.
    """
    folder = tmp_path_factory.mktemp("contributed")
    ignored = shutil.ignore_patterns("*.nbi", "*.nbc")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    for part in COMPILED:
        place = folder / "src" / "bisparse" / part
        shutil.rmtree(place)
        place.symlink_to(ROOT / "src" / "bisparse" / part, target_is_directory=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for cls, name, package, table, _ in KINDS.values():
        home = folder / "src" / "bisparse" / package
        (home / f"{name}.py").write_text(example(cls))
        (home / f"{name}_without_its_line.py").write_text(example(cls).replace(cls, f"{cls}WithoutItsLine"))
        page = home / "__init__.py"
        module = f"bisparse.{package.replace('/', '.')}.{name}"
        text, found = re.subn(
            rf"(?m)^({table}(?:: .*=|\.update\(\n   ) \{{)$",
            rf'from {module} import {cls}\n\n\1\n    "{name}": {cls},',
            page.read_text(),
        )
        assert found == 1
        page.write_text(text)
    chosen = " or ".join(word for cls, name, *_ in KINDS.values() for word in (cls, name)) + " or has_its_line"
    suites = [suite for *_, suite in KINDS.values()]
    command = [sys.executable, "-m", "pytest", "-vv", *suites, "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    outcomes = re.findall(r"(?m)^(tests/\S+?)::(.*) (PASSED|FAILED|ERROR)\b", done.stdout)
    said = done.stdout[-6000:] + done.stderr[-1000:]
    return {
        kind: (
            len([test for file, test, outcome in outcomes if (file, outcome) == (suite, "PASSED")]),
            [test for file, test, outcome in outcomes if file == suite and outcome != "PASSED"],
            said,
        )
        for kind, (*_, suite) in KINDS.items()
    }


@pytest.mark.parametrize(("kind", "least"), [("solver", 20), ("method", 10)])
def test_the_examples_of_the_page_pass_the_conformance_suites(
    kind: str, least: int, results: dict[str, tuple[int, list[str], str]]
) -> None:
    passed, failures, said = results[kind]
    assert all("has_its_line" in test for test in failures), said
    assert passed >= least, f"the suite must run on the {kind} that was added\n{said}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_its_line_is_noticed_and_one_with_it_is_not(
    kind: str, results: dict[str, tuple[int, list[str], str]]
) -> None:
    _, failures, said = results[kind]
    cls = KINDS[kind][0]
    assert len(failures) == 1 and f"lacks a line for {cls}WithoutItsLine of" in said, said
    assert f"lacks a line for {cls} of" not in said
