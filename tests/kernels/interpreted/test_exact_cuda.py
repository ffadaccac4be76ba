"""The Triton kernels of the exact solver in Triton's interpreter: proofs, brute force, and the CPU kernels' answers."""

import math
from collections.abc import Iterator

import pytest
import torch
from test_kernels_exact import KINDS, as_matrix, numbers
from test_kernels_metadata import any_layout
from torch import Tensor

import oracle
from bisparse import Solution, solve
from bisparse.kernels.exact import ops, reference
from bisparse.kernels.exact.cuda import solve as cuda
from bisparse.kernels.exact.ops import BadScoreError
from bisparse.kernels.sparse24 import cuda_pack, pack
from bisparse.tiles import from_tiles, to_tiles

PROGRAMS = pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])


@pytest.fixture(autouse=True)
def _few_large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter pays for each step, not for each lane. `test_any_number_of_tiles` runs the sizes of the device.
    monkeypatch.setattr(cuda, "SWEEP_LANES", 512)
    monkeypatch.setattr(cuda, "REPAIR_LANES", 256)
    monkeypatch.setattr(cuda, "MIDDLE_BYTES", 1024)
    monkeypatch.setattr(cuda, "GROUP_ENTRIES", 8192)
    monkeypatch.setattr(cuda, "COLD_ALTERNATIONS", 3)  # leaves more to repair than the 8 of the device


@pytest.fixture
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`solve` as it runs on a CUDA tensor: each operator is the Triton kernel."""
    for name in ("exact_mask", "exact_solve", "exact_solve_integers"):
        monkeypatch.setattr(torch.ops.bisparse, name, getattr(cuda, name))
    yield


def all_kinds(m: int, each: int = 1, seed: int = 0) -> Tensor:
    return torch.cat([numbers(kind, each, m, seed) for kind in KINDS])


def check_proof(tiles: Tensor, n: int, exactly: bool, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
    """Solve, recompute every certificate, and compare the values with the CPU kernels'."""
    m = tiles.shape[-1]
    q, exponent = reference.quantise(tiles)
    prices, powers = start if start is not None else (None, None)
    mask, uv, found = cuda.exact_solve(as_matrix(tiles), n, m, exactly, prices, powers)
    assert (mask.dtype, uv.dtype, found.dtype) == (torch.bool, torch.int32, torch.int32)
    assert torch.equal(found.long(), exponent)
    fine = exponent != ops.NEEDS_EXACT
    masks = to_tiles(mask, m)
    assert bool(oracle.proved(q[fine], masks[fine], uv[0][fine], uv[1][fine], n, exactly).all())
    expected = to_tiles(ops.exact_solve(as_matrix(tiles), n, m, exactly)[0], m)
    assert torch.equal((q * masks).sum((1, 2))[fine], (q * expected).sum((1, 2))[fine])
    return masks, uv, found


# ---- M = 4 to 64 -----------------------------------------------------------------------------------------------------


@PROGRAMS
@pytest.mark.parametrize(
    ("m", "n"), [(8, 4), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(16, 8, marks=pytest.mark.slow)], ids=str
)
def test_prices_prove_every_mask(m: int, n: int, exactly: bool) -> None:
    check_proof(all_kinds(m), n, exactly)


@pytest.mark.slow
@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 1), (4, 3), (8, 1), (8, 7), (16, 4), (32, 16)], ids=str)
def test_prices_prove_every_mask_at_any_n(m: int, n: int, exactly: bool) -> None:
    kinds = KINDS if m < 32 else ["gaussian", "int4", "zeros"]
    check_proof(torch.cat([numbers(kind, 1, m, seed=1) for kind in kinds]), n, exactly)


@pytest.mark.slow
@PROGRAMS
def test_prices_prove_masks_of_side_64(exactly: bool) -> None:
    tiles = torch.cat([numbers(kind, 1, 64) for kind in ("gaussian", "zeros")])
    _, uv, found = check_proof(tiles, 32, exactly)
    drifted = tiles * (1 + 0.01 * torch.randn(tiles.shape))
    check_proof(drifted, 32, exactly, (uv, found))


