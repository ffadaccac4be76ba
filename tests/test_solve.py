"""The main path: every structure's best mask, layouts, remainders, exactness, warm starts, and bad input."""

import dataclasses
import math
import re
import time
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import oracle
from bisparse import Pattern, Solution, solve, verify
from bisparse._solve import _start_of
from bisparse.kernels.exact import ops
from bisparse.pattern import Paired, Sequential, Unstructured
from bisparse.solution import Certificate
from bisparse.solvers import Exact, Greedy
from bisparse.tiles import Layout, LayoutKind, from_matrices, pad_to_multiple, to_matrices, to_tiles

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def whole_numbers(*shape: int, largest: int = 100, seed: int = 0) -> Tensor:
    return torch.randint(0, largest, shape, generator=torch.Generator().manual_seed(seed))


# ---- structures whose groups stand alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("2:4", "plain"),
        ("1:4", "plain"),
        ("3:5", "plain"),
        ("4:8-seq", "seq"),
        ("3:4-seq", "seq"),
        ("4:8-paired", "paired"),
        ("2:2", "plain"),
    ],
)
def test_every_group_is_the_best_of_all_choices(pattern: str, kind: str, dtype: torch.dtype) -> None:
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern | Sequential | Paired)
    scores = whole_numbers(3, 3 * structure.m, largest=12).to(dtype)
    solution = solve(scores, pattern).check()
    assert verify(solution.mask, pattern)
    for group, mask in zip(
        scores.unflatten(1, (-1, structure.m)).flatten(0, 1),
        solution.mask.unflatten(1, (-1, structure.m)).flatten(0, 1),
        strict=True,
    ):
        assert oracle.kept(group, mask) == oracle.best_group(group, structure.n, kind)
    assert solution.certificate is None
    assert solution.gap == 0


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), percent=st.integers(1, 100), seed=st.integers(0, 99))
def test_unstructured_keeps_the_largest(rows: int, columns: int, percent: int, seed: int) -> None:
    scores, structure = whole_numbers(rows, columns, largest=9, seed=seed), Unstructured(percent / 100)
    solution = solve(scores, structure).check()
    count = structure.kept(scores.numel())
    assert int(solution.mask.sum()) == count
    assert solution.value == sum(sorted(scores.flatten().tolist(), reverse=True)[:count])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("2:4", [1, 1, 0, 0, 1, 1, 0, 0]),
        ("4:8", [1, 1, 1, 1, 0, 0, 0, 0]),
        ("4:8-paired", [1, 1, 1, 1, 0, 0, 0, 0]),
        ("50%", [1, 1, 1, 1, 0, 0, 0, 0]),
        ("4:8-seq", [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_of_equal_scores_the_lower_index_is_kept(pattern: str, expected: list[int]) -> None:
    # Sequential is the exception that its words make: the first best run of zeros is taken.
    for dtype in (torch.float32, torch.int8):
        assert solve(torch.ones(1, 8, dtype=dtype), pattern).mask[0].int().tolist() == expected


def test_integers_beyond_float_precision_are_compared_as_they_are() -> None:
    large = 1 << 60
    assert solve(torch.tensor([[large, large + 1, large + 2, large]]), "2:4").mask[0].tolist() == [False, True, True, False]


def test_pairs_and_runs_of_integers_beyond_float_precision() -> None:
    large = 1 << 60
    assert solve(torch.tensor([[large, large, large, large + 1]]), "2:4-paired").mask[0].tolist() == [False, False, True, True]
    assert solve(torch.tensor([[large, large, large, large + 1]]), "2:4-seq").mask[0].tolist() == [False, False, True, True]


def test_a_structure_is_taken_wherever_its_text_is() -> None:
    scores = torch.rand(8, 8)
    for text in ("2:4", "4:8-T", "4:8-seq", "4:8-paired", "50%"):
        assert torch.equal(solve(scores, text).mask, solve(scores, Pattern.parse(text)).mask)
    assert torch.equal(solve(scores, "4:8-T", "exact").mask, solve(scores, "4:8-T").mask)


def test_each_matrix_of_a_weight_has_its_own_unstructured_share() -> None:
    scores = torch.cat([torch.zeros(4, 4), torch.ones(4, 4)])
    parts = solve(scores, "50%", layout=Layout(LayoutKind.PACKED, parts=2)).mask
    assert [int(part.sum()) for part in parts.chunk(2)] == [8, 8]
    assert int(solve(scores, "50%").mask[:4].sum()) == 0


# ---- layouts and remainders ------------------------------------------------------------------------------------------

WEIGHTS = [
    pytest.param((6, 8), None, id="linear"),
    pytest.param((8, 6), Layout(LayoutKind.TRANSPOSED), id="transposed"),
    pytest.param((12, 8), Layout(LayoutKind.PACKED, parts=3), id="packed"),
    pytest.param((3, 8, 5), Layout(LayoutKind.EXPERTS), id="experts"),
    pytest.param((8, 6, 3), None, id="conv1d"),
    pytest.param((8, 4, 3, 3), None, id="conv2d"),
    pytest.param((8, 3, 2, 2, 2), None, id="conv3d"),
    pytest.param((8, 4, 3), Layout(LayoutKind.CONV, groups=2), id="grouped"),
]


@pytest.mark.parametrize("solver", [None, Greedy()], ids=ids)
@pytest.mark.parametrize("pattern", ["2:4-T", "1:3-T", "2:4", "4:8-seq", "50%"])
@pytest.mark.parametrize(("shape", "layout"), WEIGHTS)
def test_mask_obeys_on_every_matrix_of_every_layout(
    shape: tuple[int, ...], layout: Layout | None, pattern: str, solver: Greedy | None
) -> None:
    scores = torch.rand(shape)
    solution = solve(scores, pattern, solver, layout=layout)
    assert solution.mask.shape == scores.shape
    assert solution.mask.dtype == torch.bool
    assert solution.mask.is_contiguous()
    assert verify(solution.mask, pattern, layout=layout)
    assert verify(scores * solution.mask, pattern, layout=layout)
    if solver is None:
        solution.check()


@pytest.mark.parametrize(("shape", "layout"), WEIGHTS)
def test_every_tile_of_every_layout_is_the_best(shape: tuple[int, ...], layout: Layout | None) -> None:
    # Whole numbers, so that rounding to 24 bits changes nothing; the padding is the oracle's own.
    scores = whole_numbers(*shape).float()
    solution = solve(scores, "2:4-T", layout=layout).check()
    best = Fraction(0)
    for matrix in to_matrices(scores, solution.layout):
        for tile in to_tiles(pad_to_multiple(matrix, 4), 4):
            best += oracle.brute_force(tile, 2)
    assert solution.value == best
    assert solution.bound == best
    assert solution.gap == 0


def test_a_bare_3d_tensor_is_a_convolution_and_tiles_can_be_given_as_experts() -> None:
    tiles = torch.rand(5, 4, 4)
    mask = solve(tiles, "2:4-T", layout=Layout(LayoutKind.EXPERTS)).mask
    assert torch.equal(mask, Exact().solve_tiles(tiles, 2))


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), pattern=st.sampled_from(["2:4-T", "2:3-T", "4:8-T", "2:4", "2:4-seq"]))
def test_sizes_that_m_does_not_divide(rows: int, columns: int, pattern: str) -> None:
    scores = whole_numbers(rows, columns).float()
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern | Sequential)
    padded = solve(scores, pattern).check()
    assert verify(padded.mask, pattern)
    divides = columns % structure.m == 0 and ("T" not in pattern or rows % structure.m == 0)
    dense = solve(scores, pattern, remainder="dense")
    if divides:
        assert torch.equal(dense.mask, padded.mask)
        assert torch.equal(solve(scores, pattern, remainder="error").mask, padded.mask)
        return
    assert bool(dense.mask.all())
    assert dense.retained == 1
    message = (
        rf"{structure.m} does not divide the sides of a {rows} x {columns} matrix at {pattern}; pass remainder='pad' or 'dense'"
    )
    with pytest.raises(ValueError, match=message):
        solve(scores, pattern, remainder="error")


