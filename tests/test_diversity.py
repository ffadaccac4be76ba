"""Mask diversity against brute force, published counts and the paper's page of values; hardware figures."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisparse.diversity import (
    HALF_OF_16,
    Hardware,
    _combinations,
    _count_by_rows,
    _log2_tile_masks,
    count_tile_masks,
    hardware,
    mask_diversity,
)
from bisparse.pattern import Paired, Pattern, Sequential, parse_pattern

# ---- independent counts ---------------------------------------------------------------------------------------------


def every_mask(side: int) -> torch.Tensor:
    """All side x side masks, (2 ** side**2, side, side)."""
    numbers = torch.arange(2 ** (side * side))
    return (numbers[:, None] >> torch.arange(side * side) & 1).bool().view(-1, side, side)


def count_by_columns(rows: int, columns: int, n: int) -> int:
    """Matrices with all sums n, by the full vector of column sums: no sorting, no halves, no complement."""
    ways = Counter({(0,) * columns: 1})
    for _ in range(rows):
        following: Counter[tuple[int, ...]] = Counter()
        for sums, count in ways.items():
            for chosen in itertools.combinations(range(columns), n):
                after = tuple(total + (place in chosen) for place, total in enumerate(sums))
                if max(after) <= n:
                    following[after] += count
        ways = following
    return ways[(n,) * columns]


SMALL = "1:4 2:4 3:4 1:4-T 2:4-T 3:4-T 4:4-T 1:4-seq 2:4-seq 3:4-seq 2:4-paired 1:2-T 50% 25%"


@pytest.mark.parametrize("text", SMALL.split())
def test_equals_an_enumeration_of_every_4x4_mask(text: str) -> None:
    structure = parse_pattern(text)
    masks = every_mask(4)
    holds = ~structure.row_violations(masks).flatten(1).any(1)
    if isinstance(structure, Pattern) and structure.transposable:
        holds &= ~structure.row_violations(masks.transpose(1, 2)).flatten(1).any(1)
    full = masks.sum((1, 2)) == round(structure.density * 16)
    assert mask_diversity(text, (4, 4)).count == int((holds & full).sum())


@pytest.mark.parametrize("m", range(2, 7))
def test_tile_counts_equal_a_recursion_on_full_column_sums(m: int) -> None:
    for n in range(1, m + 1):
        assert count_tile_masks(n, m) == count_by_columns(m, m, n)


@pytest.mark.parametrize(
    ("n", "counts"),
    [
        # OEIS A000142, A001499, A001501: n x n matrices with all sums 1, 2, 3.
        (1, {2: 2, 4: 24, 8: 40320, 16: 20922789888000}),
        (2, {2: 1, 3: 6, 4: 90, 5: 2040, 6: 67950, 7: 3110940, 8: 187530840}),
        (3, {3: 1, 4: 24, 5: 2040, 6: 297200, 7: 68938800, 8: 24046189440}),
        # OEIS A058527: half of every row and column.
        (4, {8: 116963796250}),
        (5, {10: 6736218287430460752}),
        (6, {12: 64051375889927380035549804336}),
    ],
)
def test_tile_counts_are_the_published_ones(n: int, counts: dict[int, int]) -> None:
    for m, count in counts.items():
        assert count_tile_masks(n, m) == count
        assert count_tile_masks(m - n, m) == (count if n < m else 1)


@pytest.mark.parametrize("n", [*range(1, 6), pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 8])
def test_every_tile_up_to_16_is_counted_exactly(n: int) -> None:
    count = count_tile_masks(n, 16)
    assert count is not None and count == count_tile_masks(16 - n, 16)
    assert mask_diversity(f"{n}:16-T", 256).exact


@pytest.mark.slow
def test_the_stored_count_is_what_the_recursion_finds() -> None:
    assert _count_by_rows(8, 16) == HALF_OF_16


# ---- the paper's page -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method", "value"),
    [
        ("50%", "exact", "1.833e+18"),
        ("4:8", "exact", "5.765e+14"),
        ("2:4", "exact", "2.821e+12"),
        ("2:4-seq", "exact", "4.305e+7"),
        ("4:8-seq", "exact", "3.906e+5"),
        ("4:8-T", "paper", "1.756e+13"),
        ("4:8-T", "exact", "1.170e+11"),
        ("2:4-T", "paper", "4.300e+8"),
        ("2:4-T", "exact", "6.561e+7"),
    ],
)
def test_values_at_64_weights(text: str, method: str, value: str) -> None:
    diversity = mask_diversity(text, 64, method)
    assert diversity.scientific == value
    assert diversity.exact and diversity.count is not None
    assert f"{diversity.count:.3e}".replace("e+0", "e+") == value
    assert diversity.log2 == pytest.approx(math.log2(diversity.count), rel=1e-14)


@pytest.mark.parametrize("text", ["50%", "4:8", "2:4", "2:4-seq", "4:8-seq", "4:8-paired"])
def test_both_methods_agree_where_the_paper_does_not_order_zeros(text: str) -> None:
    exact, paper = mask_diversity(text, 64), mask_diversity(text, 64, "paper")
    assert (exact.count, exact.log2) == (paper.count, paper.log2)


def test_tile_counts_of_the_page() -> None:
    pairs = {(2, 1): 2, (4, 1): 24, (4, 2): 90, (8, 2): 187_530_840, (8, 6): 187_530_840, (8, 4): 116_963_796_250}
    assert {(m, k): count_tile_masks(k, m) for m, k in pairs} == pairs
    assert f"{count_tile_masks(8, 16):.2e}" == "3.48e+55"


def test_the_papers_formula_overcounts() -> None:
    plain, exact, paper = mask_diversity("8:16", 256), mask_diversity("8:16-T", 256), mask_diversity("8:16-T", 256, "paper")
    assert exact.log2 < plain.log2 < paper.log2
    assert (paper.scientific, plain.scientific) == ("3.740e+74", "5.666e+65")
    # It is not the same for N and M - N, as the number of masks is.
    two, six = (mask_diversity(f"{n}:8-T", 64, "paper").count for n in (2, 6))
    assert two != six
    assert mask_diversity("2:8-T", 64).count == mask_diversity("6:8-T", 64).count


# ---- any size -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([2, 4, 8]),
    data=st.data(),
    tiles=st.integers(1, 40),
    method=st.sampled_from(["exact", "paper"]),
    suffix=st.sampled_from(["", "-T", "-seq"]),
)
def test_masks_of_independent_tiles_multiply(m: int, data: st.DataObject, tiles: int, method: str, suffix: str) -> None:
    n = data.draw(st.integers(1, m))
    one = mask_diversity(f"{n}:{m}{suffix}", (m, m), method)
    many = mask_diversity(f"{n}:{m}{suffix}", tiles * m * m, method)
    assert one.count is not None and many.count == one.count**tiles
    assert many.log2 == pytest.approx(tiles * one.log2, rel=1e-13)
    assert many.log2_per_weight == pytest.approx(one.log2_per_weight, rel=1e-13)


@settings(max_examples=40, deadline=None)
@given(m=st.sampled_from([2, 4, 8, 16, 32, 64]), data=st.data())
def test_a_transposable_mask_is_one_of_the_plain_ones(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1).filter(lambda n: m < 16 or n <= 3 or m - n <= 3 or 2 * n == m))
    plain, both_ways = mask_diversity(f"{n}:{m}", m * m), mask_diversity(f"{n}:{m}-T", m * m)
    assert 0 < both_ways.log2 < plain.log2 < mask_diversity(f"{100 * n / m}%", m * m).log2


def test_a_fractional_number_of_tiles_has_a_logarithm_only() -> None:
    whole, part = mask_diversity("4:8-T", 64), mask_diversity("4:8-T", (10, 10))
    assert part.count is None and part.exact
    assert part.log2 == pytest.approx(whole.log2 * 100 / 64)
    assert part.log2_per_weight == pytest.approx(whole.log2_per_weight)


@pytest.mark.parametrize("text", ["50%", "2:4", "4:8-T", "16:32-T", "2:4-seq"])
def test_huge_tensors_have_logarithms_of_full_precision(text: str) -> None:
    huge = mask_diversity(text, (8192, 8192))
    assert huge.count is None and huge.size == 2**26
    # Every structure but the unstructured one has the same bits a weight at any size; that one tends to the entropy, 1 bit.
    small = 1.0 if text == "50%" else mask_diversity(text, 1024).log2_per_weight
    assert huge.log2_per_weight == pytest.approx(small, abs=1e-6)
    assert huge.scientific.startswith("about 10^") == (not huge.exact)


def test_scientific_of_a_huge_count_agrees_with_decimal_arithmetic() -> None:
    import decimal

    with decimal.localcontext() as context:
        context.prec, context.Emax = 60, 10**9
        number = decimal.Decimal(6) ** (2**26 // 4)
        digits, power = f"{number:.3e}".split("e+")
    assert mask_diversity("2:4", 2**26).scientific == f"{digits}e+{power}"


@pytest.mark.parametrize("kept", [1, 77, 8192, 16384])
def test_binomials_by_logarithm_join_those_by_integer(kept: int) -> None:
    total = 1 << 15
    by_integer, count = _combinations(total, kept)
    assert count == math.comb(total, kept)
    by_logarithm, none = _combinations(total + 1, kept)
    step = math.log2((total + 1) / (total + 1 - kept))  # C(t + 1, k) / C(t, k)
    assert none is None and by_logarithm == pytest.approx(by_integer + step, rel=1e-11)


def test_the_asymptotic_count_is_within_one_part_in_60_m() -> None:
    errors = []
    for m in (4, 8, 12, 16):
        count = count_tile_masks(m // 2, m)
        assert count is not None
        errors.append(abs(math.expm1((math.log2(count) - _log2_tile_masks(m // 2, m)) * math.log(2))))
        assert errors[-1] < 1 / (25 * m)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1 / (60 * 16)


@pytest.mark.parametrize(("n", "m"), [(4, 16), (2, 32), (4, 32), (2, 64), (3, 64)])
def test_the_asymptotic_count_holds_away_from_half(n: int, m: int) -> None:
    count = count_tile_masks(n, m)
    assert count is not None
    assert abs(math.log2(count) - _log2_tile_masks(n, m)) < 1 / m  # conjectured by Canfield and McKay: within 2 / (2m) nats


def test_large_tiles_say_that_their_count_is_asymptotic() -> None:
    assert count_tile_masks(16, 32) is None
    diversity = mask_diversity("16:32-T", (32, 32))
    assert (diversity.exact, diversity.count, diversity.scientific) == (False, None, "about 10^254.99")
    assert mask_diversity("16:32-T", (32, 32), "paper").exact
    assert mask_diversity("4:32-T", (32, 32)).exact


@pytest.mark.parametrize("size", [0, -4, (4, 0), (), True, (2, -2), 3.5, (4.0, 4)])
def test_sizes_that_are_none_are_refused(size: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"size|iterable"):
        mask_diversity("2:4", size)  # type: ignore[arg-type]


def test_bad_methods_and_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="'exact' or 'paper'"):
        mask_diversity("2:4", 64, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5:4"):
        mask_diversity("5:4", 64)


def test_a_count_too_large_for_an_integer_is_left_out() -> None:
    assert mask_diversity("2:4", 4 * 400_000).count == 6**400_000
    assert mask_diversity("2:4", 4 * 410_000).count is None


# ---- hardware -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "selectors", "ratio", "packed_a_group", "bits_a_kept", "gemms", "tensor_cores"),
    [
        ("2:4", 2, "3:1", 3, 2, 1, True),
        ("2:4-T", 2, "3:1", 3, 2, 2, True),
        ("4:8", 4, "5:1", 7, 3, 1, False),
        ("4:8-T", 4, "5:1", 7, 3, 2, False),
        ("8:16-T", 8, "9:1", 14, 4, 2, False),
        ("1:2", 1, "2:1", 1, 1, 1, True),
        ("1:8-T", 1, "8:1", 3, 3, 2, True),
        ("3:4", 3, "2:1", 2, 2, 1, False),
        ("4:8-paired", 2, "3:1", 3, 2, 1, True),
        ("8:16-paired", 4, "5:1", 7, 3, 1, False),
        ("4:8-seq", 4, "2:1", 3, 3, 1, False),
        ("2:4-seq", 2, "2:1", 2, 2, 1, True),
        ("8:8", 0, "1:1", 0, 0, 0, False),
    ],
)
def test_hardware_figures(
    text: str, selectors: int, ratio: str, packed_a_group: int, bits_a_kept: int, gemms: int, tensor_cores: bool
) -> None:
    figures = hardware(text)
    m = figures.structure.m  # type: ignore[attr-defined]
    assert (figures.selectors, figures.selector) == (selectors, ratio)
    assert figures.metadata_bits_packed == packed_a_group / m
    assert figures.metadata_bits_per_kept == bits_a_kept
    assert (figures.sparse_gemms, figures.sparse_gemms_with_gradient) == (gemms, gemms + 1)
    assert figures.tensor_cores is tensor_cores
    assert figures.note.endswith(".")


def test_unstructured_masks_have_no_hardware() -> None:
    figures = hardware("50%")
    assert figures == Hardware(figures.structure, 0.5, None, None, None, None, 0, 1, False, figures.note)
    assert figures.selector == ""


@pytest.mark.parametrize(
    "text", ["1:2", "2:4", "1:8", "2:8", "1:16", "2:4-seq", "2:4-paired", "3:4", "3:8", "4:8-seq", "2:6", "1:3", "1:6"]
)
def test_tensor_cores_take_exactly_the_structures_whose_masks_are_all_2_4(text: str) -> None:
    structure = parse_pattern(text)
    m = structure.m  # type: ignore[attr-defined]
    length = math.lcm(m, 4)
    masks = (torch.arange(2**length)[:, None] >> torch.arange(length) & 1).bool()[:, None]
    allowed = masks[~structure.row_violations(masks).flatten(1).any(1)]
    all_2_4 = not bool(Pattern(2, 4).row_violations(allowed).any())
    assert hardware(text).tensor_cores is all_2_4


@pytest.mark.parametrize("text", ["2:4", "4:8", "2:4-seq", "3:8-seq"])
def test_selectors_reach_every_place_a_kept_entry_can_have(text: str) -> None:
    structure = parse_pattern(text)
    n, m = structure.n, structure.m  # type: ignore[attr-defined]
    masks = (torch.arange(2**m)[:, None] >> torch.arange(m) & 1).bool()[:, None]
    holds = ~structure.row_violations(masks).flatten(1).any(1) & (masks.flatten(1).sum(1) == n)
    places = torch.stack([mask.flatten().nonzero()[:, 0] for mask in masks[holds]])
    reach = {len(places[:, k].unique()) for k in range(n)}
    assert reach == {hardware(text).selector_inputs}


@pytest.mark.parametrize(
    ("pattern", "windows", "work"), [("4:6", 2, "0.667"), ("4:6-T", 2, "0.667"), ("6:8", 3, "0.75"), ("4:8-T", 3, "0.75")]
)
def test_masks_that_fit_windows_of_two_of_four_are_said_to(pattern: str, windows: int, work: str) -> None:
    note = hardware(pattern).note
    assert f"{windows} overlapping 2:4 windows" in note and f"at {work} of the dense product's work" in note
    n, m = map(int, pattern.removesuffix("-T").split(":"))
    for mask in itertools.combinations(range(m), n):
        places = [[w for w in range(windows) if 2 * w <= kept < 2 * w + 4] for kept in mask]
        assert any(max(choice.count(w) for w in range(windows)) <= 2 for choice in itertools.product(*places)), mask


@pytest.mark.parametrize("pattern", ["7:8", "5:6", "5:7", "16:32-T", "4:8-seq"])
def test_other_patterns_are_not_said_to_fit_windows(pattern: str) -> None:
    assert "windows" not in hardware(pattern).note


@pytest.mark.timeout(60)
def test_no_size_takes_long_or_overflows():
    large = [Pattern(5 * 10**11, 10**12), Pattern(50_001, 100_001, transposable=True), Sequential(2, 10**9), Paired(2, 10**9)]
    for structure in large:
        for function in (lambda one: mask_diversity(one, 100), hardware):
            with pytest.raises(ValueError, match="100,000"):
                function(structure)
    for n, m in ((1, 2**63), (0, 10**7), (5 * 10**5, 10**6)):
        with pytest.raises(ValueError, match="100,000"):
            count_tile_masks(n, m)
    assert count_tile_masks(1, 10_000) == math.factorial(10_000) and count_tile_masks(500, 9999) is None
    for method in ("exact", "paper"):
        assert 0 < mask_diversity("500:9999-T", 100, method).log2_per_weight < 6  # the formula counts more masks than there are
    assert hardware("49999:99999").density == pytest.approx(0.5, abs=1e-4)


def test_the_papers_formula_is_the_same_by_integers_and_by_logarithms(monkeypatch):
    by_integers = mask_diversity("37:100-T", (500, 300), "paper")
    monkeypatch.setattr("bisparse.diversity.PRODUCT_BY_INTEGERS", 1)
    by_logarithms = mask_diversity("37:100-T", (500, 300), "paper")
    assert by_logarithms.log2 == pytest.approx(by_integers.log2, rel=1e-12)
