"""A few cases of each kind of attack, and that the attack notices what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bisparse
from attack import files, solver, steps
from attack.__main__ import KINDS
from attack.found import Found

QUICK = {
    "files": range(6),
    "steps": range(6),
    "solver": (1, 2, 5, 10),  # 1:4, 1:3, 3:8 and 8:14: no kernels that would be compiled for this alone
    "values": range(1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in QUICK.items() for seed in seeds])
def test_a_few_cases_find_nothing(kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = import_module(f"attack.{kind}").attack(seed, tmp_path)
    assert found.findings == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kills", "disks", "rivals"])
def test_a_few_cases_in_processes_find_nothing(kind: str) -> None:
    command = [sys.executable, "-m", "attack", "--only", kind, "--cases", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert json.loads(done.stdout)["findings"] == [] and done.returncode == 0


def test_every_file_of_a_kind_is_in_the_table() -> None:
    helpers = {"__init__", "__main__", "found", "jobs", "test_attack"}
    assert {path.stem for path in Path(__file__).parent.glob("*.py")} - helpers == set(KINDS)


def test_a_wrong_mask_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = bisparse.solve

    def wrong(*arguments: Any, **options: Any) -> Any:
        solution = original(*arguments, **options)
        solution.mask[0] = False
        return solution

    monkeypatch.setattr(solver, "solve", wrong)
    of_2to4, of_4to8 = 27, 109  # seeds of patterns whose kernels other tests compile
    assert all(solver.attack(seed, tmp_path).findings for seed in (of_2to4, of_4to8))


def test_a_model_that_is_half_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(model: nn.Module, *_: Any) -> None:
        model.blocks[0][0].weight.data.zero_()
        model.train(False)

    monkeypatch.setattr(steps, "JOBS", {"prune_": half})
    monkeypatch.setattr(steps, "POINTS", {"mode": steps.POINTS["mode"]})
    assert any(category == "half-changed" for seed in range(6) for category, _ in steps.attack(seed, tmp_path).findings)


def test_a_changed_number_in_an_output_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    state = {"layers.0.up.weight": torch.randn(16, 16), "norm.weight": torch.randn(16)}
    save_file(state, tmp_path / "model" / "model.safetensors")
    bisparse.prune_checkpoint(tmp_path / "model", tmp_path / "out", "2:4")
    found = Found()
    files._check_pruned(found, "", tmp_path / "out", state, "2:4")
    assert not found.findings
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["norm.weight"][3] += 1
    save_file(weights, tmp_path / "out" / "model.safetensors")
    files._check_pruned(found, "", tmp_path / "out", state, "2:4")
    assert found.findings == [("wrong", ": norm.weight is not the source's")]


def test_the_independent_flow_is_right() -> None:
    import oracle

    for exactly in (False, True):
        tile = torch.rand(4, 4)
        assert solver.best_total(tile, 2, exactly) == oracle.brute_force(tile, 2, exactly)
