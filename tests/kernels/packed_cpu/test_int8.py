"""Matrices in int8 with a scale per row: rounded to the nearest step, zeros kept, and products of the rounded matrix."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from bisparse.kernels.packed_cpu.direct import Product
from bisparse.kernels.packed_cpu.int8 import LARGEST, dequantized, linear_bitmask_int8, pack_int8
from bisparse.kernels.packed_cpu.multiply import product_int8


def sparse(rows: int, columns: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    return matrix * (torch.rand(rows, columns, generator=generator) < fraction)


@given(rows=st.integers(1, 9), columns=st.integers(0, 70), fraction=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_values_are_the_nearest_steps_and_zeros_stay(rows: int, columns: int, fraction: float, seed: int) -> None:
    matrix = sparse(rows, columns, fraction, seed)
    found = dequantized(pack_int8(matrix), rows, columns)
    steps = matrix.abs().amax(1, keepdim=True).double() / LARGEST if columns else torch.zeros(rows, 1)
    assert found.shape == matrix.shape
    assert bool(((found.double() - matrix.double()).abs() <= 0.5 * steps * (1 + 1e-5)).all())
    assert bool((found[matrix == 0] == 0).all())
    largest = found.abs().amax(1) if columns else matrix.new_zeros(rows)
    torch.testing.assert_close(largest, matrix.abs().amax(1) if columns else largest)


@pytest.mark.parametrize("shape", [(16, 32), (100, 72), (1, 5), (36, 300), (64, 256), (8, 4160), (4, 65600)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 16, 17, 40, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_the_rounded_matrix(shape: tuple[int, int], tokens: int, with_bias: bool) -> None:
    packed = pack_int8(sparse(*shape))
    x = torch.randn(tokens, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16() if with_bias else None
    weight = dequantized(packed, *shape).double()
    exact = linear(x.double(), weight, None if bias is None else bias.double())
    scale = linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
    with torch.no_grad():
        results = linear_bitmask_int8(x, packed, bias, shape[0]), Product(packed, *shape, 1)(x, bias)
    for found in results:
        assert found.shape == exact.shape and found.dtype == torch.bfloat16
        assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * scale).all())


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_every_step_is_multiplied_as_it_is_in_every_place(tokens: int) -> None:
    """One-hot inputs give the columns of the rounded matrix, in which each place has each number from -127 to 127."""
    places, steps = torch.arange(32), torch.arange(-127, 128)
    matrix = torch.zeros(32, len(steps), 64)
    matrix[places, :, places] = steps.float()
    matrix[places, :, places + 32] = 127.0  # the step of every row is 1
    matrix = matrix.flatten(0, 1)
    packed = pack_int8(matrix.bfloat16())
    with torch.no_grad():
        parts = [linear_bitmask_int8(one, packed, None, len(matrix)) for one in torch.eye(64).bfloat16().split(tokens)]
    assert torch.equal(torch.cat(parts).T.float(), matrix)


def test_gradients_of_input_and_bias() -> None:
    packed = pack_int8(sparse(12, 40))
    weight = dequantized(packed, 12, 40)
    x, bias = torch.randn(2, 3, 40).bfloat16().requires_grad_(), torch.zeros(12).bfloat16().requires_grad_()
    linear_bitmask_int8(x, packed, bias, 12).float().square().sum().backward()
    other = x.detach().float().requires_grad_()
    linear(other, weight).square().sum().backward()
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad.float(), other.grad, rtol=0.03, atol=0.3)
    torch.testing.assert_close(bias.grad.float(), 2 * linear(other, weight).sum((0, 1)).detach(), rtol=0.03, atol=0.3)


def test_without_bfloat16_products_the_specification_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = pack_int8(sparse(12, 40)), torch.randn(5, 40).bfloat16()
    expected = product_int8(x, packed, None, 12)
    monkeypatch.setattr("bisparse.kernels.packed_cpu.multiply.usable_ways", lambda dtype: ())
    torch.testing.assert_close(product_int8(x, packed, None, 12), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_int8_cannot_hold_is_refused(value: float) -> None:
    matrix = sparse(4, 8)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinities"):
        pack_int8(matrix)
    with pytest.raises(ValueError, match="expected a float matrix"):
        pack_int8(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="convert the input to bfloat16"):
        linear_bitmask_int8(torch.zeros(1, 8), pack_int8(sparse(4, 8)), None, 4)


@torch.no_grad()
def test_a_compiled_function_calls_the_operator() -> None:
    packed, x = pack_int8(sparse(12, 64)), torch.randn(2, 64).bfloat16()
    compiled = torch.compile(lambda x: linear_bitmask_int8(x, packed, None, 12) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear_bitmask_int8(x, packed, None, 12) + 1)