def test_padding_takes_no_place_from_real_scores() -> None:
    # One row of 5: padded to 8 columns, the tile at the edge may keep its one column whole.
    assert solve(torch.tensor([[1.0, 3, 2, 1, 1]]), "2:4-T").mask.int().tolist() == [[0, 1, 1, 0, 1]]
    assert solve(torch.tensor([[1.0], [3], [2], [1], [1]]), "2:4-T").mask.flatten().int().tolist() == [0, 1, 1, 0, 1]
    assert solve(torch.ones(1, 5), "2:4").mask.int().tolist() == [[1, 1, 0, 0, 1]]


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "50%", "2:4-seq", "2:4-paired"])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (0, 4, 4), (4, 4, 0), (0, 4, 3, 3)])
def test_empty_tensors(shape: tuple[int, ...], pattern: str) -> None:
    solution = solve(torch.zeros(shape), pattern)
    assert solution.mask.shape == shape
    assert (solution.value, solution.retained) == (0, 1)
    assert solution.check().gap == 0


# ---- exactness in the numbers that were given ------------------------------------------------------------------------


def exact_gap(solution: Solution) -> Fraction:
    """Bound minus value in fractions of the given scores, from the certificate, by code of the tests alone."""
    certificate, pattern = solution.certificate, solution.pattern
    assert certificate is not None and isinstance(pattern, Pattern)
    gap = Fraction(0)
    pairs = zip(to_tiles(solution.scores, pattern.m), to_tiles(solution.mask, pattern.m), strict=True)
    for index, (tile, mask) in enumerate(pairs):
        unit = Fraction(2) ** -int(certificate.exponent[index])
        u, v = ([int(price) * unit for price in side[index].tolist()] for side in (certificate.u, certificate.v))
        assert solution.exactly or min(*u, *v) >= 0
        gap += oracle.dual_bound(tile, u, v, pattern.n) - oracle.kept(tile, mask)
    return gap


