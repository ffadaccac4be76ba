"""One conformance suite for every solver: a new solver in the table of contents runs through all of it."""

import ast
import dataclasses
import math
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bisparse.solvers
import oracle
from bisparse import CertificateError, solve
from bisparse.pattern import Pattern
from bisparse.solvers import Exact, Greedy, MinCostFlow, Sinkhorn, Solver, TwoApproximation

CLASSES = list(bisparse.solvers.SOLVERS.values())


def takes_exactly(cls: type[Solver]) -> bool:
    """Whether a solver has the optional setting `exactly`."""
    return cls is not TwoApproximation and "exactly" in {field.name for field in dataclasses.fields(cls)}


EXACTLY = [cls(exactly=True) for cls in CLASSES if takes_exactly(cls)]
SETTINGS = [Greedy(fill=False), Exact(strict=True), Sinkhorn(iterations=5, temperature=0.1)]
SOLVERS = [*(cls() for cls in CLASSES), *SETTINGS, *EXACTLY]
QUICK = [solver for solver in SOLVERS if getattr(solver, "iterations", 0) < 60] + [Sinkhorn(exactly=True, iterations=6)]
PATTERNS = ["1:2-T", "1:4-T", "2:4-T", "3:4-T", "3:5-T", "4:8-T", "5:8-T", "7:7-T", "8:16-T", "16:32-T"]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip


def kinds(m: int) -> dict[str, Tensor]:
    """Tiles of every kind that is met or feared, a few of each, float64."""
    generator = torch.Generator().manual_seed(m)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = normal(2, m, m) / (normal(2, m, m) ** 2 + normal(2, m, m) ** 2 + 1e-3).sqrt()
    outlier = normal(2, m, m).abs()
    outlier[:, 0, 0] = 1e8
    staircase = (torch.arange(m)[:, None] + torch.arange(m) < m).double()
    return {
        "gaussian": normal(2, m, m).abs(),
        "heavy tails": student.abs(),
        "mostly zeros": normal(2, m, m).clamp(min=0.84),
        "ties": torch.randint(0, 3, (2, m, m), generator=generator).double(),
        "zeros": torch.zeros(1, m, m, dtype=torch.float64),
        "constant": torch.full((1, m, m), 0.3, dtype=torch.float64),
        "ramp": torch.arange(1, m * m + 1, dtype=torch.float64).view(1, m, m),
        "low rank": (normal(2, m, 1).exp() * normal(2, 1, m).exp()),
        "staircase": staircase[None],
        "one row": torch.cat([torch.ones(1, 1, m), torch.zeros(1, m - 1, m)], 1).double(),
        "blocks": torch.block_diag(torch.ones(m // 2, m // 2), torch.ones(m - m // 2, m - m // 2)).double()[None],
        "narrow range": 1 + 1e-4 * normal(2, m, m).abs(),
        "wide scales": (normal(2, m, 1) * 6).exp() * (normal(2, 1, m) * 6).exp(),
        "one outlier": outlier,
        "subnormal": normal(1, m, m).abs() * 2.0**-140,
        "huge": normal(1, m, m).abs().clamp(max=3) * 2.0**125,
    }


def as_dtype(tiles: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """All kinds in one batch; for narrow types clamped or scaled into their range."""
    batch = torch.cat(list(tiles.values()))
    if dtype.is_floating_point:
        return batch.clamp(max=torch.finfo(dtype).max).to(dtype)
    largest = batch.flatten(1).amax(1)[:, None, None].clamp(min=1e-300)
    return (batch / largest * min(torch.iinfo(dtype).max, 1 << 40)).floor().to(dtype)


def sums(mask: Tensor) -> Tensor:
    return torch.cat([mask.sum(-1), mask.sum(-2)], -1)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def check_feasible(mask: Tensor, scores: Tensor, n: int, solver: Solver) -> None:
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.device == scores.device
    if solver.exactly:
        assert bool((sums(mask) == n).all())
    else:
        assert bool((sums(mask) <= n).all())


# ---- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_feasible_on_every_kind_of_tile(solver: Solver, pattern: str) -> None:
    structure = Pattern.parse(pattern)
    scores = as_dtype(kinds(structure.m), torch.float32)
    check_feasible(solver.solve_tiles(scores, structure.n), scores, structure.n, solver)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_feasible_in_every_dtype(solver: Solver, dtype: torch.dtype) -> None:
    for pattern in ("2:4-T", "3:8-T"):
        structure = Pattern.parse(pattern)
        scores = as_dtype(kinds(structure.m), dtype)
        check_feasible(solver.solve_tiles(scores, structure.n), scores, structure.n, solver)
        assert solver.solve_tiles(scores[:0], structure.n).shape == (0, structure.m, structure.m)


@cache
def best_of_all_masks(pattern: str, exactly: bool, dtype: torch.dtype) -> list[Fraction]:
    structure = Pattern.parse(pattern)
    return [oracle.brute_force(tile, structure.n, exactly) for tile in as_dtype(kinds(structure.m), dtype)]


@pytest.mark.parametrize("pattern", ["1:2-T", "1:4-T", "2:4-T", "2:3-T"])
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_value_against_every_mask_there_is(solver: Solver, pattern: str) -> None:
    structure = Pattern.parse(pattern)
    for dtype in (torch.float32, torch.float64, torch.int64):
        scores = as_dtype(kinds(structure.m), dtype)
        compare_with_optimum(solver, scores, best_of_all_masks(pattern, solver.exactly, dtype), structure.n)


def tiles_for_linear_program(m: int) -> Tensor:
    # Left to the tests in fractions: kinds whose small scores lie below HiGHS' tolerance.
    tiles = {kind: tile for kind, tile in kinds(m).items() if kind not in ("wide scales", "one outlier")}
    if m > 16:
        tiles = {kind: tiles[kind] for kind in ("gaussian", "mostly zeros", "ties", "low rank", "staircase")}
    return as_dtype({kind: tile[:1] for kind, tile in tiles.items()} if m > 8 else tiles, torch.float32)


@cache
def best_by_linear_program(pattern: str, exactly: bool) -> list[Fraction]:
    structure = Pattern.parse(pattern)
    values = oracle.linear_program(tiles_for_linear_program(structure.m), structure.n, exactly)
    return [Fraction(value) for value in values]


@pytest.mark.parametrize("pattern", ["3:5-T", "4:8-T", "2:8-T", "8:16-T", "16:32-T"])
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_value_against_linear_program(solver: Solver, pattern: str) -> None:
    structure = Pattern.parse(pattern)
    scores = tiles_for_linear_program(structure.m)
    compare_with_optimum(solver, scores, best_by_linear_program(pattern, solver.exactly), structure.n, slack=1e-7)


def compare_with_optimum(solver: Solver, scores: Tensor, best: list[Fraction], n: int, slack: float = 0.0) -> None:
    """No value above the optimum, and as near to it as the solver promises."""
    m = scores.shape[-1]
    masks = solver.solve_tiles(scores, n)
    for tile, mask, optimum in zip(scores, masks, best, strict=True):
        value, total = oracle.kept(tile, mask), sum(oracle.fractions(tile).ravel().tolist(), Fraction(0))
        tolerance = Fraction(slack) * total
        assert value <= optimum + tolerance
        if solver.exact:
            # What rounding to 24 bits may cost; nothing where the scores are taken as given.
            unit = oracle.fractions(tile).max() / 2**24
            takes_as_given = isinstance(solver, Exact) and (solver.strict or tile.dtype in (torch.float64, torch.int64))
            assert value >= optimum - tolerance - (0 if takes_as_given else n * m * unit), (solver, tile)
        if solver.guarantee is not None and not solver.exactly:
            quantity, factor = solver.guarantee
            if quantity == "kept":
                assert value >= optimum * Fraction(factor) - tolerance - n * m * oracle.fractions(tile).max() / 2**24
            else:
                assert total - value <= (total - optimum) * Fraction(factor) + tolerance


@pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
def test_two_exact_solvers_agree_where_numbers_are_whole(exactly: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for m, n in ((4, 2), (8, 4), (16, 5), (32, 16)):
        for largest in (2, 100, 1 << 23):
            scores = torch.randint(0, largest, (5, m, m), generator=generator).float()
            ours, theirs = Exact(exactly=exactly).solve_tiles(scores, n), MinCostFlow(exactly=exactly).solve_tiles(scores, n)
            assert torch.equal((scores.double() * ours).sum((1, 2)), (scores.double() * theirs).sum((1, 2)))


# ---- promises that every solver makes --------------------------------------------------------------------------------


def batches(least: float = 0.0) -> st.SearchStrategy[Tensor]:
    """Batches of 0 to 3 tiles of side 2 to 6 with any scores from `least` to 2**100, 0 and ties among them."""
    numbers = st.one_of(st.sampled_from([0.0, 1.0, 1.5, 2.0]), st.floats(least, 2.0**100, width=32))
    shapes = st.tuples(st.integers(0, 3), st.integers(2, 6)).map(lambda size: (size[0], size[1], size[1]))
    return shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=numbers)).map(torch.from_numpy)


@pytest.mark.parametrize("solver", QUICK, ids=ids)
@given(scores=batches(), data=st.data())
def test_feasible_for_any_scores(solver: Solver, scores: Tensor, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, scores.shape[-1]))
    check_feasible(solver.solve_tiles(scores, n), scores, n, solver)


@pytest.mark.parametrize("solver", QUICK, ids=ids)
@given(scores=batches(least=2.0**-100), power=st.integers(-20, 20))
def test_same_mask_for_a_power_of_two_times_the_scores(solver: Solver, scores: Tensor, power: int) -> None:
    assert torch.equal(solver.solve_tiles(scores, 1), solver.solve_tiles(torch.ldexp(scores, torch.tensor(power)), 1))
    n = (scores.shape[-1] + 1) // 2
    assert torch.equal(solver.solve_tiles(scores, n), solver.solve_tiles(torch.ldexp(scores, torch.tensor(power)), n))


# Solvers without a guarantee do not promise this: Sinkhorn rounds differently when a sum's terms come in another order.
@pytest.mark.parametrize("solver", [solver for solver in QUICK if solver.exact or solver.guarantee is not None], ids=ids)
@given(seed=st.integers(0, 10_000), m=st.integers(2, 8), data=st.data())
def test_same_value_for_a_permuted_or_transposed_tile(solver: Solver, seed: int, m: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = data.draw(st.integers(1, m))
    # Heuristics promise it where no two sums are equal; exact solvers also where there are ties.
    ties = solver.exact and data.draw(st.booleans())
    scores = torch.randint(0, 4 if ties else 1 << 24, (2, m, m), generator=generator).double()
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(m, generator=generator)
    value = (scores * solver.solve_tiles(scores, n)).sum((1, 2))
    for moved in (scores.transpose(1, 2), scores[:, rows], scores[:, :, columns], scores[:, rows][:, :, columns].transpose(1, 2)):
        assert torch.equal((moved * solver.solve_tiles(moved, n)).sum((1, 2)), value)


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
@pytest.mark.parametrize("pattern", ["2:4-T", "3:7-T", "8:16-T"])
def test_a_tile_has_the_same_mask_whatever_stands_beside_it(solver: Solver, pattern: str) -> None:
    structure = Pattern.parse(pattern)
    n = structure.n
    scores = as_dtype(kinds(structure.m), torch.float32)
    masks = solver.solve_tiles(scores, n)
    assert torch.equal(solver.solve_tiles(scores, n), masks)
    order = torch.randperm(len(scores))
    assert torch.equal(solver.solve_tiles(scores[order], n), masks[order])
    assert torch.equal(torch.cat([solver.solve_tiles(part, n) for part in scores.split(7)]), masks)
    assert torch.equal(solver.solve_tiles(scores[3:4], n), masks[3:4])


@pytest.mark.parametrize("solver", QUICK, ids=ids)
def test_a_tile_has_the_same_mask_in_a_batch_that_is_worked_in_pieces(solver: Solver) -> None:
    if isinstance(solver, MinCostFlow) or getattr(solver, "strict", False):
        pytest.skip("goes tile by tile")
    scores = torch.randint(0, 50, (70_000, 4, 4)).float()
    masks = solver.solve_tiles(scores, 2)
    for part in (slice(0, 5), slice(40_000, 40_003), slice(69_990, None)):
        assert torch.equal(solver.solve_tiles(scores[part].clone(), 2), masks[part])


@pytest.mark.parametrize("solver", QUICK, ids=ids)
def test_same_mask_with_two_threads(solver: Solver) -> None:
    scores = as_dtype(kinds(8), torch.float32).repeat(3, 1, 1)
    alone = solver.solve_tiles(scores, 4)
    torch.set_num_threads(2)
    try:
        assert torch.equal(solver.solve_tiles(scores, 4), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_strides_do_not_matter_and_scores_stay_as_they_are(solver: Solver) -> None:
    scores = as_dtype(kinds(6), torch.float32)
    before = scores.clone()
    views = [
        scores.transpose(1, 2),
        scores[::2],
        scores[:, ::2, ::2],
        scores.permute(1, 0, 2)[:, :6],
        scores[:1].expand(4, -1, -1),
    ]
    for view in views:
        assert torch.equal(solver.solve_tiles(view, 2), solver.solve_tiles(view.clone(memory_format=torch.contiguous_format), 2))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_half_precision_is_read_as_the_numbers_it_holds(solver: Solver, dtype: torch.dtype) -> None:
    scores = as_dtype(kinds(8), dtype)
    assert torch.equal(solver.solve_tiles(scores, 3), solver.solve_tiles(scores.float(), 3))


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_scores_that_require_a_gradient(solver: Solver) -> None:
    scores = torch.rand(8, 8, requires_grad=True)
    assert not solve(scores, "4:8-T", solver).mask.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_the_same_call_on_a_cuda_tensor(solver: Solver) -> None:
    for m, n in ((4, 2), (8, 4), (16, 8)):
        scores = as_dtype(kinds(m), torch.float32)
        mask, on_gpu = solver.solve_tiles(scores, n), solver.solve_tiles(scores.cuda(), n)
        check_feasible(on_gpu, scores.cuda(), n, solver)
        if solver.exact:
            assert torch.allclose((scores * mask).sum((1, 2)), (scores * on_gpu.cpu()).sum((1, 2)), rtol=1e-6)
        elif solver.guarantee is not None:
            assert torch.equal(on_gpu.cpu(), mask)


# ---- what the paper says, and hard tiles ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
@pytest.mark.parametrize("pattern", ["2:4-T", "4:8-T"])
def test_tile_of_counting_numbers(solver: Solver, pattern: str) -> None:
    # Issue 1 of the paper's code: its own solver came out infeasible here.
    structure = Pattern.parse(pattern)
    scores = torch.arange(1.0, structure.m**2 + 1).view(1, structure.m, structure.m)
    check_feasible(solver.solve_tiles(scores, structure.n), scores, structure.n, solver)


@pytest.mark.parametrize("solver", [Exact(), Exact(strict=True), MinCostFlow()], ids=ids)
def test_at_most_n_can_keep_more_than_exactly_n(solver: Solver) -> None:
    scores = torch.tensor([[[10.0, 10, 0], [10, 10, 0], [0, 0, 10]]])
    assert float((scores * solver.solve_tiles(scores, 2)).sum()) == 50
    assert float((scores * dataclasses.replace(solver, exactly=True).solve_tiles(scores, 2)).sum()) == 40


def test_greedy_keeps_half_in_its_worst_case() -> None:
    epsilon = 2.0**-10
    scores = torch.tensor([[[1 + epsilon, 1], [1, 0]]])
    assert float((scores * Greedy().solve_tiles(scores, 1)).sum()) == 1 + epsilon
    assert float((scores * Exact().solve_tiles(scores, 1)).sum()) == 2


def test_two_approximation_prunes_twice_the_optimum_in_its_worst_case() -> None:
    epsilon = 2.0**-10
    scores = torch.tensor([[[0, 1], [1, 1 + epsilon]]])
    assert float((scores * ~TwoApproximation().solve_tiles(scores, 1)).sum()) == 2
    assert float((scores * ~Exact().solve_tiles(scores, 1)).sum()) == 1 + epsilon


def test_two_approximation_by_hand() -> None:
    # 1 and 2 are pruned for their rows, 3 for its column, 4 for its row; then every line has its zero.
    scores = torch.tensor([[[1.0, 9, 8], [9, 2, 3], [8, 5, 4]]])
    assert TwoApproximation().solve_tiles(scores, 2)[0].int().tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_two_approximation_prunes_too_much() -> None:
    scores = torch.randn(2000, 8, 8).abs()
    mask, best = TwoApproximation().solve_tiles(scores, 4), Greedy().solve_tiles(scores, 4)
    assert float(mask.float().mean()) == pytest.approx(0.404, abs=0.005)
    assert float((scores * mask).sum() / (scores * best).sum()) == pytest.approx(0.92 / 0.992, abs=0.01)


def test_two_approximation_refuses_exactly() -> None:
    with pytest.raises(ValueError, match=r"exactly=True.*cannot keep exactly N.*use Exact"):
        TwoApproximation(exactly=True)


@pytest.mark.parametrize(
    ("pattern", "kept", "not_full"), [("2:4-T", 0.985, 0.16), ("4:8-T", 0.988, 0.55), ("8:16-T", 0.991, 0.87)]
)
def test_greedy_without_filling_is_what_was_measured_of_it(pattern: str, kept: float, not_full: float) -> None:
    structure = Pattern.parse(pattern)
    m, n = structure.m, structure.n
    scores = torch.randn(200 if m == 16 else 1000, m, m).abs()
    mask, best = Greedy(fill=False).solve_tiles(scores, n), Exact().solve_tiles(scores, n)
    assert float((scores * mask).sum() / (scores * best).sum()) == pytest.approx(kept, abs=0.003)
    assert float((sums(mask) < n).any(-1).float().mean()) == pytest.approx(not_full, abs=0.06)


@given(scores=batches(), data=st.data())
def test_filling_never_lowers_the_value(scores: Tensor, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, scores.shape[-1]))
    plain, filled = Greedy(fill=False).solve_tiles(scores, n), Greedy().solve_tiles(scores, n)
    for tile, before, after in zip(scores, plain, filled, strict=True):
        assert oracle.kept(tile, after) >= oracle.kept(tile, before)


def test_filling_swaps_one_entry_for_two() -> None:
    # Row 2 and column 2 are one short, and (2, 2) is taken. Dropping (0, 1) = 8 makes room for (2, 1) = 5 and (0, 2) = 7.
    scores = torch.tensor([[[9.0, 8, 7], [8, 6, 1], [2, 5, 6]]])
    plain = Greedy(fill=False).solve_tiles(scores, 2)[0]
    assert plain.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    filled = Greedy().solve_tiles(scores, 2)[0]
    assert filled.int().tolist() == [[1, 0, 1], [1, 1, 0], [0, 1, 1]]
    assert oracle.kept(scores[0], filled) == oracle.brute_force(scores[0], 2) == 41


def test_filling_stops_where_it_would_cost() -> None:
    scores = torch.tensor([[[10.0, 10, 0], [10, 10, 0], [0, 0, 10]]])
    assert float((scores * Greedy().solve_tiles(scores, 2)).sum()) == 50
    assert float((scores * Greedy(exactly=True).solve_tiles(scores, 2)).sum()) == 40


def test_greedy_cannot_keep_exactly_n_without_filling() -> None:
    with pytest.raises(ValueError, match="use fill=True"):
        Greedy(exactly=True, fill=False)


def test_largest_integers_do_not_overflow() -> None:
    largest = torch.iinfo(torch.int64).max
    scores = torch.tensor([[[largest, largest, 0], [largest, largest - 1, 0], [1, 0, largest]]])
    for solver in (Greedy(), Greedy(exactly=True), Sinkhorn(), MinCostFlow()):
        check_feasible(solver.solve_tiles(scores, 2), scores, 2, solver)
    assert oracle.kept(scores[0], Greedy().solve_tiles(scores, 2)[0]) == 5 * largest - 1


def test_ties_keep_the_lower_row_then_the_lower_column() -> None:
    ones = torch.ones(1, 4, 4)
    top_left = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert Greedy(fill=False).solve_tiles(ones, 2)[0].int().tolist() == top_left
    assert Greedy().solve_tiles(ones, 2)[0].int().tolist() == top_left
    assert Greedy().solve_tiles(torch.tensor([[[0.0, -0.0], [-0.0, 0.0]]]), 1)[0].int().tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(("pattern", "least"), [("2:4-T", 0.9995), ("4:8-T", 0.998), ("8:16-T", 0.998)])
def test_sinkhorn_comes_close(pattern: str, least: float) -> None:
    structure = Pattern.parse(pattern)
    m, n = structure.m, structure.n
    scores = torch.randn(200, m, m).abs()
    best = float((scores * Exact().solve_tiles(scores, n)).sum())
    close = float((scores * Sinkhorn().solve_tiles(scores, n)).sum()) / best
    closer = float((scores * Sinkhorn(iterations=300, temperature=0.002).solve_tiles(scores, n)).sum()) / best
    assert least <= close <= 1 + 1e-6
    assert close < closer + 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": 0.5}, "temperature <= initial_temperature"),
        ({"initial_temperature": math.inf}, "initial_temperature=inf"),
        ({"relaxation": 2.0}, "relaxation=2.0"),
        ({"temperature": math.nan}, "temperature=nan"),
    ],
)
def test_sinkhorn_refuses_settings_that_cannot_work(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinkhorn(**settings)


def test_min_cost_flow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.graph.python", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[flow\]'"):
        MinCostFlow().solve_tiles(torch.rand(1, 4, 4), 2)