@pytest.mark.slow
@PROGRAMS
def test_against_every_mask_there_is(exactly: bool) -> None:
    tiles = torch.cat([numbers(kind, 2, 4, seed=3) for kind in ("gaussian", "few values", "mostly zeros", "staircase")])
    q, _ = reference.quantise(tiles)
    for n in (1, 2):
        masks, _, _ = check_proof(tiles, n, exactly)
        for tile, kept in zip(q, masks, strict=True):
            assert oracle.kept(tile, kept) == oracle.brute_force(tile, n, exactly)


@pytest.mark.slow
@PROGRAMS
def test_same_mask_as_on_the_cpu_where_the_optimum_is_unique(exactly: bool) -> None:
    tiles = numbers("gaussian", 40, 8, seed=5)
    masks, _, _ = check_proof(tiles, 4, exactly)
    assert torch.equal(masks, to_tiles(ops.exact_solve(as_matrix(tiles), 4, 8, exactly)[0], 8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    tiles = numbers("gaussian", 12, 8).to(dtype)
    tiles[1] *= 2.0**-14  # subnormal in float16
    half = cuda.exact_solve(as_matrix(tiles), 4, 8, False, None, None)
    same(half, cuda.exact_solve(as_matrix(tiles).float(), 4, 8, False, None, None))
    same(cuda.exact_mask(as_matrix(tiles), 4, 8, False), (half[0], half[2] == ops.NEEDS_EXACT))


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_any_number_of_tiles_at_the_sizes_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = numbers("int4", 21, 8)
    expected, uv, found = check_proof(tiles, 4, False)
    monkeypatch.setattr(cuda, "SWEEP_LANES", 128)
    monkeypatch.setattr(cuda, "REPAIR_LANES", 32)
    for count, across in ((21, 7), (5, 1)):
        matrix = as_matrix(tiles[:count], across)
        mask, prices, exponent = cuda.exact_solve(matrix, 4, 8, False, None, None)
        # Neither the other tiles of a program nor their number change a mask or its prices.
        same((to_tiles(mask, 8), prices, exponent), (expected[:count], uv[:, :count], found[:count]))


@pytest.mark.slow
@PROGRAMS
def test_value_does_not_depend_on_the_start(exactly: bool) -> None:
    tiles = torch.cat([numbers("gaussian", 3, 8), numbers("int4", 3, 8)])
    _, uv, exponent = check_proof(tiles, 4, exactly)
    lowest = -(1 << 24) if exactly else 0
    garbage = torch.randint(lowest, 1 << 24, uv.shape, dtype=torch.int32)
    starts = [
        (uv, exponent),
        (uv >> 9, exponent - 9),
        (uv, torch.full_like(exponent, ops.NEEDS_EXACT)),
        (garbage, exponent),
        (garbage, exponent + 100),
    ]
    for start in starts:
        check_proof(tiles, 4, exactly, start)


@pytest.mark.slow
@PROGRAMS
def test_a_warm_start_from_the_optimum_keeps_mask_and_prices(exactly: bool) -> None:
    tiles = numbers("gaussian", 16, 8)
    first = check_proof(tiles, 4, exactly)
    same(check_proof(tiles, 4, exactly, first[1:]), first)


@pytest.mark.slow
@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 2), (8, 4)], ids=str)
def test_integers_of_55_bits(monkeypatch: pytest.MonkeyPatch, m: int, n: int, exactly: bool) -> None:
    monkeypatch.setattr(cuda, "WIDE_ALTERNATIONS", 1)
    q = torch.randint(0, 1 << 55, (3, m, m))
    q[1] = (1 << 55) - 1 - torch.randint(0, 3, (m, m))
    q[2] = torch.randint(0, 3, (m, m))
    mask, u, v = cuda.exact_solve_integers(q, n, exactly, None, None)
    assert (mask.dtype, u.dtype, v.dtype) == (torch.bool, torch.int64, torch.int64)
    assert bool(oracle.proved(q, mask, u, v, n, exactly).all())
    again, u, v = cuda.exact_solve_integers(q, n, exactly, u, v)
    assert torch.equal(again, mask) or bool(oracle.proved(q, again, u, v, n, exactly).all())


