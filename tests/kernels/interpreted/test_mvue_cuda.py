"""The Triton kernels of the 2:4 estimate in Triton's interpreter: bit by bit what their specification says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_kernels_mvue import PACKED_SHAPES, SEEDS, gradient_of, layout_of, seed_of
from test_values_cuda import poisoned
from torch import Tensor

from bisparse.kernels.mvue import cuda as cuda_estimate
from bisparse.kernels.mvue.ops import estimate_by, reference_estimate_2to4, reference_pack_estimate_2to4
from bisparse.kernels.mvue.philox import uniforms

SLOW_HALF = pytest.param(torch.float16, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_estimate, "WORDS", 2)
    monkeypatch.setattr(cuda_estimate, "OUTPUTS", 8)


def in_poisoned_memory(call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    torch.empty = poisoned(torch.empty)  # type: ignore[assignment]
    try:
        return call(*arguments)
    finally:
        torch.empty = torch.empty.honest  # type: ignore[attr-defined]


def before_nan(gradient: Tensor) -> Tensor:
    """The same, with NaN behind it in memory, where a kernel must not look."""
    return torch.cat((gradient, torch.full((3, gradient.shape[1]), float("nan"), dtype=gradient.dtype)))[: len(gradient)]


@triton.jit
def drawn_kernel(seed, drawn, outputs, WORDS: tl.constexpr, OUTPUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    word, output = tl.arange(0, WORDS)[:, None], tl.arange(0, OUTPUTS)[None, :]
    u0, u1, u2, u3 = cuda_estimate.draw_uniforms(seed, word, output)
    place = drawn + 4 * word * outputs + output
    tl.store(place, u0)
    tl.store(place + outputs, u1)
    tl.store(place + 2 * outputs, u2)
    tl.store(place + 3 * outputs, u3)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniforms_are_those_of_the_specification(seed: int) -> None:
    drawn = torch.full((16, 8), float("nan"))
    drawn_kernel[(1,)](seed_of(seed), drawn, 8, WORDS=4, OUTPUTS=8)
    assert torch.equal(drawn, uniforms(seed_of(seed), 16, 8, torch.float32))


@triton.jit
def group_kernel(gradient, start, estimate, count: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, count)
    g0, g1 = tl.load(gradient + column), tl.load(gradient + count + column)
    g2, g3 = tl.load(gradient + 2 * count + column), tl.load(gradient + 3 * count + column)
    e0, e1, e2, e3 = cuda_estimate.estimate_group(g0, g1, g2, g3, tl.load(start + column))
    tl.store(estimate + 4 * column, e0)
    tl.store(estimate + 4 * column + 1, e1)
    tl.store(estimate + 4 * column + 2, e2)
    tl.store(estimate + 4 * column + 3, e3)


def test_groups_are_those_of_the_specification_where_sums_meet_their_thresholds() -> None:
    rare = [
        [2.0**24, 1, 1, 1], [2.0**24, 1.9, 0.99, 0.99], [1, 1, 1, 1], [0.7, 0.7, 0.1, 0],
        [5, 0, 0, 2.0**-149], [0, -0.0, 0, 0], [1, 1, 1e-20, 1e-20],
    ]  # fmt: skip
    gradient = torch.cat((torch.tensor(rare), torch.randn(249, 4).exp())).t().contiguous()
    for step in (0, 1, 2, 2**23, 2**24 - 2, 2**24 - 1):
        start, found = torch.full((1, 256), step * 2.0**-24), torch.full((256, 4), float("nan"))
        group_kernel[(1,)](gradient, start, found, 256)
        assert torch.equal(found, estimate_by(start, gradient))


@pytest.mark.parametrize("shape", [(1, 1), (14, 21), (63, 9)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), SLOW_HALF, torch.bfloat16], ids=str)
def test_estimates_are_those_of_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient = before_nan(gradient_of(shape, dtype))
    for groups in (-(-shape[0] // 4), 20):  # exactly enough, and completed with zeros
        for own in (gradient, gradient.t().contiguous().t()):
            expected = reference_estimate_2to4(own, seed_of(-1), groups)
            found = in_poisoned_memory(cuda_estimate.estimate_2to4, own, seed_of(-1), groups)
            assert torch.equal(found != 0, expected != 0), "the same entries"
            # The interpreter cuts to bfloat16 where a GPU rounds.
            assert torch.allclose(found.double(), expected.double(), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("dtype", [SLOW_HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "groups"), PACKED_SHAPES)
def test_packed_estimates_are_those_of_the_specification(tokens: int, outputs: int, groups: int, dtype: torch.dtype) -> None:
    gradient, layout = gradient_of((tokens, outputs), dtype), layout_of(outputs, groups // 4, tokens == 64)
    gradient[5:6, 1] = float("inf")
    gradient[10:11] = -0.0
    for own in (before_nan(gradient), gradient.t().contiguous().t()):
        expected = reference_pack_estimate_2to4(own, seed_of(3), groups, *layout)
        found = in_poisoned_memory(cuda_estimate.pack_estimate_2to4, own, seed_of(3), groups, *layout)
        count = 2 * outputs * groups
        assert torch.equal(found[count:].view(torch.int16), expected[count:].view(torch.int16)), "metadata"
        # The interpreter cuts to bfloat16 where a GPU rounds.
        rounding = 2**-7 if dtype == torch.bfloat16 else 0
        assert torch.allclose(found[:count].double(), expected[:count].double(), rtol=rounding, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(found[:count].nan_to_num()), torch.signbit(expected[:count].nan_to_num())), "no -0.0"