@pytest.mark.parametrize("exactly", [False, True], ids=["at most", "exactly"])
def test_min_cost_flow_is_exact_on_wide_ranges(exactly: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        scores = torch.rand(4, 4, 4, dtype=dtype)
        scores[:, 1, 2] = 1e8 if dtype == torch.float32 else 1e4
        for tile, mask in zip(scores, MinCostFlow(exactly=exactly).solve_tiles(scores, 2), strict=True):
            best = oracle.brute_force(tile, 2, exactly)
            assert best - oracle.kept(tile, mask) <= 8 * oracle.fractions(tile).max() / 2**48
    large = torch.randint(0, 1 << 47, (4, 4, 4))
    for tile, mask in zip(large, MinCostFlow(exactly=exactly).solve_tiles(large, 2), strict=True):
        assert oracle.kept(tile, mask) == oracle.brute_force(tile, 2, exactly)


# ---- the house -----------------------------------------------------------------------------------------------------


def test_every_solver_file_has_its_line_in_the_table_of_solvers() -> None:
    folder = Path(bisparse.solvers.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Solver" for base in node.bases):
                listed = {cls.__name__ for cls in CLASSES}
                assert node.name in listed, f"SOLVERS in solvers/__init__.py lacks a line for {node.name} of {path.name}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_solver_is_a_frozen_value_and_says_what_it_promises(cls: type[Solver]) -> None:
    solver = cls()
    assert dataclasses.is_dataclass(solver)
    assert solver == cls() and hash(solver) == hash(cls())
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.exactly = True
    assert solver.exactly is False
    assert cls.exact == (cls.guarantee == ("kept", 1.0))


@dataclasses.dataclass(frozen=True)
class Returns(Solver):
    """Returns what it is given, whatever the scores."""

    mask: object = None

    def solve_tiles(self, scores, n):
        return self.mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 4, 4, dtype=torch.bool), "tile 0 keeps 4 in a row or column, and the pattern at most 2"),
        (torch.eye(4).bool().expand(4, 4, 4) | (torch.arange(4) == 3)[:, None, None], "tile 3 keeps 4 in a row or column"),
        (torch.ones(4, 4, 4), r"returned torch.float32 of shape \(4, 4, 4\): expected a bool tensor"),
        (torch.ones(8, 8, dtype=torch.bool), r"expected a bool tensor of shape \(4, 4, 4\)"),
        (None, "returned NoneType"),
    ],
)
def test_a_faulty_solver_is_noticed(mask, message):
    with pytest.raises(ValueError, match=f"Returns.solve_tiles.*{message}"):
        solve(torch.rand(8, 8), "2:4-T", Returns(mask))


def test_a_solution_without_a_certificate_says_what_to_compare_with():
    with pytest.raises(CertificateError, match=r"only Exact gives one.*compare its value with that of solve\(scores, pattern\)"):
        solve(torch.rand(8, 8), "2:4-T", Greedy()).check()
