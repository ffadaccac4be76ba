"""Operators on the CPU are called without torch's dispatcher, unless something watches it, with the same results."""

import pytest
import torch

from bisparse import solve
from bisparse.kernels import registration
from dispatched import Seen


@pytest.mark.parametrize(("pattern", "operator"), [("2:4-T", "exact_mask"), ("4:8-T", "exact_solve"), ("2:4", "keep_largest")])
def test_what_watches_the_dispatcher_sees_the_operator(pattern, operator, monkeypatch):
    scores = torch.rand(64, 64)
    plain = solve(scores, pattern).mask
    with Seen() as seen:
        watched = solve(scores, pattern).mask
    assert torch.equal(plain, watched) and any(f"bisparse.{operator}" in name for name in seen.names)
    called = []
    for name, kernel in registration._ON_CPU.items():
        monkeypatch.setitem(
            registration._ON_CPU, name, lambda *given, name=name, kernel=kernel: called.append(name) or kernel(*given)
        )
    assert torch.equal(solve(scores, pattern).mask, plain) and called == [operator]