# ---- bad and hard input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow), pytest.param(-1.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("m", "n"), [(4, 2), (8, 4)], ids=str)
def test_a_score_that_is_no_score_marks_its_tile_and_no_other(m: int, n: int, number: float) -> None:
    scores = torch.rand(2 * m, 4 * m)
    scores[m + 1, 2 * m + 3] = number
    mask, coarse = cuda.exact_mask(scores, n, m, False)
    assert coarse.nonzero().tolist() == [[6]]
    clean = torch.where(torch.isfinite(scores) & (scores >= 0), scores, 0.5)
    expected = to_tiles(cuda.exact_mask(clean, n, m, False)[0], m)
    others = torch.arange(8) != 6
    assert torch.equal(to_tiles(mask, m)[others], expected[others])


@pytest.mark.slow
def test_outliers_and_dust_are_coarse_where_the_specification_says_so() -> None:
    for m, n in ((4, 2), (8, 4)):
        tiles = torch.rand(8, m, m) + 0.01
        tiles[1, 0, 3] = 1e8
        tiles[2] *= 2.0**-104
        tiles[3] *= 2.0**-130
        tiles[4] *= 1e37
        tiles[5] = -0.0
        tiles[6, 0] = 1e8
        tiles[7] = torch.where(torch.rand(m, m) < 0.5, 1e8, 0.0)
        expected = reference.quantise(tiles)[1] == ops.NEEDS_EXACT
        assert expected.tolist()[:4] == [False, True, True, True]
        assert torch.equal(cuda.exact_mask(as_matrix(tiles), n, m, False)[1], expected)
        assert torch.equal(cuda.exact_solve(as_matrix(tiles), n, m, False, None, None)[2] == ops.NEEDS_EXACT, expected)


def test_no_tiles() -> None:
    for shape in ((0, 8), (8, 0)):
        mask, prices, exponent = cuda.exact_solve(torch.zeros(shape), 4, 8, False, None, None)
        assert (mask.shape, prices.shape, exponent.shape) == (shape, (2, 0, 8), (0,))
        assert [tuple(result.shape) for result in cuda.exact_mask(torch.zeros(shape), 2, 4, False)] == [shape, (0,)]
    assert cuda.exact_solve_integers(torch.zeros(0, 8, 8, dtype=torch.int64), 4, False, None, None)[0].shape == (0, 8, 8)


@pytest.mark.slow
def test_strides_do_not_matter() -> None:
    wide = numbers("gaussian", 16, 8).reshape(32, 32)
    for view in (wide.t(), wide[::2, ::2], wide[:, 8:24]):
        same(cuda.exact_solve(view, 4, 8, False, None, None), cuda.exact_solve(view.contiguous(), 4, 8, False, None, None))
        same(cuda.exact_mask(view, 2, 4, False), cuda.exact_mask(view.contiguous(), 2, 4, False))


@pytest.mark.slow
def test_every_output_is_written() -> None:
    matrix = as_matrix(torch.cat([numbers("gaussian", 2, 8), numbers("zeros", 1, 8)]), 3)
    weight = torch.randn(32, 32).half()
    calls = [
        lambda: cuda.exact_solve(matrix, 4, 8, False, None, None),
        lambda: cuda.exact_mask(matrix, 2, 4, False),
        lambda: cuda_pack.pack_2to4_transposable(weight, *pack._flat(pack._cutlass_layouts(weight))),
    ]
    expected = [call() for call in calls]
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN or the largest number
    try:
        found = [call() for call in calls]
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        same(one, other)


# ---- 2:4 -------------------------------------------------------------------------------------------------------------


@PROGRAMS
def test_same_masks_at_2to4_as_on_the_cpu_ties_included(monkeypatch: pytest.MonkeyPatch, exactly: bool) -> None:
    monkeypatch.setattr(cuda, "MIDDLE_BYTES", 4096)
    tiles = torch.cat([all_kinds(4, each=20), numbers("gaussian", 36, 4, seed=9)])
    matrix = as_matrix(tiles, 256)
    same(cuda.exact_mask(matrix, 2, 4, exactly), ops.exact_mask(matrix, 2, 4, exactly))
    half = matrix.half()
    same(cuda.exact_mask(half, 2, 4, exactly), ops.exact_mask(half.float(), 2, 4, exactly))