def hard_scores(dtype: torch.dtype, m: int) -> Tensor:
    numbers = torch.randn(2 * m, 2 * m, dtype=torch.float64).abs()
    numbers[0, 0] = 1e8  # one outlier in the first tile
    numbers[:m, m:] *= 1 + 2.0**-40 * torch.rand(m, m, dtype=torch.float64)
    numbers[m:, :m] = torch.randint(0, 3, (m, m)).double()
    numbers[m:, m:] *= torch.exp(20 * torch.randn(m, 1)) * torch.exp(20 * torch.randn(1, m))
    if dtype.is_floating_point:
        return numbers.clamp(max=1e300).to(dtype)
    return (numbers.clamp(max=1e8) * 2.0**30).long().to(dtype)


def allowed_gap(scores: Tensor, pattern: Pattern, bits: int) -> Fraction:
    """How far rounding to so many bits of each tile's largest score may move the optimum."""
    largest = sum((oracle.fractions(tile).max() for tile in to_tiles(scores, pattern.m)), Fraction(0))
    return largest * pattern.n * pattern.m / 2**bits


@pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
@pytest.mark.parametrize("pattern", ["2:4-T", "4:8-T", "3:8-T", "8:16-T", "2:5-T"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=ids)
def test_the_gap_is_the_one_in_the_given_numbers(dtype: torch.dtype, pattern: str, exactly: bool) -> None:
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern)
    scores = hard_scores(dtype, structure.m)
    for strict in (True, False):
        solution = solve(scores, pattern, Exact(exactly, strict=strict)).check()
        gap = exact_gap(solution)
        fine = strict or dtype != torch.float32
        assert 0 <= gap <= allowed_gap(scores, structure, 52 if fine else 24)
        assert solution.gap == pytest.approx(float(gap), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
def test_subnormal_and_extreme_numbers(dtype: torch.dtype, exactly: bool) -> None:
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    for scale in (tiny, tiny / 2**10, huge / 8):
        scores = whole_numbers(4, 4, largest=8).to(dtype) * scale
        solution = solve(scores, "2:4-T", Exact(exactly)).check()
        assert oracle.kept(scores, solution.mask) == oracle.brute_force(scores, 2, exactly)
        assert exact_gap(solution) == 0
        if scale < 1 or dtype != torch.float64:
            assert solution.gap == 0
    mixed = whole_numbers(4, 4, largest=8).to(dtype) * tiny
    mixed[1, 1], mixed[2, 3] = huge / 4, huge / 8
    solution = solve(mixed, "2:4-T", Exact(exactly)).check()
    gap = exact_gap(solution)
    lost = oracle.brute_force(mixed, 2, exactly) - oracle.kept(mixed, solution.mask)
    assert lost <= gap <= allowed_gap(mixed, Pattern(2, 4, True), 52)
    assert solution.gap == pytest.approx(float(gap), rel=1e-12, abs=0)
    assert solution.gap > 0 or lost == 0


def test_largest_integers_there_are() -> None:
    largest = torch.iinfo(torch.int64).max
    scores = largest - whole_numbers(8, 8, largest=5000)
    solution = solve(scores, "2:4-T").check()
    gap = exact_gap(solution)
    assert solution.gap == pytest.approx(float(gap), rel=1e-12, abs=0)
    assert 0 < gap <= allowed_gap(scores, Pattern(2, 4, True), 52)
    lost = sum(oracle.brute_force(tile, 2) for tile in to_tiles(scores, 4)) - oracle.kept(scores, solution.mask)
    assert lost <= gap


def test_one_outlier_does_not_ruin_the_rest_of_its_tile() -> None:
    # In 24 bits of 1e8 the other scores are all below one unit.
    for m, n in ((4, 2), (8, 4), (16, 8)):
        scores = torch.rand(m, m)
        scores[m // 2, 1] = 1e8
        solution = solve(scores, f"{n}:{m}-T").check()
        assert bool(solution.mask[m // 2, 1])
        assert exact_gap(solution) <= n * m / Fraction(2**25)  # half a unit of 1e8 in 52 bits, for each that is kept
        assert oracle.kept(scores, solution.mask) == oracle.kept(scores, solve(scores.double(), f"{n}:{m}-T").mask)


@pytest.mark.parametrize("pattern", ["2:4-T", "4:8-T", "8:16-T", "16:32-T", "32:64-T"])
def test_rounding_to_24_bits_costs_no_more_than_is_said(pattern: str) -> None:
    structure = Pattern.parse(pattern)
    assert isinstance(structure, Pattern)
    m, n = structure.m, structure.n
    scores = torch.randn(2 * m, m).abs()
    solution = solve(scores, pattern).check()
    allowed = sum((oracle.fractions(tile).max() for tile in to_tiles(scores, m)), Fraction(0)) * n * m / 2**24
    assert 0 <= exact_gap(solution) <= allowed
    assert solution.gap <= float(allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_all_dtypes_against_all_masks(dtype: torch.dtype) -> None:
    scores = whole_numbers(8, 8, largest=100).to(dtype)
    solution = solve(scores, "2:4-T").check()
    assert solution.value == sum(oracle.brute_force(tile, 2) for tile in to_tiles(scores, 4))
    exactly = solve(scores, "2:4-T", Exact(exactly=True)).check()
    assert exactly.value == sum(oracle.brute_force(tile, 2, exactly=True) for tile in to_tiles(scores, 4))


# ---- warm starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
@pytest.mark.parametrize("pattern", ["2:4-T", "4:8-T", pytest.param("8:16-T", marks=pytest.mark.slow), "16:32-T"])
def test_value_does_not_depend_on_the_start(pattern: str, exactly: bool) -> None:
    solver = Exact(exactly)
    scores = whole_numbers(32, 64, largest=1 << 16).float()
    others = [
        scores,
        scores + whole_numbers(32, 64, largest=500, seed=1),
        scores * 2.0**40,
        scores * 2.0**-90,
        whole_numbers(32, 64, seed=2).float(),
        scores * 0,
    ]
    cold = solve(scores, pattern, solver).check()
    for other in others:
        earlier = solve(other, pattern, solver)
        warm = solve(scores, pattern, solver, warm_start=earlier).check()
        assert warm.value == cold.value
        assert solve(scores, pattern, solver, warm_start=warm).check().value == cold.value


def test_a_start_from_a_solution_of_the_other_program_or_without_prices() -> None:
    scores = torch.randn(16, 16).abs()
    best = solve(scores, "4:8-T").value
    for earlier in (solve(scores, "4:8-T", Exact(exactly=True)), solve(scores, "4:8-T", Greedy())):
        assert solve(scores, "4:8-T", warm_start=earlier).check().value == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("largest", [1e9, 1e30])  # its tile needs more than 24 bits, or more than 52
@pytest.mark.parametrize("pattern", ["4:8-T", "8:16-T", "16:32-T"])
def test_a_start_that_holds_a_tile_of_52_bits_is_a_start_for_the_others(
    pattern: str, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(64, 128).abs()
    scores[0, 0] = largest
    earlier = solve(scores, pattern)
    certificate = earlier.certificate
    assert certificate is not None and certificate.u.dtype == torch.int64
    started = []
    given = ops.exact_solve

    def noticed(*arguments: Any) -> Any:
        started.append(arguments[4])
        return given(*arguments)

    monkeypatch.setattr(ops, "exact_solve", noticed)
    for other in (scores, scores * 1.001, scores.flip(0)):
        assert solve(other, pattern, warm_start=earlier).check().value == pytest.approx(solve(other, pattern).value, rel=1e-6)
    u, v, exponent = started[0]
    assert u.dtype == v.dtype == exponent.dtype == torch.int32
    assert not bool((exponent[1:] == ops.NEEDS_EXACT).any())
    assert torch.equal(u[1:].long(), certificate.u[1:])


@pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
@given(data=st.data(), m=st.sampled_from([2, 3, 5, 7, 4, 8, 16]), seed=st.integers(0, 2**32 - 1))
def test_any_start_gives_the_optimum_and_its_proof(exactly: bool, data: st.DataObject, m: int, seed: int) -> None:
    # Starts of other scores, scales and dtypes, and prices that never were a solution's.
    structure = Pattern(data.draw(st.integers(1, m - 1)), m, True)
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        dtype, ties = data.draw(dtypes), data.draw(st.booleans())
        numbers = torch.rand(2 * m, m, generator=generator, dtype=torch.float64)
        numbers = (4 * numbers).floor() if ties else numbers
        if not dtype.is_floating_point:
            return (numbers * data.draw(st.sampled_from([9, 2**28]))).to(dtype)
        return (numbers * 2.0 ** data.draw(st.integers(-100, 100))).to(dtype)

    scores, other, solver = drawn(), drawn(), Exact(exactly)
    earlier = solve(other, structure, solver)
    certificate = earlier.certificate
    assert certificate is not None
    if data.draw(st.booleans()):
        far = data.draw(st.sampled_from([1 << 20, 1 << 25, 1 << 31, 1 << 62]))
        u, v = torch.randint(-far, far, (2, 2, m), generator=generator)
        exponent = torch.randint(-300, 300, (2,), generator=generator)
        garbage = Certificate(u, v, exponent, exactly)
        earlier = dataclasses.replace(earlier, certify=lambda: garbage)
    warm = solve(scores, structure, solver, warm_start=earlier).check()
    best = oracle.linear_program(to_tiles(scores, m), structure.n, exactly)
    assert warm.value == pytest.approx(best.sum(), rel=1e-6)
    assert warm.gap <= float(allowed_gap(scores, structure, 24))
    assert exact_gap(warm) <= allowed_gap(scores, structure, 24)


def test_a_start_of_a_far_larger_scale_where_no_vector_kernel_exists() -> None:
    earlier = solve(torch.rand(60, 3) * 1e30, "1:3-T", Exact(exactly=True))
    solve(torch.rand(60, 3), "1:3-T", Exact(exactly=True), warm_start=earlier).check()


def test_a_start_that_does_not_fit() -> None:
    scores = torch.rand(16, 16)
    with pytest.raises(ValueError, match="warm_start is a solution at 2:4-T, not 4:8-T"):
        solve(scores, "4:8-T", warm_start=solve(scores, "2:4-T"))
    with pytest.raises(ValueError, match="warm_start has prices of 2 tiles, these scores have 4"):
        solve(scores, "4:8-T", warm_start=solve(scores[:8], "4:8-T"))


def test_a_start_from_another_device_is_moved() -> None:
    scores = torch.rand(16, 16)
    earlier = solve(scores, "4:8-T")
    moved = _start_of(earlier, scores.to("meta"), Pattern(4, 8, True))
    assert moved is not None and {one.device.type for one in (moved.u, moved.v, moved.exponent)} == {"meta"}
    assert _start_of(earlier, scores, Pattern(4, 8, True)) is earlier.certificate, "nothing is copied in place"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "4:8-T", "50%", "2:4-seq", "2:4-paired", "3:5-T"])
@pytest.mark.parametrize(
    ("number", "what"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (-(2.0**-20), "-9.5"), (-5.0, "-5.0")]
)
@pytest.mark.parametrize("place", [(0, 0), (5, 13), (9, 9)])
def test_a_score_that_is_no_score(pattern: str, number: float, what: str, place: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = torch.ones(10, 16, dtype=dtype)
        scores[place] = number
        with pytest.raises(ValueError, match=rf"scores of shape \(10, 16\) hold {what}.* at index \({place[0]}, {place[1]}\)"):
            solve(scores, pattern)


def test_the_remedy_is_named() -> None:
    with pytest.raises(ValueError, match=r"scores are magnitudes: pass weight\.abs\(\)"):
        solve(-torch.ones(4, 4), "2:4-T")
    with pytest.raises(ValueError, match="repair or exclude that weight first"):
        solve(torch.full((4, 4), math.nan), "2:4-T")
    with pytest.raises(ValueError, match=r"hold -1 at index \(0, 0\); they must be finite and >= 0"):
        solve(-torch.ones(4, 4, dtype=torch.int32), "2:4-T")
    with pytest.raises(ValueError, match="hold nan at"):
        solve(torch.full((5, 4), math.nan), "2:4-T", remainder="dense")


def test_negative_zero_is_zero() -> None:
    scores = torch.tensor([[0.0, -0.0, 1.0, -0.0]] * 4)
    for pattern in ("2:4", "2:4-T", "2:4-seq"):
        solve(scores, pattern).check()


@pytest.mark.parametrize("solver", [Exact(), Greedy()], ids=ids)
def test_every_solver_is_shielded_from_bad_scores(solver: Exact | Greedy) -> None:
    scores = torch.ones(8, 8)
    scores[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"hold nan at index \(3, 4\)"):
        solve(scores, "4:8-T", solver)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.rand(4), "a weight of 1 dimensions has no GEMM layout"),
        (torch.rand(()), "a weight of 0 dimensions has no GEMM layout"),
        (torch.rand(1, 1, 1, 1, 1, 1), "a weight of 6 dimensions has no GEMM layout"),
        ([[1.0, 2.0]], "scores must be a torch tensor, not list"),
        (None, "scores must be a torch tensor, not NoneType"),
        (torch.ones(4, 4).bool(), r"scores of dtype torch\.bool cannot be solved; convert them to float32"),
        (torch.ones(4, 4, dtype=torch.complex64), r"scores of dtype torch\.complex64"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), r"scores of dtype torch\.float8_e4m3fn cannot be solved"),
        (torch.ones(4, 4).to_sparse(), r"plain dense tensor .*, not a Tensor of layout torch\.sparse_coo .*to_dense"),
        (torch.ones(4, 4, device="meta"), "plain dense tensor that holds numbers, not a Tensor of .* on meta"),
        (TwoTensor(torch.ones(4, 4), torch.ones(4, 4)), "plain dense tensor .*, not a TwoTensor"),
    ],
)
def test_what_are_no_scores(scores: object, message: str) -> None:
    for pattern in ("2:4", "2:4-T"):
        with pytest.raises(ValueError, match=message):
            solve(scores, pattern)


def test_a_view_that_negates_is_read_as_what_it_shows() -> None:
    scores = torch.rand(8, 8)
    negated = torch.complex(scores, -scores).conj().imag
    assert negated.is_neg()
    for pattern in ("2:4", "2:4-T", "4:8-T"):
        assert torch.equal(solve(negated, pattern).mask, solve(scores, pattern).mask)


def test_what_is_no_solver_layout_or_solution_is_refused() -> None:
    scores = torch.rand(8, 8)
    for wrong, hint in (
        ("exakt", "did you mean 'exact'?"),
        ("Greedy", "did you mean 'greedy'?"),
        (Exact, "expected a Solver or one of 'exact'"),
    ):
        with pytest.raises(ValueError, match=f"solver=.*{re.escape(hint)}"):
            solve(scores, "2:4-T", wrong)
    with pytest.raises(ValueError, match="layout='conv': expected an instance of Layout"):
        solve(scores, "2:4-T", layout="conv")
    with pytest.raises(ValueError, match="warm_start=True: expected an instance of Solution"):
        solve(scores, "4:8-T", warm_start=True)


def test_unknown_remainder_mode_and_layout_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="remainder='crop': expected 'pad', 'dense' or 'error'"):
        solve(torch.rand(4, 4), "2:4-T", remainder="crop")
    with pytest.raises(ValueError, match=r"shape \(4, 4\) cannot be split into 3 parts"):
        solve(torch.rand(4, 4), "2:4-T", layout=Layout(LayoutKind.PACKED, parts=3))


