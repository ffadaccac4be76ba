"""One-pass figures against plain torch, on matrices large enough for the kernels; and where the kernels do not apply."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bisparse import solve, verify
from bisparse.gap import Prices, kept_total, tiles_gap
from bisparse.kernels.figures.cpu import (
    MIN_WEIGHTS,
    add_digits,
    all_optimal,
    broken_groups,
    keep_above,
    keep_largest_of_all,
    kept_and_total,
    magnitudes,
    priced_figures,
    prune_in_place,
)
from bisparse.pattern import parse_pattern
from bisparse.selection_gap import selection_gap
from bisparse.solution import ScoreRangeError
from bisparse.solvers import Exact
from bisparse.tiles import Layout, LayoutKind

ROWS, COLUMNS = 512, MIN_WEIGHTS // 512


@pytest.fixture(params=["Gaussian", "zeros", "constant", "integers", "tiny", "large"])
def scores(request: pytest.FixtureRequest) -> torch.Tensor:
    numbers = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).abs()
    match request.param:
        case "zeros":
            return numbers * (numbers > 1)
        case "constant":
            return torch.full_like(numbers, 0.3)
        case "integers":
            return numbers.mul(3).floor()
        case "tiny":
            return numbers * 1e-30
        case "large":
            return numbers * 1e30
    return numbers


@pytest.mark.parametrize("pattern", ["2:4-T", "4:8-T", "16:32-T"])
def test_the_gap_is_the_specifications(scores: torch.Tensor, pattern: str) -> None:
    """For the optimum, for other masks under the same prices, and for negative and changed prices."""
    solution = solve(scores, pattern)
    certificate, n = solution.certificate, solution.pattern.n  # type: ignore[attr-defined]
    assert certificate is not None
    m = certificate.u.shape[1]
    generator = torch.Generator().manual_seed(5)
    worse = solution.mask & (torch.rand(ROWS, COLUMNS, generator=generator) < 0.9)
    moved = certificate.u + torch.randint(-1000, 1000, certificate.u.shape, generator=generator, dtype=torch.int32)
    applies = bool((certificate.exponent >= 0).all())
    for mask, u in ((solution.mask, certificate.u), (worse, certificate.u), (worse, moved)):
        prices = Prices(u, certificate.v, certificate.exponent)
        fast = priced_figures(scores[None], mask[None], *prices, n, False)
        assert (fast is not None) == applies
        exact = tiles_gap(scores.double()[None], mask[None], prices, n, m, False)
        if fast is not None:
            assert fast[0] == pytest.approx(exact, rel=1e-12, abs=0)
            assert (exact == 0) == (fast[0] == 0)
            sums = math.ldexp(*kept_total(scores, mask)), math.ldexp(*kept_total(scores, None))
            assert fast[1:] == pytest.approx(sums, rel=1e-12)
            if m != 8:  # a kernel is compiled for every width and type of the prices
                continue
            wide = [side.long() for side in prices]
            assert priced_figures(scores[None], mask[None], *wide, n, False) == fast


def test_figures_of_a_solution_are_the_same_in_any_order(scores: torch.Tensor) -> None:
    first, second = (solve(scores, "4:8-T") for _ in range(2))
    assert first.value == pytest.approx((second.gap, second.value)[1], rel=1e-14)
    assert first.gap == second.gap
    assert (first.retained, first.bound) == pytest.approx((second.retained, second.bound), rel=1e-14)


def test_exactly_n_uses_negative_prices() -> None:
    scores = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * (torch.arange(COLUMNS) % 3 == 0)
    solution = solve(scores, "4:8-T", Exact(exactly=True))
    certificate = solution.certificate
    assert certificate is not None
    prices = Prices(certificate.u, certificate.v, certificate.exponent)
    fast = priced_figures(scores[None], solution.mask[None], *prices, 4, True)
    assert fast is not None
    assert fast[0] == pytest.approx(tiles_gap(scores.double()[None], solution.mask[None], prices, 4, 8, True), rel=1e-12, abs=0)


def test_sums_are_those_of_float64(scores: torch.Tensor) -> None:
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)) < 0.4
    found = kept_and_total(scores, mask)
    assert found is not None
    for own, spec in zip(found, (kept_total(scores, mask), kept_total(scores, None)), strict=True):
        assert own == pytest.approx(math.ldexp(*spec), rel=1e-12)
    odd = scores.reshape(-1)[: MIN_WEIGHTS - 3]
    assert kept_and_total(odd, mask.reshape(-1)[: MIN_WEIGHTS - 3]) is None
    long = torch.cat([scores.reshape(-1), torch.ones(3)])
    both = torch.cat([mask.reshape(-1), torch.tensor([True, False, True])])
    assert kept_and_total(long, both) == pytest.approx((found[0] + 2, found[1] + 3), rel=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "5:8"])
def test_plain_groups(scores: torch.Tensor, pattern: str) -> None:
    solution = solve(scores, pattern)
    n, m = solution.pattern.n, solution.pattern.m  # type: ignore[attr-defined]
    assert all_optimal(scores[None], solution.mask[None], n, m) is True
    assert solution.gap == 0
    group = int(torch.where(scores[0] > 0)[0][0]) // m * m
    for worse in (solution.mask.clone(), solution.mask.clone()):
        worse[0, group : group + m] = False
        assert all_optimal(scores[None], worse[None], n, m) is False
        lost = scores[0, group : group + m].double().sort(descending=True).values[:n].sum()
        assert selection_gap(scores[None], worse[None], parse_pattern(pattern)) == pytest.approx(float(lost), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pruning_in_place_counts_what_is_not_zero(dtype: torch.dtype) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, math.nan, math.inf]).to(dtype)
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)) < 0.4
    mask[0, :4] = True
    expected = weight.masked_fill(~mask, 0)
    assert prune_in_place(weight, mask) == int(torch.count_nonzero(expected))
    assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8)), "bit for bit"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "4:8-T"])
def test_broken_groups_are_counted_on_both_sides(dtype: torch.dtype, pattern: str) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    structure = parse_pattern(pattern)
    n, m = structure.n, structure.m  # type: ignore[attr-defined]
    good = weight.masked_fill(~solve(weight.abs(), pattern).mask, -0.0).to(dtype)
    found = broken_groups(good[None], n, m)
    assert found is not None
    assert found[0] == 0 and found[2] == int(torch.count_nonzero(good))
    assert verify(good, pattern)
    bad = good.clone()
    row = (bad[:, 0] == 0).nonzero()[0]
    bad[row, :m] = 1
    by_row, by_column, kept = broken_groups(bad[None], n, m) or (0, 0, 0)
    mask = (bad != 0)[None]
    assert by_row == int(structure.row_violations(mask).sum()) >= 1
    assert by_column == int(structure.row_violations(mask.transpose(1, 2)).sum())
    assert kept == int(mask.sum())
    assert not verify(bad, pattern)


@pytest.mark.parametrize("pattern", ["200:256-T", "300:512-T", "300:600-T", "600:1200-T", "512:1024"])
def test_groups_wider_than_a_tile_of_the_kernels(pattern: str) -> None:
    """Judged as plain torch judges them: on a matrix large enough for the kernels, and on a part of it that is not."""
    structure = parse_pattern(pattern)
    n, m = structure.n, structure.m  # type: ignore[attr-defined]
    mask = torch.zeros(2, m, m, dtype=torch.bool)
    mask[..., :n] = True  # rows hold the pattern, columns do not
    if pattern.endswith("-T"):
        wide = mask.transpose(0, 1).reshape(m, 2 * m).repeat(-(-MIN_WEIGHTS // (2 * m * m)), 1)
        assert verify(wide, pattern).violations == wide.numel() // m * n // m
    scores = torch.rand(m if m > 700 else 2 * m, 2 * m)
    solution = solve(scores, pattern) if not pattern.endswith("-T") else None
    if solution is not None:
        assert verify(solution.mask, pattern) and solution.gap == 0


def test_nan_counts_as_kept() -> None:
    weight = torch.zeros(ROWS, COLUMNS)
    weight[0, :3] = math.nan
    result = verify(weight, "2:4")
    assert result.violations == 1
    assert result.first is not None and result.first.kept == 3


def test_what_the_kernels_leave_to_torch() -> None:
    small, mask = torch.rand(8, 8), torch.ones(8, 8, dtype=torch.bool)
    big, all_kept = torch.rand(ROWS, COLUMNS), torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    assert kept_and_total(small, mask) is None
    assert kept_and_total(big.double(), all_kept) is None
    assert kept_and_total(big.t(), all_kept.t()) is None
    assert prune_in_place(small, mask) is None
    assert broken_groups(big[None, :, :-1], 2, 4) is None
    assert broken_groups(big[None].to(torch.float8_e4m3fn), 2, 4) is None
    assert all_optimal(big.half()[None], all_kept[None], 2, 4) is None
    tiles = ROWS * COLUMNS // 16
    prices = torch.zeros(tiles, 4, dtype=torch.int64)
    beyond = prices.clone()
    beyond[-1, -1] = 1 << 55
    exponent = torch.zeros(tiles, dtype=torch.int64)
    assert priced_figures(big[None], all_kept[None], prices, beyond, exponent, 2, False) is None
    assert priced_figures(big[None], all_kept[None], prices, prices, exponent - 1, 2, False) is None
    wide, one = torch.zeros(ROWS * COLUMNS // 128**2, 128, dtype=torch.int64), torch.zeros(ROWS * COLUMNS // 128**2)
    assert priced_figures(big[None], all_kept[None], wide, wide, one.long(), 64, False) is None
    assert broken_groups(big[None], 64, 128) is None and all_optimal(big[None], all_kept[None], 64, 128) is None


def test_scores_that_are_no_numbers_have_no_gap() -> None:
    scores = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    solution = solve(scores, "4:8-T")
    certificate = solution.certificate
    assert certificate is not None
    prices = Prices(certificate.u, certificate.v, certificate.exponent)
    for place in ((0, 0), (ROWS - 1, COLUMNS - 1)):
        broken = scores.clone()
        broken[place] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            tiles_gap(broken[None], solution.mask[None], prices, 4, 8, False)
        assert priced_figures(broken[None], solution.mask[None], *prices, 4, False) is None


def test_infinite_scores_have_no_gap_whatever_the_size() -> None:
    for rows in (8, ROWS):
        scores = torch.rand(rows, COLUMNS)
        solution = solve(scores, "4:8-T")
        pruned = (~solution.mask).nonzero()
        for row, column in (pruned[0], pruned[-1]):
            broken = scores.clone()
            broken[row, column] = math.inf
            with pytest.raises(ScoreRangeError):
                _ = replace(solution, scores=broken).gap


def test_large_prices_do_not_overflow() -> None:
    scores, nothing = torch.rand(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    tiles = ROWS * COLUMNS // 64**2
    prices = torch.full((tiles, 64), 1 << 40)
    exponent = torch.zeros(tiles, dtype=torch.int64)
    found = priced_figures(scores[None], nothing[None], prices, prices, exponent, 64, False)
    assert found is not None
    assert found[0] == tiles * 128 * 64 * 2.0**40
    assert priced_figures(scores[None], nothing[None], prices + 1, prices, exponent, 64, False) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_magnitudes(dtype: torch.dtype) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40]).to(dtype)
    found = magnitudes(weight)
    if dtype not in (torch.bfloat16, torch.float32):
        assert found is None
        return
    assert found is not None
    scores, finite = found
    assert finite and torch.equal(scores.view(torch.int32), weight.abs().float().view(torch.int32))
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        weight[-1, -1] = bad
        _, finite = magnitudes(weight) or (None, True)
        assert not finite
    assert magnitudes(weight[:4]) is None and magnitudes(weight.t()) is None


@pytest.mark.parametrize("kind", ["Gaussian", "ties", "zeros", "bfloat16", "odd"])
def test_thresholds_and_what_exceeds_them(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        "Gaussian": torch.randn(MIN_WEIGHTS, generator=generator).abs(),
        "ties": torch.randint(0, 4, (MIN_WEIGHTS,), generator=generator).float(),
        "zeros": torch.zeros(MIN_WEIGHTS),
        "bfloat16": torch.randn(MIN_WEIGHTS, generator=generator).abs().bfloat16().float(),
        "odd": torch.rand(MIN_WEIGHTS + 5, generator=generator),
    }[kind]
    bits = scores.view(torch.int32).long()
    for shift, prefix in ((24, 0), (16, int(bits[7] >> 24)), (0, int(bits[7] >> 8)), (8, 1 << 15)):
        histogram = torch.ones(256, dtype=torch.int64)
        assert add_digits(scores, shift, prefix, histogram)
        alike = bits[bits >> shift >> 8 == prefix] >> shift & 255
        assert torch.equal(histogram - 1, torch.bincount(alike, minlength=256))
    for price, ties in ((float(scores[3]), 10), (float(scores.max()), 3), (0.0, MIN_WEIGHTS * 2), (float(scores[9]), 0)):
        found = keep_above(scores, price, ties)
        assert found is not None
        mask, left, excess = found
        equal = scores == price
        taken = equal & (equal.cumsum(0) <= ties)
        assert torch.equal(mask, (scores > price) | taken)
        assert left == ties - int(taken.sum())
        assert excess == pytest.approx(float((scores.double() - price).clamp(min=0).sum()), rel=1e-12)
    assert keep_above(scores, math.inf, 0) is None
    assert keep_above(scores[:100], 0.0, 0) is None
    assert add_digits(scores.double(), 24, 0, torch.zeros(256, dtype=torch.int64)) is None


@pytest.mark.parametrize("kind", ["Gaussian", "ties", "zeros", "negative zeros", "bfloat16", "tiny", "huge"])
@pytest.mark.parametrize("kept", [1, 7, MIN_WEIGHTS // 2, MIN_WEIGHTS - 1, MIN_WEIGHTS])
def test_the_largest_of_all_are_those_of_a_stable_sort(kind: str, kept: int) -> None:
    normal = torch.randn(MIN_WEIGHTS, generator=torch.Generator().manual_seed(kept)).abs()
    scores = {
        "Gaussian": normal,
        "ties": (normal * 2).round(),
        "zeros": torch.zeros(MIN_WEIGHTS),
        "negative zeros": torch.where(normal > 1, normal, torch.where(normal > 0.5, -0.0, 0.0)),
        "bfloat16": normal.bfloat16().float(),
        "tiny": normal * torch.finfo(torch.float32).tiny,
        "huge": normal * 2.0**120,
    }[kind]
    mask = keep_largest_of_all(scores, kept)
    assert mask is not None
    best = scores.sort(stable=True, descending=True).indices[:kept]
    assert torch.equal(mask.nonzero()[:, 0], best.sort().values)
    matrix, density = scores.view(512, -1), f"{100 * kept / MIN_WEIGHTS:.10g}%"
    assert torch.equal(solve(matrix, density).mask.view(-1), mask)
    if kind == "bfloat16":
        assert torch.equal(solve(matrix.bfloat16(), density).mask.view(-1), mask)


def test_each_matrix_has_a_threshold_of_its_own() -> None:
    scores = torch.stack([torch.rand(512, MIN_WEIGHTS // 512), 10 + torch.rand(512, MIN_WEIGHTS // 512)])
    mask = solve(scores, "50%", layout=Layout(LayoutKind.EXPERTS)).mask
    assert mask.sum((1, 2)).tolist() == [MIN_WEIGHTS // 2, MIN_WEIGHTS // 2]
