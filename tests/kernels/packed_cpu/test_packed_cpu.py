"""Products with packed matrices: format and every way to multiply, against dense matrices."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bisparse import solve
from bisparse.kernels.packed_cpu import layout, multiply
from bisparse.kernels.packed_cpu.instructions import Way, usable_ways
from bisparse.kernels.packed_cpu.layout import BitmaskPacked, linear_bitmask, pack_bitmask, packed_bytes, unpack_bitmask

ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
WAYS = [(dtype, way) for dtype in (torch.bfloat16, torch.float16, torch.float32) for way in usable_ways(dtype)]
ALL_WAYS = pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
SHAPES = [(4, 32), (1, 1), (7, 45), (64, 96), (130, 257), (8, 1600)]
DENSITIES = [0.0, 0.1, 0.5, 0.9, 1.0]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
"""Of the result, once; sums are float32."""


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


def assert_product(output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    scale = linear(x.double().abs(), weight.double().abs()) + (0 if bias is None else bias.double().abs())
    assert output.dtype == weight.dtype and output.shape == exact.shape
    smallest = torch.finfo(weight.dtype).tiny  # float16's are subnormal sooner
    assert ((output.double() - exact).abs() <= ROUNDING[weight.dtype] * exact.abs() + 2**-20 * scale + smallest).all()


def naively_packed(matrix: Tensor) -> tuple[list[float], list[int], list[int]]:
    """The format, entry by entry, from its description."""
    rows, columns = matrix.shape
    values, masks, starts = [], [], [0]
    for block in range(-(-rows // 4)):
        for group in range(-(-columns // 32)):
            for row in range(4 * block, 4 * block + 4):
                mask = 0
                for place, column in enumerate(range(32 * group, 32 * group + 32)):
                    if row < rows and column < columns and matrix[row, column] != 0:
                        values.append(float(matrix[row, column]))
                        mask |= 1 << place
                masks.append(mask)
        starts.append(len(values))
    return values, masks, starts


@ALL_DTYPES
@pytest.mark.parametrize("shape", [(4, 32), (3, 33), (9, 70)], ids=str)
def test_format_is_what_its_description_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = sparse(*shape, 0.5, dtype)
    values, masks, starts = naively_packed(matrix)
    packed = pack_bitmask(matrix)
    assert packed.values.tolist() == values + [0.0] * layout.PADDING
    assert [mask % 2**32 for mask in packed.masks.flatten().tolist()] == masks
    assert packed.starts.tolist() == starts
    size = sum(one.nbytes for one in packed)
    assert size == packed_bytes(*shape, len(values), dtype)


@ALL_DTYPES
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_the_matrix_back(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    matrix = sparse(*shape, density, dtype)
    packed = pack_bitmask(matrix)
    assert torch.equal(unpack_bitmask(packed, *shape), matrix + 0.0)
    assert torch.equal(layout.reference_unpack(*packed, *shape), matrix + 0.0)


def test_packing_in_bands_is_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = sparse(70, 65, 0.5, torch.bfloat16)
    whole = pack_bitmask(matrix)
    monkeypatch.setattr(layout, "BAND_ENTRIES", 700)
    for one, other in zip(pack_bitmask(matrix), whole, strict=True):
        assert torch.equal(one, other)


def test_special_numbers_come_back_and_negative_zero_is_zero() -> None:
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, 65504.0]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        matrix = special.to(dtype).repeat(5, 7)
        back = unpack_bitmask(pack_bitmask(matrix), 5, 49)
        assert torch.equal(back.isnan(), matrix.isnan()) and torch.equal(back.nan_to_num(), matrix.nan_to_num())
        assert not torch.signbit(back[back == 0]).any()


@ALL_WAYS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_multiplies(shape: tuple[int, int], dtype: torch.dtype, way: Way) -> None:
    for density in DENSITIES:
        weight = sparse(*shape, density, dtype)
        packed = pack_bitmask(weight)
        for tokens in (1, 2, 3, 4, 5, 7, 16):
            x, bias = sparse(tokens, shape[1], 1, dtype, seed=1), sparse(1, shape[0], 1, dtype, seed=2)[0]
            for added in (None, bias):
                for run in (multiply.multiply, multiply.multiply_bands):
                    assert_product(run(way, x, packed, added, shape[0]), x, weight, added)


@ALL_WAYS
def test_every_way_expands_bit_by_bit(dtype: torch.dtype, way: Way) -> None:
    # All float16 and bfloat16 numbers: nothing may be rounded, quieted or flushed on the way.
    if dtype == torch.float32:
        weight = sparse(64, 1024, 1.0, dtype)
    else:
        weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
    packed = pack_bitmask(weight)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    out = torch.full((64, 1024), float("nan"), dtype=dtype)
    multiply.expand(way, *packed, out, 0, 16)
    expected = torch.where(weight == 0, torch.zeros_like(weight), weight)
    assert torch.equal(out.view(bits), expected.view(bits))


@ALL_WAYS
def test_results_are_rounded_to_nearest_even_and_keep_infinity_and_nan(dtype: torch.dtype, way: Way) -> None:
    if dtype == torch.float32:
        pytest.skip("results are not rounded")
    # 1 + half an ulp, 1 + one and a half, a hair more than half; beyond the largest number; NaN.
    ulp = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    largest = torch.finfo(dtype).max
    rows = [[1, ulp / 2], [1 + ulp, ulp / 2], [1, ulp / 2 * (1 + ulp)], [largest, largest], [float("nan"), 1], [-1, -ulp / 2]]
    weight = torch.tensor(rows).to(dtype)
    exact = weight.float().sum(1)
    found = multiply.multiply(way, torch.ones(1, 2, dtype=dtype), pack_bitmask(weight), None, 6)[0]
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(7), exact.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("pattern", ["4:8-T", "2:4-T", "8:16-T", "16:32-T", "2:8", "6:8", "50%"])
def test_any_pattern_is_packed_at_its_density(pattern: str) -> None:
    weight = torch.randn(64, 128)
    solver = "greedy" if pattern.endswith("-T") else None  # which is not compiled for each pattern
    weight = (weight * solve(weight.abs(), pattern, solver).mask).bfloat16()
    packed = pack_bitmask(weight)
    x = torch.randn(3, 128).bfloat16()
    assert_product(linear_bitmask(x, packed, None, 64), x, weight, None)
    kept = int((weight != 0).sum())
    overhead = 2 * layout.PADDING + 8 * (16 + 1)
    assert sum(one.nbytes for one in packed) == 2 * kept + weight.numel() // 8 + overhead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    weight, x = sparse(1024, 512, 0.5, dtype), sparse(6, 512, 1, dtype, seed=1)
    packed, before, found = pack_bitmask(weight), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5) * 20:
            torch.set_num_threads(threads)
            found.append(linear_bitmask(x, packed, None, 1024))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (0, 33), (2, 0, 33), (1, 1, 1, 33)], ids=str)
def test_inputs_of_any_number_of_dimensions_and_of_no_tokens(shape: tuple[int, ...]) -> None:
    weight, bias = sparse(10, 33, 0.5, torch.float32), torch.randn(10)
    x = torch.randn(shape)
    for max_tokens in (0, 16):
        output = linear_bitmask(x, pack_bitmask(weight), bias, 10, max_tokens)
        torch.testing.assert_close(output, linear(x, weight, bias))


def test_inputs_and_biases_that_are_views() -> None:
    weight = sparse(12, 64, 0.5, torch.bfloat16)
    x, bias = sparse(64, 10, 1, torch.bfloat16).t()[::2], sparse(1, 24, 1, torch.bfloat16)[0, ::2]
    assert_product(linear_bitmask(x, pack_bitmask(weight), bias, 12), x, weight, bias)
    packed = pack_bitmask(weight.t().contiguous().t())
    assert torch.equal(unpack_bitmask(packed, 12, 64), weight + 0.0)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("columns", [0, 40])
def test_empty_matrices(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    packed = pack_bitmask(weight)
    assert torch.equal(unpack_bitmask(packed, rows, columns), weight)
    for max_tokens in (0, 16):
        output = linear_bitmask(torch.randn(3, columns), packed, None, rows, max_tokens)
        assert output.shape == (3, rows) and (columns > 0 or not output.any())


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_derivatives_twice(biased: bool) -> None:
    weight = sparse(10, 33, 0.5, torch.float64)
    x = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    bias = None if not biased else torch.randn(10, dtype=torch.float64, requires_grad=True)
    packed = pack_bitmask(weight)
    inputs = (x,) if bias is None else (x, bias)
    assert torch.autograd.gradcheck(lambda x, bias=None: linear_bitmask(x, packed, bias, 10), inputs)
    assert torch.autograd.gradgradcheck(lambda x, bias=None: linear_bitmask(x, packed, bias, 10), inputs)


def test_operators_obey_torch() -> None:
    matrix = sparse(9, 40, 0.5, torch.float32)
    packed = pack_bitmask(matrix)
    x, bias = torch.randn(2, 40, requires_grad=True), torch.randn(9, requires_grad=True)
    torch.library.opcheck(torch.ops.bisparse.linear_bitmask.default, (x, *packed, bias, 9, 16))
    torch.library.opcheck(torch.ops.bisparse.unpack_bitmask.default, (*packed, 9, 40))
    torch.library.opcheck(torch.ops.bisparse.pack_bitmask.default, (matrix,), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    packed = pack_bitmask(sparse(8, 64, 0.5, torch.bfloat16))
    x = torch.randn(2, 64).bfloat16()
    with pytest.raises(ValueError, match="int32"):
        pack_bitmask(torch.ones(4, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        pack_bitmask(torch.ones(4))
    with pytest.raises(ValueError, match=r"8 x 32"):
        linear_bitmask(x[:, :32], packed, None, 8)
    with pytest.raises(ValueError, match=r"12 x 64"):
        linear_bitmask(x, packed, None, 12)
    with pytest.raises(ValueError, match="float32"):
        linear_bitmask(x.float(), packed, None, 8)
    with pytest.raises(ValueError, match=r"bias of shape \(7,\)"):
        linear_bitmask(x, packed, torch.ones(7).bfloat16(), 8)
    with pytest.raises(ValueError, match="8 x 64"):
        unpack_bitmask(BitmaskPacked(packed.values, packed.masks[:1], packed.starts), 8, 64)


def test_without_vector_instructions_the_specification_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "usable_ways", lambda dtype: ())
    weight, x = sparse(10, 33, 0.5, torch.float32), torch.randn(3, 33)
    packed = pack_bitmask(weight)
    torch.testing.assert_close(linear_bitmask(x, packed, None, 10), linear(x, weight))
    assert torch.equal(unpack_bitmask(packed, 10, 33), weight + 0.0)
