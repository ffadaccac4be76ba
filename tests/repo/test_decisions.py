"""What the decision notes claim about 4:8 on 2:4 hardware and about paired 4:8, computed."""

import importlib
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bisparse import solve, verify
from bisparse.pattern import Paired, parse_pattern
from bisparse.verification import PatternError

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(GPU))
    before, path = set(sys.modules), list(sys.path)
    yield importlib.import_module("windows")
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("record", "environment", "windows"):
            del sys.modules[name]


def test_three_windows_hold_every_4_of_8_exactly(windows: ModuleType) -> None:
    groups = windows.every_group()
    assert len(groups) == 70 and bool(verify(groups, "4:8"))
    expanded = windows.expanded_weight(groups)
    assert expanded.shape == (70, 12)
    verify(expanded, "2:4").check()
    inputs = torch.eye(8, dtype=torch.float64)  # so that each product is one weight
    assert torch.equal(windows.expanded_inputs(inputs) @ expanded.t(), groups.t())


def test_a_whole_matrix_and_fewer_than_four(windows: ModuleType) -> None:
    weight = torch.randint(-9, 10, (24, 64)).double()
    weight *= solve(weight.abs(), "4:8").mask
    expanded = windows.expanded_weight(weight)
    verify(expanded, "2:4").check()
    inputs = torch.randint(-9, 10, (5, 64)).double()
    assert torch.equal(windows.expanded_inputs(inputs) @ expanded.t(), inputs @ weight.t())


def holds(kept: tuple[int, ...], windows: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the kept inputs can be put into windows that contain them, two at most in each."""
    for choice in product(*([k for k, window in enumerate(windows) if place in window] for place in kept)):
        if all(choice.count(k) <= 2 for k in set(choice)):
            return True
    return False


def test_two_windows_hold_every_4_of_6_and_three_hold_every_6_of_8() -> None:
    two, three = ((0, 1, 2, 3), (2, 3, 4, 5)), ((0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7))
    assert all(holds(kept, two) for kept in combinations(range(6), 4))
    assert all(holds(kept, three) for kept in combinations(range(8), 6))
    assert not all(holds(kept, two) for kept in combinations(range(6), 5))


def test_two_windows_of_any_kind_do_not() -> None:
    for first, second in product(combinations(range(8), 4), repeat=2):
        assert not all(holds(kept, (first, second)) for kept in combinations(range(8), 4))
    assert sum(holds(kept, ((0, 1, 2, 3), (4, 5, 6, 7))) for kept in combinations(range(8), 4)) == 36


def test_five_windows_for_sixteen_cannot() -> None:
    # Of 16 inputs in 20 places at least 12 stand in one window only; a window with three of those fails when they are kept.
    places, inputs, windows = 20, 16, 5
    alone = 2 * inputs - places
    assert alone > 2 * windows


def test_the_figures_of_the_note() -> None:
    gain = 1 / (Fraction(12, 8) / 2)
    assert gain == Fraction(4, 3)
    # Expanding the inputs of a 4096 x 4096 layer at 16384 tokens: read once, written 1.5 times, in bfloat16.
    moved = (1 + 1.5) * 4096 * 16384 * 2
    assert round(moved / 2**20) == 320
    floor_ms, dense_ms = moved / 3.35e12 * 1e3, 2 * 4096 * 4096 * 16384 / 989e12 * 1e3
    assert (round(floor_ms, 2), round(dense_ms, 2)) == (0.10, 0.56)
    needed = 1.5 / (1 - floor_ms / dense_ms)
    assert round(needed, 2) == 1.83
    stored_bits = 6 / 8 * 16 + 6 * 2 / 8
    assert stored_bits == 13.5


@pytest.mark.parametrize("text", ["4:8-paired"])
def test_paired_4_of_8_is_a_pattern_that_is_solved_and_verified(text: str) -> None:
    pattern = parse_pattern(text)
    assert isinstance(pattern, Paired) and str(pattern) == text and pattern.density == 0.5
    weight = torch.randn(16, 64)
    solution = solve(weight.abs(), text).check()
    assert bool(verify(weight * solution.mask, text))
    pairs = solution.mask.unflatten(1, (-1, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1])
    assert bool((pairs[..., 0].unflatten(1, (-1, 4)).sum(-1) == 2).all())
    # Four of eight, yet not in pairs: 4:8 holds, 4:8-paired does not.
    apart = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]], dtype=torch.bool)
    assert bool(verify(apart, "4:8")) and not verify(apart, text)
    with pytest.raises(PatternError, match="4:8-paired"):
        verify(apart, text).check()
