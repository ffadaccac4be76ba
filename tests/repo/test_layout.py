"""The structure of the package: allowed imports, the place of each file, and complete tables of contents."""

import ast
import importlib
import inspect
import tomllib
from functools import cache
from pathlib import Path

import pytest

import bisparse

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "bisparse"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All that a file's text is made of."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which package it leads to"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_import_contract_holds() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_import_contract_is_complete() -> None:
    # A module that the contract does not list could import anything.
    layers, acyclic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = {name.strip(" ()") for layer in layers["layers"] for name in layer.replace(":", "|").split("|")}
    present = {path.stem for path in SOURCE.glob("*.py")} | {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert listed == present - {"__init__"}
    assert acyclic["type"] == "acyclic_siblings" and acyclic["ancestors"] == ["bisparse"]


@pytest.mark.parametrize("folder", ["solvers", "training"])  # METHODS is tested with the methods
def test_table_of_contents_names_every_file(folder: str) -> None:
    contents = SOURCE / folder / "__init__.py"
    if not contents.exists():
        pytest.skip(f"there is no {folder} yet")
    listed = imported(contents)
    missing = [
        path.stem
        for path in contents.parent.glob("*.py")
        if path != contents and f"bisparse.{folder}.{path.stem}" not in listed and defines_a_concrete_class(path)
    ]
    assert not missing, f"{name_of(contents)} lacks a line for {missing}"


def defines_a_concrete_class(path: Path) -> bool:
    """Whether a file has what users name: a final solver or method. Helpers of the folder have none."""
    module = importlib.import_module(f"bisparse.{path.parent.name}.{path.stem}")
    bases = {bisparse.solvers.Solver, bisparse.pruning.Method}
    own = [item for item in vars(module).values() if inspect.isclass(item) and item.__module__ == module.__name__]
    return any(issubclass(item, tuple(bases)) and not inspect.isabstract(item) for item in own)


def test_table_of_contents_test_sees_the_solvers() -> None:
    assert defines_a_concrete_class(SOURCE / "solvers" / "exact.py")
    assert not defines_a_concrete_class(SOURCE / "solvers" / "solver.py")


@pytest.mark.parametrize(
    ("library", "places"),
    [
        # The journal holds statistics of a job under way; the Trainer rewrites the checkpoint that it has just saved; a teacher's
        # folder is read by the packages that wrote it.
        (
            "safetensors",
            ("checkpoint", "pruning/journal.py", "training/integrations/transformers.py", "training/distill_teacher.py"),
        ),
        ("torch.sparse", ("accelerate", "checkpoint/formats/semi_structured.py")),  # reads what torch packed
        ("numba", ("kernels", "pruning/channels/stripe_kernel.py")),  # channel permutation, not the mask problem
        ("triton", ("kernels",)),
        ("ortools", ("solvers/min_cost_flow.py",)),
    ],
)
def test_each_outside_library_is_imported_in_its_places_only(library: str, places: tuple[str, ...]) -> None:
    strangers = [
        name_of(path)
        for path in FILES
        if any(name == library or name.startswith(library + ".") for name in imported(path))
        and not any(str(path.relative_to(SOURCE)).startswith(place) for place in places)
    ]
    assert not strangers


def test_kernels_are_cached_by_our_own_cache() -> None:
    # numba's fails where its folder cannot be written or is damaged, and does not notice constants that changed in another file.
    strangers = {name_of(path) for path in FILES if {"numba.njit", "numba.cfunc", "numba.jit"} & imported(path)}
    assert strangers == {"src/bisparse/kernels/numba_runtime/cache.py"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_file_says_what_it_is_and_has_one_subject(path: Path) -> None:
    text = path.read_text()
    module = nodes_of(path)[0]
    assert isinstance(module, ast.Module)
    docstring = ast.get_docstring(module)
    assert docstring and docstring.split("\n")[0].rstrip().endswith((".", ":", "?")), "the head is one sentence about the file"
    assert text.count("\n") <= 500, "a file of this length has more than one subject"
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "core"}


def test_no_class_named_after_hidden_state() -> None:
    banned = ("Manager", "Engine", "Handler", "Modifier", "Utils", "Helper")
    classes = [node.name for path in FILES for node in nodes_of(path) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(banned)]


def test_public_names_are_sorted_documented_and_few() -> None:
    names = [name for name in bisparse.__all__ if name != "__version__"]
    assert names == sorted(names)
    assert len(names) <= 28
    for name in names:
        item = getattr(bisparse, name)
        if inspect.isclass(item) or inspect.isfunction(item):
            assert inspect.getdoc(item), f"bisparse.{name} has no docstring"


def test_what_benchmarks_examples_and_tools_import_from_the_package_is_there() -> None:
    scripts = [path for folder in ("benchmarks", "examples", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(scripts) > 40
    wanted: dict[tuple[str, str], Path] = {}
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "bisparse":
                wanted |= {(node.module, alias.name): path for alias in node.names}
    lacking = []
    for (module, name), path in wanted.items():
        try:
            exec(f"from {module} import {name}", {})  # as the script does it: a name or a submodule
        except ImportError as error:
            if error.name is None or error.name.startswith("bisparse"):
                lacking.append(f"{path.relative_to(ROOT)}: {error}")
    assert not lacking
