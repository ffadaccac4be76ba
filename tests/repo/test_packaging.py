"""What a user installs: the wheel is whole, importing it is fast, and it brings nothing that was not asked for."""

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bisparse

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tracked = subprocess.run(["git", "ls-files", "src"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    package = {path.removeprefix("src/") for path in tracked if (ROOT / path).exists()} or {"bisparse/__init__.py"}
    assert package <= set(names)
    assert any(name.endswith(".jinja") for name in names), "reports need their templates"
    assert "bisparse/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("bisparse/", "bisparse-")) for name in names)


SUBMODULES = (
    "training",
    "pruning",
    "accelerate",
    "checkpoint",
    "report",
    "solvers",
    "layers",
    "results",
    "scores",
    "tiles",
    "pattern",
)


def test_wheel_runs_from_where_it_is_unpacked_and_its_submodules_are_there_after_a_bare_import(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import bisparse
for name in {SUBMODULES!r}:
    assert getattr(bisparse, name).__all__
import torch
print(bisparse.__file__)
print(bisparse.solve(torch.tensor([[4.0, 3.0], [3.0, 1.0]]), "50%").value)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "bisparse" / "__init__.py"), "7.0"], done.stderr


def test_version_is_stated_once() -> None:
    assert bisparse.__version__ == PROJECT["version"] == importlib.metadata.version("bisparse")


def test_core_dependencies_are_few() -> None:
    core = {requirement.split(">")[0] for requirement in PROJECT["dependencies"]}
    assert core == {"torch", "numpy", "numba", "safetensors", "jaxtyping", "msgspec", "tqdm"}


def test_importing_is_fast_and_brings_no_extra() -> None:
    # Best of three: the target is 0.3 s, and another process on the machine may take its share of one run.
    script = """
import time, torch, sys
before = set(sys.modules)
start = time.perf_counter()
import bisparse
print(time.perf_counter() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
"""
    seconds = []
    for _ in range(3):
        taken, *brought = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        seconds.append(float(taken))
        extras = {"numba", "transformers", "lightning", "accelerate", "matplotlib", "rich", "typer", "ortools", "triton", "scipy"}
        assert not extras & set(brought)
        if seconds[-1] < 0.3:
            return
    pytest.fail(f"import bisparse took {min(seconds):.2f} s beside torch's own import")
