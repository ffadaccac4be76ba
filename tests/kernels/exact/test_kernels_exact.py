"""The operators: the plain-torch reference and whatever kernel torch dispatches to, against the oracle and each other."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import oracle
from bisparse import solve
from bisparse.kernels.exact import ops, reference
from bisparse.kernels.exact.cpu import enumerate_2to4 as middle
from bisparse.tiles import from_tiles, to_tiles

SIDES = [(2, 1), (3, 2), (4, 1), (4, 2), (4, 3), (6, 3), (8, 1), (8, 3), (8, 4), (8, 7), (12, 5), (16, 4), (16, 8), (16, 15)]
LARGE_SIDES = [(32, 16), (32, 5), (64, 32)]
COMPILED_FOR_THIS_TEST_ALONE = [(16, 4), (16, 15), (32, 5)]
"""By sorting networks, as 8:3 and 64:32, on tiles as wide as those of 16:8 and 32:16. Kernels of their own take seconds."""
PROGRAMS = pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
ALL_SIDES = pytest.mark.parametrize(("m", "n"), SIDES, ids=str)

Solve = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
SolveIntegers = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_the_closed_form_is_what_trying_all_masks_finds() -> None:
    tiles = torch.randint(0, 50, (60, 4, 4))
    assert oracle.closed_form_2to4(tiles).tolist() == [int(oracle.brute_force(tile, 2, exactly=True)) for tile in tiles]


@pytest.mark.parametrize("values", [3, 1 << 24], ids=["ties", "24 bits"])
def test_exactly_2to4_is_the_closed_form_on_a_million_weights(values: int) -> None:
    q = torch.randint(0, values, (1024, 1024))
    q[::4, ::4] = values - 1  # every tile holds the largest score, so none is rounded differently
    mask, coarse = ops.exact_mask(q.float(), 2, 4, exactly=True)
    tiles, masks = to_tiles(q, 4), to_tiles(mask, 4)
    assert not coarse.any()
    assert (masks.sum(1) == 2).all() and (masks.sum(2) == 2).all()
    assert torch.equal((tiles * masks).sum((1, 2)), oracle.closed_form_2to4(tiles))


def test_tags_tell_the_candidates_of_every_combination_apart() -> None:
    table = middle.mask_bits().reshape(len(middle.COMBINATIONS), -1)
    seen = set()
    for masks, (upper, lower) in zip(table, middle.COMBINATIONS, strict=True):
        pairs = {1: 1, 4: 16, 3: 9}[len(middle._candidates(upper, exactly=False))]
        assert len(middle._candidates(lower, exactly=False)) ** 2 == pairs
        named = masks[masks != 0].tolist()  # two pairs of candidates with one code would leave one mask
        assert len(named) == len(set(named)) == pairs
        seen.update(named)
    bits = torch.tensor(sorted(seen)).unsqueeze(1) >> torch.arange(16) & 1
    sums = torch.cat([bits.view(-1, 4, 4).sum(1), bits.view(-1, 4, 4).sum(2)], dim=1)
    assert (sums <= 2).all()
    assert int((sums == 2).all(1).sum()) == 90  # every mask that keeps exactly two is among them


@pytest.fixture(params=["reference", "numba"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel `ops` runs: the specification in plain torch, or the CPU's."""
    if request.param == "reference":
        for name in ("exact_mask", "exact_solve", "exact_solve_integers", "keep_largest"):
            monkeypatch.setattr(torch.ops.bisparse, name, getattr(reference, name))
    return str(request.param)


def numbers(kind: str, tiles: int, m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tiles, m, m, generator=generator).abs()
    return {
        "gaussian": normal,
        "heavy tails": normal / torch.rand(tiles, m, m, generator=generator).clamp(min=1e-3),
        "few values": torch.randint(0, 4, (tiles, m, m), generator=generator).float(),
        "int4": torch.randint(0, 16, (tiles, m, m), generator=generator).float() / 16,
        "mostly zeros": (normal - 0.84).clamp(min=0),
        "zeros": torch.zeros(tiles, m, m),
        "constant": torch.full((tiles, m, m), 0.7),
        "low rank": torch.rand(tiles, m, 1, generator=generator) + torch.rand(tiles, 1, m, generator=generator),
        "staircase": (torch.arange(m)[:, None] + torch.arange(m) < m).float().expand(tiles, m, m),
        "diagonal": torch.eye(m).expand(tiles, m, m) * 3,
        "one row": torch.nn.functional.pad(normal[:, :1], (0, 0, 0, m - 1)),
    }[kind]