def test_scores_are_left_alone() -> None:
    scores = torch.rand(9, 10, requires_grad=True)
    before = scores.detach().clone()
    solution = solve(scores, "4:8-T")
    assert torch.equal(scores.detach(), before)
    assert not solution.scores.requires_grad
    assert from_matrices(to_matrices(solution.mask, solution.layout), solution.layout, scores.shape).shape == scores.shape


@pytest.mark.parametrize("m", [16, 64])
def test_a_tile_over_all_magnitudes_takes_less_than_a_hundred_times_as_long(m: int) -> None:
    usual, generator = torch.rand(m, m), torch.Generator().manual_seed(0)
    extreme = torch.ldexp(torch.rand(m, m, generator=generator), torch.randint(-140, 120, (m, m), generator=generator).float())
    outliers = torch.rand(m, m, generator=generator).square() * torch.where(torch.rand(m, generator=generator) < 0.1, 1e8, 1.0)
    pattern = f"{m // 2}:{m}-T"

    def seconds(scores: Tensor) -> float:
        solve(scores, pattern)  # compiles
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            solve(scores, pattern)
            times.append(time.perf_counter() - begun)
        return min(times)

    least = max(seconds(usual), 1e-4)
    assert max(seconds(extreme), seconds(outliers)) < 100 * least
