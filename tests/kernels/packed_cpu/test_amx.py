"""AMX products against float64 and the specification: ragged sides, many tokens, threads, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear

from bisparse.kernels.packed_cpu.amx import amx_works, multiply_amx
from bisparse.kernels.packed_cpu.layout import linear_bitmask, pack_bitmask

pytestmark = pytest.mark.skipif(not amx_works(), reason="this processor, or its system, has no AMX")


def sparse(rows: int, columns: int, fraction: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) < fraction)).bfloat16()


@pytest.mark.parametrize("shape", [(16, 32), (64, 256), (100, 72), (1, 5), (36, 300), (576, 1536)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 32, 40, 64, 65, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_float64(shape: tuple[int, int], tokens: int, with_bias: bool) -> None:
    weight = sparse(*shape)
    x = torch.randn(tokens, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16() if with_bias else None
    found = multiply_amx(x, *pack_bitmask(weight), bias, shape[0])
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    scale = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * scale).all())


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9, 1.0])
def test_any_density(fraction: float) -> None:
    weight = sparse(48, 96, fraction)
    x = torch.randn(8, 96).bfloat16()
    torch.testing.assert_close(multiply_amx(x, *pack_bitmask(weight), None, 48), linear(x, weight), rtol=2**-7, atol=1e-2)


def test_infinities_and_nan_reach_only_their_outputs() -> None:
    weight = sparse(32, 64)
    weight[3, 7], weight[4, 9] = math.inf, math.nan
    x = torch.ones(6, 64).bfloat16()
    x[2, 0] = math.nan
    found = multiply_amx(x, *pack_bitmask(weight), None, 32)
    assert bool(torch.isinf(found[[0, 1, 3, 4, 5], 3]).all())
    assert bool(found[:, 4].isnan().all()) and bool(found[2].isnan().all())
    fine = [row for row in range(32) if row not in (3, 4)]
    assert bool(torch.isfinite(found[0, fine]).all())


def test_threads_do_not_change_the_result() -> None:
    weight, x = sparse(1024, 512), torch.randn(20, 512).bfloat16()
    packed, before = pack_bitmask(weight), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(multiply_amx(x, *packed, None, 1024))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(5, 40), (2, 10, 40), (64, 40), (4, 8, 3, 40)])
def test_the_operator_uses_them_for_some_tokens(shape: tuple[int, ...]) -> None:
    weight, bias = sparse(20, 40), torch.randn(20).bfloat16()
    x = torch.randn(shape).bfloat16()
    found = linear_bitmask(x, pack_bitmask(weight), bias, 20)
    torch.testing.assert_close(found, linear(x, weight, bias), rtol=2**-7, atol=2e-2)
    noncontiguous = torch.randn(*shape[:-1], 80).bfloat16()[..., ::2]
    torch.testing.assert_close(
        linear_bitmask(noncontiguous, pack_bitmask(weight), bias, 20), linear(noncontiguous, weight, bias), rtol=2**-7, atol=2e-2
    )