KINDS = [
    "gaussian",
    "heavy tails",
    "few values",
    "int4",
    "mostly zeros",
    "zeros",
    "constant",
    "low rank",
    "staircase",
    "diagonal",
    "one row",
]


def as_matrix(tiles: Tensor, across: int = 1) -> Tensor:
    m = tiles.shape[-1]
    return from_tiles(tiles.contiguous(), len(tiles) // across * m, across * m)


# ---- quantising ------------------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.one_of(st.floats(0, 2.0**120, width=32), st.sampled_from([0.0, 1.0])), min_size=4, max_size=4),
)
def test_quantised_scores_by_the_rule(scores: list[float]) -> None:
    tile = torch.tensor(scores).view(1, 2, 2)
    q, exponent = reference.quantise(tile)
    given_numbers = [Fraction(number) for number in tile.flatten().tolist()]
    largest = max(given_numbers)
    if largest == 0:
        assert (q.flatten().tolist(), exponent.tolist()) == ([0, 0, 0, 0], [0])
        return
    power = 24 - math.frexp(float(largest))[1]
    assert 2**23 <= largest * Fraction(2) ** power < 2**24
    expected = [round(number * Fraction(2) ** power) for number in given_numbers]
    lost = sum(whole < 2**12 and number > 0 for whole, number in zip(expected, given_numbers, strict=True))
    if 2 * lost > sum(number > 0 for number in given_numbers) or largest < Fraction(2) ** -103:
        assert exponent.tolist() == [ops.NEEDS_EXACT]
    else:
        assert (q.flatten().tolist(), exponent.tolist()) == (expected, [power])


def test_half_a_unit_is_rounded_to_even() -> None:
    tile = torch.tensor([[[2.0**24 - 1, 0.5], [1.5, 2.5]]])
    q, exponent = reference.quantise(tile.double())
    assert exponent.tolist() == [ops.NEEDS_EXACT]  # three of four scores are tiny compared with the first
    assert q.flatten().tolist() == [2**24 - 1, 0, 2, 2]


# ---- masks and their proofs ------------------------------------------------------------------------------------------


def proved_sides(sides: list[tuple[int, int]]) -> pytest.MarkDecorator:
    slow = COMPILED_FOR_THIS_TEST_ALONE
    chosen = [pytest.param(*one, id=f"{one[0]}-{one[1]}", marks=[pytest.mark.slow] if one in slow else []) for one in sides]
    return pytest.mark.parametrize(("m", "n"), chosen)


@PROGRAMS
@proved_sides(SIDES)
def test_prices_prove_every_mask(implementation: str, m: int, n: int, exactly: bool) -> None:
    # The reference works tile by tile in Python steps: fewer kinds where that is slow.
    check_proofs(m, n, exactly, KINDS if implementation == "numba" or m < 16 else ["gaussian", "int4", "mostly zeros"])


@PROGRAMS
@proved_sides(LARGE_SIDES)
def test_prices_prove_every_mask_of_large_tiles(m: int, n: int, exactly: bool) -> None:
    check_proofs(m, n, exactly, ["gaussian", "few values", "mostly zeros", "zeros", "staircase"])


def check_proofs(m: int, n: int, exactly: bool, kinds: list[str]) -> None:
    for kind in kinds:
        tiles = numbers(kind, 2, m)
        q, exponent = reference.quantise(tiles)
        mask, u, v, found = ops.exact_solve(as_matrix(tiles), n, m, exactly)
        assert (mask.dtype, u.dtype, v.dtype, found.dtype) == (torch.bool, torch.int32, torch.int32, torch.int32)
        assert (mask.shape, u.shape, v.shape, found.shape) == ((2 * m, m), (2, m), (2, m), (2,))
        assert torch.equal(found.long(), exponent)
        fine = exponent != ops.NEEDS_EXACT
        assert bool(oracle.proved(q[fine], to_tiles(mask, m)[fine], u[fine], v[fine], n, exactly).all()), kind
        # The mask alone may be another one where several are best, but the same prices prove it.
        alone, coarse = ops.exact_mask(as_matrix(tiles), n, m, exactly)
        assert (alone.dtype, coarse.dtype, alone.shape, coarse.shape) == (torch.bool, torch.bool, (2 * m, m), (2,))
        assert torch.equal(coarse, ~fine)
        assert bool(oracle.proved(q[fine], to_tiles(alone, m)[fine], u[fine], v[fine], n, exactly).all()), kind


