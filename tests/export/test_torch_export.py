"""torch.export takes accelerated models: the packed product stays an operator of bisparse, with the same outputs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bisparse
import bisparse.accelerate

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
LOAD = """
import sys, torch
if sys.argv[2] == "with":
    import bisparse.accelerate
program = torch.export.load(sys.argv[1])
print(tuple(program.module()(torch.ones(3, 64, dtype=torch.bfloat16)).shape))
"""


def network(kind: str) -> nn.Module:
    """Two Linear layers with zeros; packed, unless the kind is "plain"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(torch.bfloat16).eval()
    bisparse.prune_(model, "2:4")
    if kind != "plain":
        bisparse.accelerate_(model, backend=kind)
    return model


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        inputs = torch.randn(4, 64, dtype=torch.bfloat16)
        return torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.slow
def test_an_accelerated_model_is_exported_with_its_operator() -> None:
    model = network("reference")
    program = exported(model)
    inputs = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert [str(node.target) for node in program.graph.nodes].count("bisparse.packed_linear_2to4.default") == 2
        assert torch.equal(program.module()(inputs[:3]), model(inputs[:3]))


@pytest.mark.slow
def test_a_saved_program_loads_where_the_operators_are_registered_and_names_the_missing_one_elsewhere(tmp_path: Path) -> None:
    torch.export.save(exported(network("reference")), tmp_path / "program.pt2")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "program.pt2")]
    done = subprocess.run([*command, "with"], capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 64)", done.stderr
    failed = subprocess.run([*command, "without"], capture_output=True, text=True)
    assert failed.returncode != 0 and "packed_linear_2to4" in failed.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="AOTInductor needs a C++ compiler, and there is no g++ or clang++")
@pytest.mark.parametrize("kind", ["plain", "reference"])
def test_aotinductor_compiles_pruned_and_packed_models_with_equal_outputs(tmp_path: Path, kind: str) -> None:
    model = network(kind)
    path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (4, 7):
        inputs = torch.randn(batch, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            meant = model(inputs)
        assert torch.allclose(compiled(inputs), meant, atol=1e-2, rtol=1e-2)