@PROGRAMS
def test_masks_of_magnitudes_are_masks_of_the_weights_without_signs(exactly: bool) -> None:
    weight = as_matrix(all_kinds(4, 2)).t().contiguous()  # a program for each four rows
    weight = weight * torch.where(torch.rand(weight.shape) < 0.5, -1, 1)
    weight[0, 0] = float("-inf")
    weight[2, 21] = float("nan")
    for one in (weight, weight.bfloat16(), weight.t().contiguous().t()):
        expected = cuda.exact_mask(one.abs().contiguous(), 2, 4, exactly)
        same(cuda.exact_mask_of_magnitudes(one, exactly), expected)
        assert expected[1].any() and not expected[1].all()


@pytest.mark.slow
def test_2to4_of_widths_that_no_program_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    for across in (1, 5, 33):
        monkeypatch.setattr(cuda, "MIDDLE_BYTES", 512)
        matrix = as_matrix(numbers("int4", across, 4), across)
        same(cuda.exact_mask(matrix, 2, 4, False), ops.exact_mask(matrix, 2, 4, False))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_packed_operands_are_those_of_the_specification_bit_by_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(32, 96).to(dtype)
    weight[:, :64] = torch.randint(-2, 3, (32, 64)).to(dtype)  # ties, zeros, and groups with fewer than two
    weight[8, 64:68], weight[9, 65] = 0, -0.0
    other = any_layout(32, 96, 5), any_layout(96, 32, 6, 8, 8)
    for layouts in (pack._cutlass_layouts(weight), other):
        flat = pack._flat(layouts)
        found = cuda_pack.pack_2to4_transposable(weight, *flat)
        for one, expected in zip(found, pack.reference_pack_2to4_transposable(weight, *flat), strict=True):
            assert (one.dtype, one.shape) == (expected.dtype, expected.shape)
            assert torch.equal(one.view(torch.uint8), expected.view(torch.uint8))
        changed = weight + torch.randn(32, 96).to(dtype)
        changed[~found[0]] = torch.nan  # what the mask drops is never looked at
        again = cuda_pack.pack_2to4(changed, found[0], *flat)
        for one, expected in zip(again, pack.reference_pack_2to4(changed, found[0], *flat), strict=True):
            assert torch.equal(one.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("m", [4, 6, pytest.param(16, marks=pytest.mark.slow)])
def test_the_largest_of_each_group_and_the_lowest_index_of_equals(m: int) -> None:
    for groups in (torch.randint(0, 4, (300, m)), torch.randn(7, m).bfloat16(), torch.zeros(1, m, dtype=torch.float64)):
        for n in (1, m // 2, m):
            assert torch.equal(cuda.keep_largest(groups, n), reference.keep_largest(groups, n))
    assert cuda.keep_largest(torch.zeros(0, m), 1).shape == (0, m)


# ---- the main path ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [pytest.param("2:4-T", marks=pytest.mark.slow), "4:8-T"])
def test_solve_from_end_to_end(on_the_device: None, pattern: str) -> None:
    scores = numbers("gaussian", 6, 8).reshape(16, 24)[:15, :21]  # the sides are no multiples
    solution = solve(scores, pattern)
    assert isinstance(solution, Solution)
    assert solution.check().gap <= 1e-6 * solution.value
    again = solve(scores * 1.01, pattern, warm_start=solution)
    assert again.check().gap <= 1e-6 * again.value


def test_solve_finishes_coarse_tiles_as_given(on_the_device: None) -> None:
    scores = torch.rand(8, 16)
    scores[3, 3] = 1e8
    solution = solve(scores, "4:8-T")
    assert solution.check().gap == pytest.approx(0, abs=1e-6)
    assert solution.certificate is not None and bool((solution.certificate.exponent != ops.NEEDS_EXACT).all())


def test_solve_finds_a_bad_score(on_the_device: None) -> None:
    for pattern in ("2:4-T", "4:8-T"):
        scores = torch.rand(8, 8)
        scores[2, 5] = torch.nan
        with pytest.raises(BadScoreError, match=r"\(2, 5\)"):
            solve(scores, pattern)


@pytest.mark.slow
def test_tiles_are_cut_as_everywhere() -> None:
    matrix = from_tiles(numbers("gaussian", 6, 8), 16, 24)
    mask, _, _ = cuda.exact_solve(matrix, 4, 8, False, None, None)
    assert torch.equal(mask, ops.exact_solve(matrix, 4, 8, False)[0])