@PROGRAMS
@pytest.mark.parametrize("across", [16, 17, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_prices_of_2to4_masks_prove_them(kind: str, across: int, exactly: bool) -> None:
    tiles = numbers(kind, 3 * across, 4).clone()
    exponent = reference.quantise(tiles)[1]
    tiles[exponent == ops.NEEDS_EXACT] = 1.0
    q, exponent = reference.quantise(tiles)
    mask, coarse = ops.exact_mask(as_matrix(tiles, across), 2, 4, exactly)
    assert not coarse.any()
    found = ops.prices_of_masks(as_matrix(tiles, across), mask, exactly)
    assert found is not None
    u, v, exponents = found
    assert (u.dtype, v.dtype, exponents.dtype, u.shape, v.shape) == (*[torch.int32] * 3, (3 * across, 4), (3 * across, 4))
    assert torch.equal(exponents.long(), exponent)
    assert bool(oracle.proved(q, to_tiles(mask, 4), u.long(), v.long(), 2, exactly).all())


@PROGRAMS
@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_no_prices_prove_a_2to4_mask_that_is_not_optimal(place: int, exactly: bool) -> None:
    scores = as_matrix(numbers("gaussian", 37, 4), 37)
    mask, _ = ops.exact_mask(scores, 2, 4, exactly)
    best = mask[:, 4 * place : 4 * place + 4].clone()
    others = [
        best.roll(1, 0),
        best.roll(1, 1),
        ~best,
        torch.eye(4, dtype=torch.bool)[[1, 0, 3, 2]] | torch.eye(4, dtype=torch.bool),
    ]
    if not exactly:
        others.append(torch.zeros(4, 4, dtype=torch.bool))
    for other in others:
        mask[:, 4 * place : 4 * place + 4] = other
        assert (ops.prices_of_masks(scores, mask, exactly) is None) == (not torch.equal(other, best))


@pytest.mark.parametrize("bad", [-0.0, -1.0, math.inf, math.nan])
def test_no_prices_for_scores_that_are_none_or_narrow(bad: float) -> None:
    scores = as_matrix(numbers("gaussian", 37, 4), 37)
    mask, _ = ops.exact_mask(scores, 2, 4, False)
    scores[3, 97] = bad
    assert ops.prices_of_masks(scores, mask, False) is None
    assert ops.prices_of_masks(scores[:, :8].abs(), mask[:, :8], False) is None
    assert ops.prices_of_masks(scores[:0], mask[:0], False) is None


@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_integers_against_every_mask_there_is(implementation: str, m: int, n: int, exactly: bool) -> None:
    for largest in (1, 2, 5, 1000, 1 << 30, 1 << 54):
        q = torch.randint(0, largest + 1, (6, m, m), generator=torch.Generator().manual_seed(m))
        q[0, 0, 0] = largest
        mask, u, v = ops.exact_solve_integers(q, n, exactly)
        assert (mask.dtype, u.dtype, v.dtype) == (torch.bool, torch.int64, torch.int64)
        assert bool(oracle.proved(q, mask, u, v, n, exactly).all())
        for tile, kept in zip(q, mask, strict=True):
            assert oracle.kept(tile, kept) == oracle.brute_force(tile, n, exactly)


@PROGRAMS
@ALL_SIDES
def test_integers_of_55_bits(implementation: str, m: int, n: int, exactly: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    q = torch.randint(0, 1 << 55, (2, m, m), generator=generator)
    q[1] = (1 << 55) - 1 - torch.randint(0, 3, (m, m), generator=generator)
    mask, u, v = ops.exact_solve_integers(q, n, exactly)
    assert bool(oracle.proved(q, mask, u, v, n, exactly).all())


@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(8, 4), (16, 8), (32, 16)])
def test_value_against_linear_program(implementation: str, m: int, n: int, exactly: bool) -> None:
    q = torch.randint(0, 1 << 20, (3, m, m), generator=torch.Generator().manual_seed(m))
    mask, _, _ = ops.exact_solve_integers(q, n, exactly)
    assert (q * mask).sum((1, 2)).tolist() == oracle.linear_program(q, n, exactly).round().tolist()


@PROGRAMS
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(2, 9), largest=st.sampled_from([1, 2, 6, 1 << 12]), data=st.data())
def test_the_kernel_agrees_with_its_specification(exactly: bool, seed: int, m: int, largest: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    q = torch.randint(0, largest + 1, (data.draw(st.integers(1, 20)), m, m), generator=torch.Generator().manual_seed(seed))
    mask, u, v = ops.exact_solve_integers(q, n, exactly)
    expected, _, _ = reference.exact_tiles(q, n, exactly)
    assert torch.equal((q * mask).sum((1, 2)), (q * expected).sum((1, 2)))
    assert bool(oracle.proved(q, mask, u, v, n, exactly).all())


@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (8, 4), (8, 3), (16, 8), (32, 16)])
def test_same_mask_as_the_specification_where_the_optimum_is_unique(m: int, n: int, exactly: bool) -> None:
    tiles = numbers("gaussian", 12, m)
    q, _ = reference.quantise(tiles)
    expected, _, _ = reference.exact_tiles(q, n, exactly)
    for mask in (ops.exact_solve(as_matrix(tiles, 3), n, m, exactly)[0], ops.exact_mask(as_matrix(tiles, 3), n, m, exactly)[0]):
        assert torch.equal(to_tiles(mask, m), expected)


