"""torch.export takes accelerated models: the packed product stays an operator of bisparse, with the same outputs."""

import pytest
import torch
from torch import nn

import bisparse


@pytest.mark.slow
def test_an_accelerated_model_is_exported_with_its_operator() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).to(torch.bfloat16).eval()
    bisparse.prune_(model, "2:4")
    bisparse.accelerate_(model, backend="reference")
    inputs = torch.randn(4, 512, dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert [str(node.target) for node in program.graph.nodes].count("bisparse.packed_linear_2to4.default") == 2
        assert torch.equal(program.module()(inputs[:3]), model(inputs[:3]))
