"""Paths that no system can have, given to every public function that takes one: an error in our words, and nothing is written."""

import inspect
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bisparse

MODULES = (
    "bisparse", "bisparse.checkpoint", "bisparse.report", "bisparse.export", "bisparse.evaluation", "bisparse.accelerate",
    "bisparse.pruning", "bisparse.quantization", "bisparse.training",
)  # fmt: skip
BAD = {"long name": "x" * 5000, "long path": "a/" * 3000, "half a surrogate pair": "\ud800", "null byte": "\x00", "empty": ""}
ALLOWED = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, ImportError)


def functions() -> Iterator[tuple[str, str]]:
    seen = set()
    for module in MODULES:
        for name in import_module(module).__all__:
            function = getattr(import_module(module), name)
            if not inspect.isfunction(function) or id(function) in seen:
                continue
            seen.add(id(function))
            for parameter, one in inspect.signature(function).parameters.items():
                if "Path" in str(one.annotation):
                    yield f"{module}.{name}", parameter


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("paths")
    model = nn.Sequential(nn.Linear(16, 16))
    bisparse.prune_(model, "2:4", include=["0"])
    bisparse.save(model, folder / "pruned", "2:4")
    return {
        "model": model, "pattern": "2:4", "folder": folder / "pruned", "source": folder / "pruned", "pruned": folder / "pruned",
        "path": folder / "pruned", "target": folder / "out", "output": folder / "out.html", "dense": folder / "pruned",
        "inputs": torch.randn(2, 16), "tokenizer": None, "report": None, "shapes": [], "tokens": 8, "scheme": "int8",
        "figures": [],
    }  # fmt: skip


@pytest.mark.parametrize(("where", "parameter"), list(functions()))
@pytest.mark.parametrize("bad", BAD)
def test_a_path_that_cannot_be_is_refused_in_our_own_words(where: str, parameter: str, bad: str, good: dict[str, Any]) -> None:
    module, name = where.rsplit(".", 1)
    function = getattr(import_module(module), name)
    given = {}
    for other, one in inspect.signature(function).parameters.items():
        if other == parameter or one.default is not one.empty or one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
            continue
        if other not in good:
            pytest.fail(f"give a value for {other} in the table above")
        given[other] = good[other]
    before = sorted(good["folder"].parent.iterdir())
    try:
        function(**given | {parameter: BAD[bad]})
    except Exception as error:  # noqa: BLE001
        assert isinstance(error, ALLOWED) and not isinstance(error, UnicodeError), repr(error)
        assert str(error) != "embedded null byte"
    assert sorted(good["folder"].parent.iterdir()) == before


def test_most_functions_are_reached() -> None:
    assert len(list(functions())) > 20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
@pytest.mark.parametrize("place", ["grid", "text", "pairs"])
def test_a_pipe_is_not_waited_for(place: str, tmp_path: Path) -> None:
    from bisparse.accelerate import Grid
    from bisparse.evaluation import read_pairs, text_perplexity

    os.mkfifo(tmp_path / "pipe")
    reads = {"grid": Grid.read, "text": lambda path: text_perplexity(nn.Linear(2, 2), None, path), "pairs": read_pairs}
    with pytest.raises(ValueError, match="is no regular file"):
        reads[place](tmp_path / "pipe")