@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (8, 4), (8, 3), (16, 8), (32, 16), (64, 20)])
def test_tiles_of_one_number_have_one_mask(m: int, n: int, exactly: bool) -> None:
    values = [1.0, 0.7, 0.1, 1 / 3, 1e-20, 3e38, 16777215.0]
    constant = torch.tensor(values)[:, None, None].expand(-1, m, m)
    others = numbers("gaussian", len(values), m)
    others[0] = 2.0
    others[0, m - 1, m - 1] = 3.0  # equal, but for its last entry
    mixed = torch.stack([constant, others, torch.zeros_like(others)], 1).flatten(0, 1)
    q, _ = reference.quantise(mixed)
    mask, u, v, exponent = ops.exact_solve(as_matrix(mixed), n, m, exactly)
    masks = to_tiles(mask, m)
    assert not bool((exponent == ops.NEEDS_EXACT).any())
    assert bool(oracle.proved(q, masks, u, v, n, exactly).all())
    assert torch.equal(masks[0::3], masks[:1].expand(len(values), m, m)) and masks[0].sum() == n * m
    assert torch.equal(masks[1::3], to_tiles(ops.exact_solve(as_matrix(others), n, m, exactly)[0], m))
    assert int(masks[2::3].sum()) == (len(values) * n * m if exactly else 0)


# ---- sizes, starts, strides, memory ----------------------------------------------------------------------------------


@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (8, 4), (8, 2), (16, 8), (6, 2)])
def test_any_number_of_tiles(m: int, n: int, exactly: bool) -> None:
    # Kernels work on bands of many tiles at once; what is left over at the end must not be forgotten.
    tiles = numbers("int4", 150, m)
    expected = to_tiles(ops.exact_solve(as_matrix(tiles), n, m, exactly)[0], m)
    for count in (1, 2, 7, 15, 16, 17, 31, 33, 64, 129):
        for across in (1, count):
            matrix = as_matrix(tiles[:count], across)
            solved, u, v, exponent = ops.exact_solve(matrix, n, m, exactly)
            assert torch.equal(to_tiles(solved, m), expected[:count])
            assert (u.shape, v.shape, exponent.shape) == ((count, m), (count, m), (count,))
            alone, _ = ops.exact_mask(matrix, n, m, exactly)
            q, _ = reference.quantise(tiles[:count])
            assert torch.equal((q * to_tiles(alone, m)).sum((1, 2)), (q * expected[:count]).sum((1, 2)))


