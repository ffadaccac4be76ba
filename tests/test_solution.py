"""The judge: what `verify` counts and names, and a proof check that is tested by lying to it."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from bisparse import CertificateError, Pattern, PatternError, Solution, prune_, solve, verify
from bisparse.solution import Certificate
from bisparse.solvers import Exact, Greedy
from bisparse.tiles import Layout, LayoutKind, to_tiles

# ---- verify ----------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    m=st.integers(2, 5),
    transposable=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_verify_against_counting_by_hand(
    rows: int, columns: int, m: int, transposable: bool, seed: int, data: st.DataObject
) -> None:
    pattern = Pattern(data.draw(st.integers(1, m)), m, transposable)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < data.draw(st.floats(0, 1))
    expected = oracle.overfull(mask, pattern)
    for target in (mask, mask * -0.25, mask.half(), mask.int()):
        verification = verify(target, pattern)
        assert bool(verification) == (not expected)
        assert verification.violations == len(expected)
        assert verification.groups == rows * -(-columns // m) + transposable * columns * -(-rows // m)
        assert verification.density == pytest.approx(float(mask.float().mean()))
        if expected:
            first = verification.first
            assert first is not None
            assert (first.side, first.row, first.group, first.kept) == expected[0]


def test_message_names_layer_side_matrix_row_and_group() -> None:
    weight = torch.zeros(3, 8, 8)
    weight[2, 4:8, 5] = 1.0
    verification = verify(weight, "2:4-T", layout=Layout(LayoutKind.EXPERTS), name="experts.up")
    assert verification.message == (
        "experts.up: 1 of 96 groups break 2:4-T; the first: experts.up: W^T, matrix 2, row 5, group 1 keeps 4"
    )
    with pytest.raises(PatternError, match=r"experts\.up: 1 of 96 groups break 2:4-T"):
        verification.check()
    assert verify(weight, "4:8-T", layout=Layout(LayoutKind.EXPERTS)).check().message == "4:8-T holds on 48 groups"


def test_a_mask_that_holds_on_w_alone() -> None:
    mask = torch.tensor([[1, 1, 0, 0]] * 4).bool()
    assert verify(mask, "2:4")
    assert not verify(mask, "2:4-T")
    assert not verify(mask.t(), "2:4")


def test_nan_counts_as_kept_and_zeros_of_either_sign_do_not() -> None:
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("inf")]])
    assert verify(weight, "2:4")
    weight[0, 0] = 1e-45
    assert not verify(weight, "2:4")


def test_flattened_tiles_of_a_convolution_break_the_transpose() -> None:
    # The paper's released code cuts M * M consecutive weights of one output row, as if they were a tile.
    weight = torch.randn(16, 16, 3, 3)
    flat = weight.flatten(1).reshape(-1, 4, 4)
    wrong = (weight.flatten(1).reshape(-1, 4, 4) * Exact().solve_tiles(flat.abs(), 2)).view_as(weight)
    right = weight * solve(weight.abs(), "2:4-T").mask
    assert not verify(wrong, "2:4-T")
    assert verify(right, "2:4-T")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("not a tensor", "verify needs a tensor or a module, not str"),
        (torch.ones(4), "a weight of 1 dimensions has no GEMM layout"),
        (None, "not NoneType"),
    ],
)
def test_what_cannot_be_verified(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(target, "2:4")


def test_an_empty_weight_holds() -> None:
    verification = verify(torch.zeros(0, 8), "2:4-T")
    assert verification
    assert verification.density == 0.0


# ---- an honest proof -------------------------------------------------------------------------------------------------

CASES = [
    pytest.param(pattern, exactly, dtype, id=f"{pattern}, {'exactly' if exactly else 'at most'}, {str(dtype)[6:]}")
    for pattern in ("2:4-T", "3:8-T")
    for exactly in (False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32)
]


def scores_of(dtype: torch.dtype, seed: int = 0, rows: int = 16) -> Tensor:
    numbers = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    return numbers.to(dtype) if dtype.is_floating_point else (numbers * 1000).to(dtype)


def solved(pattern: str, exactly: bool, dtype: torch.dtype, seed: int = 0) -> Solution:
    return solve(scores_of(dtype, seed), pattern, Exact(exactly))


def in_score_units(certificate: Certificate, tile: int) -> tuple[list[Fraction], list[Fraction]]:
    unit = Fraction(2) ** -int(certificate.exponent[tile])
    u, v = ([int(price) * unit for price in side[tile].tolist()] for side in (certificate.u, certificate.v))
    return u, v


def lie(solution: Solution, **changes: object) -> Solution:
    """The same solution with another mask, or with a certificate changed in some fields."""
    mask = changes.pop("mask", solution.mask)
    certificate = solution.certificate
    assert certificate is not None
    changed = dataclasses.replace(certificate, **changes)
    return dataclasses.replace(solution, mask=mask, certify=lambda: changed)


@pytest.mark.parametrize(("pattern", "exactly", "dtype"), CASES)
def test_prices_bound_the_value_in_fractions_too(pattern: str, exactly: bool, dtype: torch.dtype) -> None:
    solution = solved(pattern, exactly, dtype)
    assert solution.check() is solution
    structure = Pattern.parse(pattern)
    certificate = solution.certificate
    assert certificate is not None
    tiles, masks = to_tiles(solution.scores, structure.m), to_tiles(solution.mask, structure.m)
    total = Fraction(0)
    for tile in range(len(tiles)):
        u, v = in_score_units(certificate, tile)
        assert exactly or min(*u, *v) >= 0
        bound, value = oracle.dual_bound(tiles[tile], u, v, structure.n), oracle.kept(tiles[tile], masks[tile])
        assert bound >= value
        bits = {torch.int32: 999, torch.float64: 52}.get(dtype, 24)
        assert bound - value <= structure.n * structure.m * oracle.fractions(tiles[tile]).max() / 2**bits
        total += bound
    value = oracle.kept(solution.scores, solution.mask)
    assert solution.bound == pytest.approx(float(total), rel=1e-12)
    assert solution.value == pytest.approx(float(value), rel=1e-12)
    assert solution.gap == pytest.approx(float(total - value), rel=1e-12, abs=0)
    assert 0 <= solution.relative_gap <= 1e-6
    assert solution.retained == pytest.approx(solution.value / float(solution.scores.double().sum()))


def test_zero_scores() -> None:
    solution = solve(torch.zeros(8, 8), "2:4-T").check()
    assert (solution.value, solution.bound, solution.gap, solution.relative_gap, solution.retained) == (0, 0, 0, 0, 1)


def test_a_mask_without_prices_proves_nothing() -> None:
    solution = solve(scores_of(torch.float32), "2:4-T", Greedy())
    assert solution.certificate is None
    with pytest.raises(CertificateError, match="this solution at 2:4-T carries no certificate"):
        solution.check()
    with pytest.raises(CertificateError, match="carries no certificate"):
        _ = solution.bound


# ---- lies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "exactly", "dtype"), CASES)
def test_a_flipped_bit(pattern: str, exactly: bool, dtype: torch.dtype) -> None:
    solution = solved(pattern, exactly, dtype)
    for place in ((0, 0), (5, 7), (15, 23)):
        mask = solution.mask.clone()
        mask[place] = ~mask[place]
        dropped = bool(solution.mask[place])
        with pytest.raises((CertificateError, PatternError)) as caught:
            lie(solution, mask=mask).check()
        if dropped:
            assert caught.type is CertificateError


def test_a_kept_entry_of_score_zero_may_be_dropped() -> None:
    # No lie: the value is the same, so it is still proved.
    solution = solve(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "2:2-T", Exact())
    mask = solution.mask.clone()
    mask[0, 1] = False
    dataclasses.replace(solution, mask=mask).check()


@pytest.mark.parametrize(("pattern", "exactly", "dtype"), CASES)
def test_a_mask_of_other_scores(pattern: str, exactly: bool, dtype: torch.dtype) -> None:
    solution = solved(pattern, exactly, dtype)
    stale = solved(pattern, exactly, dtype, seed=1)
    with pytest.raises(CertificateError, match=r"tile 0: the mask keeps .* not proved optimal"):
        lie(solution, mask=stale.mask).check()


@pytest.mark.parametrize(("pattern", "exactly", "dtype"), CASES)
def test_prices_of_another_tile_order(pattern: str, exactly: bool, dtype: torch.dtype) -> None:
    solution = solved(pattern, exactly, dtype)
    certificate = solution.certificate
    assert certificate is not None
    with pytest.raises(CertificateError, match="not proved optimal"):
        lie(solution, u=certificate.u.flip(0), v=certificate.v.flip(0)).check()
    with pytest.raises(CertificateError, match="not proved optimal"):
        lie(solution, u=certificate.v, v=certificate.u).check()


@pytest.mark.parametrize(("pattern", "exactly", "dtype"), CASES)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_nudged_prices_pass_only_where_they_still_prove(
    pattern: str, exactly: bool, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    structure = Pattern.parse(pattern)
    scores = scores_of(dtype, seed % 50, rows=structure.m)[:, : structure.m]
    solution = solve(scores, structure, Exact(exactly))
    certificate = solution.certificate
    assert certificate is not None
    u, v = certificate.u.clone(), certificate.v.clone()
    largest = int(max(u.abs().max(), v.abs().max(), 1))
    for _ in range(data.draw(st.integers(1, 3))):
        side, place = data.draw(st.sampled_from([u, v])), data.draw(st.integers(0, structure.m - 1))
        side[0, place] += data.draw(st.sampled_from([1, -1, 2, -2, largest, -largest, 1 << 20]))
    nudged = lie(solution, u=u, v=v)
    assert nudged.certificate is not None
    q = quantised(scores, int(certificate.exponent[0]))
    prices = [[Fraction(price) for price in side[0].tolist()] for side in (u, v)]
    bound = oracle.dual_bound(q, *prices, structure.n)
    proved = bound == q[solution.mask.numpy()].sum() and (exactly or int(min(u.min(), v.min())) >= 0)
    if proved:
        nudged.check()
    else:
        with pytest.raises(CertificateError, match="not proved optimal"):
            nudged.check()


def quantised(tile: Tensor, exponent: int) -> np.ndarray:
    """Scores times 2**exponent, to the nearest whole number, half to even."""
    return np.vectorize(lambda number: Fraction(round(number * Fraction(2) ** exponent)), otypes=[object])(oracle.fractions(tile))


def test_a_price_far_off() -> None:
    solution = solved("3:8-T", False, torch.float32)
    certificate = solution.certificate
    assert certificate is not None
    u = certificate.u.clone()
    u[2, 3] += 1 << 24
    with pytest.raises(
        CertificateError, match=r"tile 2: the mask keeps \d+, the prices bound the optimum by \d+ \(units of 2\*\*-"
    ):
        lie(solution, u=u).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_exponent_so_coarse_that_anything_is_optimal(dtype: torch.dtype) -> None:
    solution = solved("3:8-T", False, dtype)
    certificate = solution.certificate
    assert certificate is not None
    nothing = torch.zeros_like(certificate.u)
    for exponent in (-60, 0, 10, 19):
        blunt = lie(solution, u=nothing, v=nothing, exponent=torch.full_like(certificate.exponent, exponent))
        with pytest.raises(CertificateError, match=rf"tile 0: exponent {exponent} rounds the scores more coarsely than 24 bits"):
            blunt.check()


def test_whole_numbers_may_not_be_rounded_at_all() -> None:
    solution = solved("3:8-T", False, torch.int32)
    certificate = solution.certificate
    assert certificate is not None
    nothing = torch.zeros_like(certificate.u)
    with pytest.raises(CertificateError, match="tile 0: exponent -1 rounds the scores"):
        lie(solution, u=nothing, v=nothing, exponent=torch.full_like(certificate.exponent, -1)).check()


def test_one_bit_less_than_24_is_refused() -> None:
    scores = torch.full((4, 4), 1.0)
    solution = solve(scores, "2:4-T").check()
    certificate = solution.certificate
    assert certificate is not None
    one = torch.full_like(certificate.exponent, 22)
    with pytest.raises(CertificateError, match="exponent 22 rounds"):
        lie(solution, exponent=one, u=certificate.u, v=certificate.v).check()


def test_prices_of_the_other_program() -> None:
    scores = torch.tensor([[10.0, 10, 0], [10, 10, 0], [0, 0, 10]])
    poor = solve(scores, "2:3-T", Exact(exactly=True)).check()
    assert poor.value == 40
    assert solve(scores, "2:3-T").check().value == 50
    with pytest.raises(CertificateError, match='"exactly N" program prove nothing about "at most N"'):
        dataclasses.replace(poor, exactly=False).check()
    mislabelled = lie(dataclasses.replace(poor, exactly=False), exactly=False)
    assert mislabelled.certificate is not None
    assert int(min(mislabelled.certificate.u.min(), mislabelled.certificate.v.min())) < 0
    with pytest.raises(CertificateError, match="not proved optimal"):
        mislabelled.check()


def test_exactly_n_is_checked_on_every_row_and_column() -> None:
    rich = solve(torch.tensor([[10.0, 10, 0], [10, 10, 0], [0, 0, 10]]), "2:3-T")
    with pytest.raises(CertificateError, match="tile 0: a row or column does not keep exactly 2"):
        dataclasses.replace(rich, exactly=True).check()


def test_prices_of_the_wrong_shape() -> None:
    solution = solved("3:8-T", False, torch.float32)
    certificate = solution.certificate
    assert certificate is not None
    for changes in ({"u": certificate.u[:-1]}, {"v": certificate.v[:, :-1]}, {"exponent": certificate.exponent[:-1]}):
        with pytest.raises(CertificateError, match=r"6 tiles of side 8 need prices of shape \(6, 8\) and exponents \(6,\)"):
            lie(solution, **changes).check()


def test_an_infeasible_mask_of_larger_value() -> None:
    solution = solved("2:4-T", False, torch.float32)
    with pytest.raises(PatternError, match=r"groups break 2:4-T; the first: W, row 0"):
        lie(solution, mask=torch.ones_like(solution.mask)).check()


def test_prices_of_52_bits_are_checked_as_well() -> None:
    scores = torch.rand(4, 8, dtype=torch.float64)
    scores[0, 0], scores[0, 5] = 1e-200, 1e200
    solution = solve(scores, "2:4-T").check()
    certificate = solution.certificate
    assert certificate is not None
    with pytest.raises(CertificateError, match="not proved optimal"):
        lie(solution, u=certificate.u + (1 << 50)).check()
    for finer in (1, 5000):
        with pytest.raises(CertificateError, match=r"not proved optimal|makes scores of more than 52 bits"):
            lie(solution, exponent=certificate.exponent + finer).check()
    mask = solution.mask.clone()
    mask[0, 5] = False
    with pytest.raises(CertificateError, match="not proved optimal"):
        lie(solution, mask=mask).check()


def test_prices_that_would_overflow_64_bits_do_not_wrap_around() -> None:
    solution = solve(torch.zeros(4, 4), "2:4-T")
    huge = torch.tensor([[1 << 62, 1 << 62, 1 << 62, 1 << 62]])
    with pytest.raises(CertificateError, match="not proved optimal"):
        lie(solution, u=huge, v=huge * 0).check()


@pytest.mark.parametrize("pattern", ["2:4", "4:8-seq", "4:8-paired", "50%"])
def test_a_poor_selection(pattern: str) -> None:
    solution = solve(scores_of(torch.float32), pattern).check()
    assert solution.certificate is None
    assert solution.gap == pytest.approx(0, abs=1e-9)
    worse = solution.mask.clone()
    worse[tuple(worse.nonzero()[0].tolist())] = False
    with pytest.raises(CertificateError, match=rf"the mask keeps .* can be kept at {pattern}"):
        dataclasses.replace(solution, mask=worse).check()


def test_layers_of_a_model_are_chosen_as_in_pruning() -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "head": nn.Linear(16, 16)})
    prune_(model, "2:4-T", include=["*"])
    with torch.no_grad():
        model["head"].weight.fill_(1.0)
    assert verify(model, "2:4-T")  # heads stay dense by default
    broken = verify(model, "2:4-T", include=["*"])
    assert not broken and broken.first is not None and broken.first.layer == "head"
    assert verify(model, "2:4-T", include=["*"], exclude=["head"])
    with pytest.raises(ValueError, match="this is a tensor"):
        verify(model["head"].weight, "2:4-T", include=["*"])


# ---- numbers that fool a careless judge --------------------------------------------------------------------------------

SELECTIONS = ["2:4", "4:8-seq", "4:8-paired", "50%"]


@pytest.mark.parametrize("pattern", ["2:4-T", *SELECTIONS])
def test_what_is_no_bool_mask_of_the_scores_proves_nothing(pattern: str) -> None:
    solution = solve(scores_of(torch.float32), pattern)
    heavy = torch.zeros(16, 24, dtype=torch.int32)
    heavy[0, 0] = 32
    for mask in (heavy, solution.mask.float(), solution.mask.to(torch.uint8), solution.mask[:8], solution.mask.numpy(), None):
        wrong = dataclasses.replace(solution, mask=mask)
        for figure in (Solution.check, lambda one: one.value, lambda one: one.gap, lambda one: one.retained):
            with pytest.raises(
                PatternError, match=r"the mask is .*; scores of shape \(16, 24\) need a bool tensor of that shape"
            ):
                figure(wrong)


@pytest.mark.parametrize("pattern", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_a_group_that_keeps_nothing_fails_however_little_it_weighs(pattern: str, dtype: torch.dtype) -> None:
    heavy, light = (1e30, 1e-30) if dtype.is_floating_point else (100, 1)
    scores = torch.full((4, 16), heavy, dtype=torch.float64).to(dtype)
    scores[2, :8] = light
    if pattern == "50%":
        scores[1], scores[3] = 0, 0  # or the light ones are not part of the best mask
    solution = solve(scores, pattern).check()
    assert solution.gap == 0
    mask = solution.mask.clone()
    mask[2, :8] = False
    worse = dataclasses.replace(solution, mask=mask)
    with pytest.raises(CertificateError, match=rf"the mask keeps .*, but .* can be kept at {pattern}"):
        worse.check()
    lost = oracle.kept(scores, solution.mask) - oracle.kept(scores, mask)
    assert lost > 0
    assert worse.gap == pytest.approx(float(lost), rel=1e-12, abs=0)


@given(data=st.data(), pattern=st.sampled_from(SELECTIONS), seed=st.integers(0, 2**32 - 1))
def test_the_gap_of_any_selection_is_what_it_lacks(data: st.DataObject, pattern: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.int8]))
    scores = torch.randint(0, 5, (3, 11), generator=generator).to(dtype)
    if dtype == torch.int64:
        scores *= 1 << 56
    if dtype == torch.float64:
        scores *= 2.0 ** data.draw(st.sampled_from([-1074, -500, 0, 900]))
    best = solve(scores, pattern)
    best.check()
    assert best.gap == 0
    mask = best.mask & (torch.rand(3, 11, generator=generator) < data.draw(st.floats(0, 1)))
    poorer = dataclasses.replace(best, mask=mask)
    lost = oracle.kept(scores, best.mask) - oracle.kept(scores, mask)
    assert poorer.gap == pytest.approx(float(lost), rel=1e-12, abs=0)
    if lost:
        with pytest.raises(CertificateError, match=r"the mask keeps"):
            poorer.check()
    else:
        poorer.check()


@pytest.mark.parametrize("pattern", ["2:4-T", "3:8-T", *SELECTIONS])
def test_totals_beyond_float64(pattern: str) -> None:
    scores = scores_of(torch.float64) / 8
    usual, large = solve(scores, pattern), solve(scores * 2.0**1022, pattern)
    large.check()
    assert torch.equal(large.mask, usual.mask)
    with pytest.raises(OverflowError, match="the value of these scores exceeds float64; scale them by a power of two"):
        _ = large.value
    with pytest.raises(OverflowError):
        _ = large.bound
    assert large.gap == usual.gap * 2.0**1022
    assert large.retained == pytest.approx(usual.retained)
    assert large.relative_gap == pytest.approx(usual.relative_gap)
    nothing = dataclasses.replace(large, mask=torch.zeros_like(large.mask))
    assert nothing.value == 0
    with pytest.raises(OverflowError, match="the gap of these scores exceeds float64"):
        _ = nothing.gap


@pytest.mark.parametrize("pattern", ["2:4-T", "3:8-T", "2:4"])
def test_scores_that_were_changed_in_place_are_noticed(pattern: str) -> None:
    scores = scores_of(torch.float32)
    known = solve(scores, pattern)
    before = known.value, known.gap, known.retained
    fresh, unread = solve(scores, pattern), solve(scores, pattern)
    scores.mul_(fresh.mask)
    for figure in ("value", "gap", "bound", "relative_gap", "retained"):
        with pytest.raises(ValueError, match="the scores were changed in place after solving"):
            getattr(fresh, figure)
    with pytest.raises(ValueError, match="the scores were changed in place"):
        unread.check()
    assert (known.value, known.gap, known.retained) == before, "what was known of the scores as they were stays known"
    if pattern == "2:4-T":
        assert fresh.certificate is None
    solve(scores, pattern, warm_start=fresh).check()


def test_scores_without_a_version_are_kept_as_they_were() -> None:
    with torch.inference_mode():
        scores = scores_of(torch.float32).clone()
        solution = solve(scores, "3:8-T")
        value = float(scores[solution.mask].double().sum())
        scores.zero_()
    assert solution.check().value == pytest.approx(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("pattern", ["2:4-T", *SELECTIONS])
def test_nothing_is_proved_about_scores_that_are_none(pattern: str, number: float) -> None:
    solution = solve(scores_of(torch.float32), pattern)
    certificate = solution.certificate
    scores = solution.scores.clone()
    scores[3, 3] = number
    with pytest.raises(CertificateError, match="not all finite and >= 0"):
        dataclasses.replace(solution, scores=scores, certify=lambda: certificate).check()


@pytest.mark.parametrize("pattern", ["2:4-T", "3:8-T", "2:4", "50%", "4:8-seq"])
@pytest.mark.parametrize("shape", [(40, 36), (7, 12, 20), (6, 5, 3, 3)])
def test_figures_do_not_depend_on_the_bands(pattern: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(shape)
    solution = solve(scores, pattern)
    poorer = solution.mask.clone()
    poorer.view(-1)[int(poorer.view(-1).nonzero()[-1])] = False
    figures = []
    for band in (1 << 30, 200, 1):
        monkeypatch.setattr("bisparse.gap.BAND", band)
        one, worse = dataclasses.replace(solution).check(), dataclasses.replace(solution, mask=poorer)
        with pytest.raises(CertificateError) as caught:
            worse.check()
        figures.append((one.value, one.gap, worse.gap, str(caught.value)))
    assert figures[0][3] == figures[1][3] == figures[2][3]
    for other in figures[1:]:
        assert other[:3] == pytest.approx(figures[0][:3], rel=1e-12, abs=0)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_tensor_of_a_sparse_layout_is_refused_with_what_to_do(layout: torch.layout) -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0]] * 4)
    stored = weight.to_sparse_csr() if layout == torch.sparse_csr else weight.to_sparse()
    with pytest.raises(ValueError, match=r"fc is stored as torch.sparse_(coo|csr).*to_dense"):
        verify(stored, "2:4", name="fc")
    assert verify(stored.to_dense(), "2:4", name="fc")


@pytest.mark.parametrize("pattern", ["2:4-T", "2:4"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_solution_has_its_figures_and_its_proof(pattern: str, copied: Callable[[Solution], Solution]) -> None:
    scores = torch.rand(16, 16)
    scores += 1  # so that its version counter is not that of a new tensor
    solution = solve(scores, pattern)
    found = copied(solution)
    assert (found.value, found.gap, torch.equal(found.mask, solution.mask)) == (solution.value, 0.0, True)
    assert found.check() is found
    found.scores.zero_()
    with pytest.raises(ValueError, match="changed in place"):
        Solution.check(found)


def test_a_copy_of_a_solution_whose_scores_were_changed_knows_that() -> None:
    solution = solve(torch.rand(16, 16), "2:4-T")
    solution.scores.zero_()
    with pytest.raises(ValueError, match="changed in place"):
        copy.deepcopy(solution).check()


@pytest.mark.parametrize("shape", [(4, 4), (8, 4), (4, 64), (2, 4, 4), (4, 4, 3, 3)])
@pytest.mark.parametrize("numbers", ["exponent 0", "zeros", "ones"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_nothing_that_is_asked_of_a_solution_changes_its_scores(shape: tuple[int, ...], numbers: str, dtype: torch.dtype) -> None:
    # float64 scores whose largest is just below 2**52 are rounded to 52 bits as they are.
    scores = {
        "exponent 0": torch.rand(shape, dtype=torch.float64) * 2**51 + 2**51 - 1,
        "zeros": torch.zeros(shape),
        "ones": torch.ones(shape),
    }
    given = scores[numbers].to(dtype)
    for pattern in ("2:4-T", "2:4", "50%"):
        before = given.clone()
        solution = solve(given, pattern)
        mask = solution.mask.clone()
        solution.check()
        figures = solution.value, solution.gap, solution.bound, solution.retained, solution.relative_gap
        assert torch.equal(given, before) and torch.equal(solution.mask, mask)
        assert solution.check() is solution and figures[1] >= 0


def test_scores_of_inference_mode_are_checked_outside_of_it() -> None:
    with torch.inference_mode():
        scores = torch.rand(64, 64)
    solution = solve(scores, "2:4-T")
    assert solution.check().value > 0
    with torch.inference_mode():
        inside = solve(torch.rand(64, 64), "2:4-T").check()
    assert inside.value > 0


@pytest.mark.parametrize("exactly", [False, True])
def test_prices_do_not_depend_on_what_the_mask_was_changed_to(exactly: bool) -> None:
    scores = torch.rand(8, 64)
    expected = solve(scores, "2:4-T", Exact(exactly=exactly)).bound
    for change in (
        lambda mask: mask.zero_(),
        lambda mask: mask.fill_(True),
        lambda mask: mask[0].zero_(),
        lambda mask: mask[0].fill_(True),
    ):
        solution = solve(scores, "2:4-T", Exact(exactly=exactly))
        kept = solution.mask.clone()
        change(solution.mask)
        assert solution.certificate is not None
        solution.mask.copy_(kept)
        assert solution.check().bound == pytest.approx(expected, rel=1e-6)