def test_shapes_and_ranges_are_checked_before_anything_is_written(implementation: str) -> None:
    q, prices = torch.randint(0, 99, (3, 8, 8)), torch.zeros(3, 8, dtype=torch.int64)
    for start in (
        (prices[:2], prices),
        (prices, prices[:, :7]),
        (prices.int(), prices),
        (prices, prices.double()),
        (prices.flatten(), prices),
    ):
        with pytest.raises(ValueError, match=r"start prices: shape .*; expected u and v of shape \(3, 8\), int64"):
            ops.exact_solve_integers(q, 4, False, start)
    for wrong, n, message in (
        (q[:, :7], 4, r"of shape \(3, 7, 8\), torch.int64: expected tiles"),
        (q[0], 4, "expected tiles"),
        (q.double(), 4, "torch.float64: expected tiles"),
        (q - 1000, 4, "integer scores from -.*: expected 0 to"),
        (q + (1 << 55), 4, "expected 0 to 2"),
        (q, 8, "N = 8 is not between 1 and M - 1 = 7"),
        (q, 0, "N = 0 is not between"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.exact_solve_integers(wrong, n, False)
    scores = torch.rand(16, 16)
    for operator in (ops.exact_solve, ops.exact_mask):
        for shape, n, m in (
            ((16, 12), 4, 8),
            ((12, 16), 4, 8),
            ((16, 16, 1), 4, 8),
            ((16, 16), 8, 8),
            ((16, 16), 9, 8),
            ((10, 16), 2, 4),
        ):
            with pytest.raises(ValueError, match=r"not a matrix whose sides|is not between 1 and M - 1"):
                operator(torch.rand(shape), n, m, False)
    start = torch.zeros(4, 8, dtype=torch.int32)
    exponent = torch.zeros(4, dtype=torch.int32)
    for wrong_start in ((start[:3], start[:3], exponent), (start, start, exponent[:3]), (start.float(), start.float(), exponent)):
        with pytest.raises(ValueError, match="a start of"):
            ops.exact_solve(scores, 4, 8, False, wrong_start)


def test_no_tiles(implementation: str) -> None:
    for shape in ((0, 8), (8, 0), (0, 0)):
        mask, u, v, exponent = ops.exact_solve(torch.zeros(shape), 4, 8, False)
        assert (mask.shape, u.shape, v.shape, exponent.shape) == (shape, (0, 8), (0, 8), (0,))
        assert [tuple(result.shape) for result in ops.exact_mask(torch.zeros(shape), 2, 4, False)] == [shape, (0,)]
    mask, u, v = ops.exact_solve_integers(torch.zeros(0, 8, 8, dtype=torch.int64), 4, False)
    assert (mask.shape, u.shape, v.shape) == ((0, 8, 8), (0, 8), (0, 8))


@PROGRAMS
@pytest.mark.parametrize(
    ("m", "n"), [(4, 2), (8, 4), (8, 3), pytest.param(16, 8, marks=pytest.mark.slow), (32, 16), (6, 3)]
)  # the kernel of 16:8 has the code of those of 8:4 and 32:16, and takes seconds to compile
def test_value_does_not_depend_on_the_start(implementation: str, m: int, n: int, exactly: bool) -> None:
    tiles = torch.cat([numbers("gaussian", 2, m), numbers("int4", 2, m)])
    matrix = as_matrix(tiles)
    q, exponent = reference.quantise(tiles)
    mask, u, v, _ = ops.exact_solve(matrix, n, m, exactly)
    value = (q * to_tiles(mask, m)).sum((1, 2))
    generator = torch.Generator().manual_seed(0)
    lowest = -(1 << 24) if exactly else 0  # "at most N" has no negative prices
    garbage = torch.randint(lowest, 1 << 24, (2, 4, m), generator=generator, dtype=torch.int32)
    starts = [
        (u, v, exponent.int()),
        (u.flip(0), v.flip(0), exponent.int()),
        (u, v, exponent.int() - 7),
        (u >> 9, v >> 9, exponent.int() - 9),
        (u, v, torch.full_like(exponent.int(), ops.NEEDS_EXACT)),
        (garbage[0], garbage[1], exponent.int()),
        (garbage[0], garbage[1], exponent.int() + 100),
        (torch.zeros_like(u), torch.zeros_like(v), exponent.int()),
    ]
    for start in starts:
        again, row_prices, column_prices, _ = ops.exact_solve(matrix, n, m, exactly, start)
        assert torch.equal((q * to_tiles(again, m)).sum((1, 2)), value)
        assert bool(oracle.proved(q, to_tiles(again, m), row_prices, column_prices, n, exactly).all())
    for prices in ((u.long(), v.long()), (garbage[0].long(), garbage[1].long())):
        again, row_prices, column_prices = ops.exact_solve_integers(q, n, exactly, prices)
        assert torch.equal((q * again).sum((1, 2)), value)
        assert bool(oracle.proved(q, again, row_prices, column_prices, n, exactly).all())


def test_strided_scores(implementation: str) -> None:
    wide = numbers("gaussian", 16, 8).reshape(32, 32)
    for view in (wide.t(), wide[::2, ::2], wide[:, 8:24], wide[8:9].expand(16, -1)):
        rows, columns = view.shape
        view = view[: rows // 8 * 8, : columns // 8 * 8]
        same(ops.exact_solve(view, 4, 8, False), ops.exact_solve(view.contiguous(), 4, 8, False))
        same(ops.exact_mask(view, 2, 4, False), ops.exact_mask(view.contiguous(), 2, 4, False))
    q = torch.randint(0, 99, (8, 8, 6)).permute(2, 1, 0)
    same(ops.exact_solve_integers(q, 4, False), ops.exact_solve_integers(q.contiguous(), 4, False))


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 3), (8, 4), (16, 8), (12, 5)])
def test_every_output_is_written(implementation: str, m: int, n: int, exactly: bool) -> None:
    matrix = as_matrix(torch.cat([numbers("gaussian", 20, m), numbers("zeros", 3, m)]))
    expected = (*ops.exact_solve(matrix, n, m, exactly), *ops.exact_mask(matrix, n, m, exactly))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN or the largest number
    try:
        found = (*ops.exact_solve(matrix, n, m, exactly), *ops.exact_mask(matrix, n, m, exactly))
    finally:
        torch.use_deterministic_algorithms(False)
    same(found, expected)


@pytest.mark.parametrize(("m", "n"), [(4, 2), (8, 4), (16, 8), (6, 2)])
def test_same_answer_on_two_threads(m: int, n: int) -> None:
    matrix = as_matrix(numbers("int4", 400, m), 20)
    alone = (*ops.exact_solve(matrix, n, m, False), *ops.exact_mask(matrix, n, m, False))
    torch.set_num_threads(2)
    try:
        together = (*ops.exact_solve(matrix, n, m, False), *ops.exact_mask(matrix, n, m, False))
    finally:
        torch.set_num_threads(1)
    same(together, alone)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0, -1e-30, -math.nan])
@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (8, 4), (16, 8), (6, 3)])
def test_a_score_that_is_no_score(implementation: str, m: int, n: int, number: float) -> None:
    for place in ((0, 0), (3, 5), (2 * m - 1, 3 * m - 1)):
        scores = torch.ones(2 * m, 3 * m)
        scores[place] = number
        for operator in (ops.exact_solve, ops.exact_mask):
            with pytest.raises(ops.BadScoreError):
                operator(scores, n, m, False)


def test_scores_of_negative_zero_and_the_largest_number(implementation: str) -> None:
    tile = torch.full((4, 4), -0.0)
    tile[0, 0] = torch.finfo(torch.float32).max
    for operator in (ops.exact_solve, ops.exact_mask):
        mask = operator(tile, 2, 4, False)[0]
        assert bool(mask[0, 0])


def test_a_tile_of_outliers_and_dust_is_called_coarse(implementation: str) -> None:
    tiles = torch.rand(3, 8, 8)
    tiles[1, 3, 3] = 1e8
    assert (ops.exact_mask(as_matrix(tiles), 4, 8, False)[1]).tolist() == [False, True, False]
    assert (ops.exact_solve(as_matrix(tiles), 4, 8, False)[3] == ops.NEEDS_EXACT).tolist() == [False, True, False]


@pytest.mark.parametrize("columns", [64, 1024], ids=["narrow", "wide"])
def test_tiles_too_small_for_the_scale_are_called_coarse_without_any_dust(implementation: str, columns: int) -> None:
    for power in (-104, -110, -114, -120, -140):
        tiles = (0.6 + 0.4 * torch.rand(columns, 4, 4)) * 2.0**power
        assert bool(ops.exact_mask(from_tiles(tiles, 16, columns), 2, 4, False)[1].all()), power


@pytest.mark.parametrize("columns", [4, 60, 64])
def test_a_mask_of_four_rows_holds_no_more_than_itself(implementation: str, columns: int) -> None:
    mask, _ = ops.exact_mask(torch.rand(4, columns), 2, 4, False)
    assert mask.is_contiguous()
    assert mask.untyped_storage().nbytes() == mask.numel()


# ---- groups that stand alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8], ids=str
)
@pytest.mark.parametrize("m", [2, 3, 4, 8, 16, 32, 40])
def test_the_largest_of_each_group_and_the_lowest_index_of_equals(implementation: str, m: int, dtype: torch.dtype) -> None:
    few = torch.randint(0, 4, (150, m), generator=torch.Generator().manual_seed(m))
    many = torch.randint(0, 127, (150, m), generator=torch.Generator().manual_seed(m))
    for groups in (few.to(dtype), many.to(dtype), few[:0].to(dtype), many[:1].to(dtype), many.t().contiguous().t().to(dtype)):
        for n in {1, m // 2 or 1, m - 1, m}:
            mask = ops.keep_largest(groups, n)
            order = [sorted(range(m), key=lambda place: (-group[place], place))[:n] for group in groups.tolist()]
            assert mask.dtype == torch.bool
            assert mask.shape == groups.shape
            assert [sorted(places) for places in order] == [row.nonzero()[:, 0].tolist() for row in mask]


# ---- torch.library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "exactly"), [(4, 2, False), (8, 4, True), (6, 3, False)])
def test_operators_obey_the_rules_of_torch_library(m: int, n: int, exactly: bool) -> None:
    tiles = numbers("gaussian", 6, m)
    matrix = as_matrix(tiles, 2)
    u, v, exponent = ops.exact_solve(matrix, n, m, exactly)[1:]
    q, _ = reference.quantise(tiles)
    torch.library.opcheck(torch.ops.bisparse.exact_mask.default, (matrix, n, m, exactly))
    torch.library.opcheck(torch.ops.bisparse.exact_solve.default, (matrix, n, m, exactly, None, None))
    torch.library.opcheck(torch.ops.bisparse.exact_solve.default, (matrix, n, m, exactly, torch.stack([u, v]), exponent))
    torch.library.opcheck(torch.ops.bisparse.exact_solve_integers.default, (q, n, exactly, None, None))
    torch.library.opcheck(torch.ops.bisparse.keep_largest.default, (matrix.reshape(-1, m), n))
    torch.library.opcheck(torch.ops.bisparse.exact_solve_integers.default, (q, n, exactly, u.long(), v.long()))


@pytest.mark.gpu
@PROGRAMS
@pytest.mark.parametrize(("m", "n"), [(4, 2), (8, 4), (16, 8), (32, 16), (6, 3)])
def test_the_device_agrees_with_the_specification(m: int, n: int, exactly: bool) -> None:
    for kind in KINDS:
        tiles = numbers(kind, 8, m)
        q, exponent = reference.quantise(tiles)
        expected, _, _ = reference.exact_tiles(q, n, exactly)
        mask, u, v, found = (result.cpu() for result in ops.exact_solve(as_matrix(tiles).cuda(), n, m, exactly))
        fine = exponent != ops.NEEDS_EXACT
        assert torch.equal(found.long(), exponent)
        assert torch.equal((q * to_tiles(mask, m)).sum((1, 2))[fine], (q * expected).sum((1, 2))[fine])
        assert bool(oracle.proved(q[fine], to_tiles(mask, m)[fine], u[fine], v[fine], n, exactly).all())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
@pytest.mark.parametrize("columns", [16, 2048])
def test_under_a_fake_mode_of_torch_there_is_an_error_and_no_crash(n: int, m: int, columns: int) -> None:
    scores = torch.rand(16, columns)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        solve(scores, f"{n}:{m}-T")
    solve(scores, f"{n}:{m}-T").check()


@pytest.mark.parametrize("shapes", [((2, 11, 8), (7,)), ((90,), (12,)), ((1, 6, 16), (6,)), ((2, 6, 8), (5,))])
def test_a_start_of_other_shapes_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    start = (torch.zeros(shape, dtype=torch.int32) for shape in shapes)
    with pytest.raises(ValueError, match="a start of shapes"):
        torch.ops.bisparse.exact_solve(torch.rand(16, 24), 4, 8, False, *start)
