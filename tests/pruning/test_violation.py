"""Pattern violation against the paper's table, counting, and chance."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from bisparse import Pattern, solve
from bisparse.pruning import fitting_patterns, predicted_violation, sparsest_pattern, violation
from bisparse.pruning.violation import CONFIDENCE

TABLE = {  # zero rate: (v_b, v_w) at 2:4 and at 4:8, as in the paper's section 5
    0.5: ((0.313, 0.188), (0.363, 0.137)),
    0.6: ((0.179, 0.128), (0.174, 0.073)),
    0.7: ((0.084, 0.077), (0.058, 0.029)),
    0.8: ((0.027, 0.036), (0.010, 0.007)),
    0.9: ((0.004, 0.010), (0.0004, 0.0006)),
}


@pytest.mark.parametrize("zeros", TABLE)
@pytest.mark.parametrize("which", [0, 1], ids=["2:4", "4:8"])
def test_predictions_are_the_table(zeros: float, which: int) -> None:
    weights, blocks = predicted_violation(1 - zeros, ("2:4", "4:8")[which])
    expected_blocks, expected_weights = TABLE[zeros][which]
    assert blocks == pytest.approx(expected_blocks, abs=0.00051 if expected_blocks >= 0.001 else 0.00006)
    assert weights == pytest.approx(expected_weights, abs=0.00051 if expected_weights >= 0.001 else 0.00006)


def test_from_4_8_to_2_4_by_enumeration() -> None:
    rows = torch.zeros(70, 8, dtype=torch.bool)
    for row, kept in zip(rows, combinations(range(8), 4), strict=True):
        row[list(kept)] = True
    found = violation(rows, "2:4")
    assert found.weights == pytest.approx(9 / 70)
    assert found.groups == pytest.approx(17 / 70)
    assert predicted_violation("4:8", "2:4") == pytest.approx((9 / 70, 17 / 70))
    # Of the 8-blocks, 17 of 35 hold an overfull half.
    halves = rows.unflatten(1, (2, 4)).sum(2)
    assert float((halves > 2).any(1).double().mean()) == pytest.approx(17 / 35)


def test_a_mask_that_fits_has_no_violation_and_2_4_always_fits_4_8() -> None:
    mask = solve(torch.rand(32, 32), "2:4").mask
    assert violation(mask, "2:4").weights == 0 and violation(mask, "2:4").groups == 0
    assert violation(mask, "4:8").groups == 0
    assert predicted_violation("2:4", "4:8") == (0.0, 0.0)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4-T", "4:8-T"])
def test_random_masks_violate_as_predicted(pattern: str) -> None:
    mask = torch.rand(256, 256) < 0.4
    found = violation(mask, pattern)
    assert found.groups == pytest.approx(found.predicted_groups, abs=0.02)
    assert found.weights == pytest.approx(found.predicted_weights, abs=0.02)
    assert found.weights > 0


def test_transposable_violation_counts_columns_too() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 0] = True  # every row holds, one column keeps four
    assert violation(mask, "2:4").groups == 0
    found = violation(mask, "2:4-T")
    assert (found.weights, found.groups) == (0.5, 1 / 8)


def test_scores_weigh_what_is_lost_and_a_weights_nonzeros_are_its_mask() -> None:
    weight = torch.tensor([[4.0, -2.0, 1.0, 0.0]])
    assert violation(weight, "2:4").weights == pytest.approx(1 / 3)
    assert violation(weight, "2:4", weight.abs()).weights == pytest.approx(1 / 7)


def test_empty_masks_violate_nothing() -> None:
    found = violation(torch.zeros(8, 8, dtype=torch.bool), "2:4")
    assert (found.weights, found.groups, found.predicted_weights) == (0, 0, 0)


def test_the_sparsest_pattern_fits_and_the_next_sparser_does_not() -> None:
    for zeros in (0.3, 0.5, 0.7, 0.9, 0.99):
        for m in (4, 8, 16):
            chosen = sparsest_pattern(zeros, m, confidence=0.9)
            fits = {n: 1 - predicted_violation(1 - zeros, Pattern(n, m))[1] for n in range(1, m)}
            good = [n for n, share in fits.items() if share >= 0.9]
            assert (chosen.n if chosen else None) == (min(good) if good else None)
    assert sparsest_pattern(0.0, 4) is None
    mask = solve(torch.rand(64, 64), "3:8").mask
    assert str(sparsest_pattern(mask, 8, confidence=1.0)) == "3:8"
    assert str(sparsest_pattern(solve(torch.rand(64, 64), "3:8-T").mask, 8, confidence=1.0, transposable=True)) == "3:8-T"
    with pytest.raises(ValueError, match="confidence"):
        sparsest_pattern(0.5, 4, confidence=0.0)


def test_patterns_are_proposed_layer_by_layer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 64) < 0.1)
        model[1].weight.mul_(solve(torch.rand(64, 64), "2:4").mask)
    proposed = fitting_patterns(model, 4)
    assert {name: str(one) for name, one in proposed.items()} == {"0": "1:4" if proposed["0"].n == 1 else "2:4", "1": "2:4"}


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "4:8-T", "4:8-paired", "2:4-seq"])
@pytest.mark.parametrize("origin", ["4:8", "4:8-T", "2:4"])
def test_random_n_m_masks_violate_as_predicted(origin: str, pattern: str) -> None:
    mask = solve(torch.rand(512, 512), origin).mask
    found = violation(mask, pattern)
    assert str(found.origin) == origin
    assert (found.origin_weights, found.origin_groups) == predicted_violation(origin, pattern)
    assert found.weights == pytest.approx(found.origin_weights, abs=0.015)
    assert found.groups == pytest.approx(found.origin_groups, abs=0.02)


@pytest.mark.parametrize(
    ("origin", "pattern"),
    [("2:4", "2:6"), ("2:4", "3:6"), ("4:6", "2:4"), ("8:16", "6:12"), ("5:9", "1:2"), ("2:4-T", "3:6-T"), ("2:4", "3:6-seq")],
)
def test_groups_that_do_not_divide_each_other_violate_as_predicted(origin: str, pattern: str) -> None:
    mask = solve(torch.rand(432, 432, generator=torch.Generator().manual_seed(1)), origin).mask
    found = violation(mask, pattern)
    assert (found.weights, found.groups) == pytest.approx(predicted_violation(origin, pattern), abs=0.012)


def test_the_origin_is_the_n_m_that_a_mask_obeys_and_fills() -> None:
    assert violation(torch.rand(64, 64) < 0.5, "2:4").origin is None
    assert violation(torch.ones(8, 8, dtype=torch.bool), "2:4").origin is None
    mask = solve(torch.rand(64, 64), "4:8").mask
    assert str(violation(mask, "2:4").origin) == "4:8"
    assert violation(mask & (torch.rand(64, 64) < 0.8), "2:4").origin is None, "one that is obeyed by chance"


@pytest.mark.parametrize("to", ["4:8-paired", "4:8-seq", "2:4", "30%"])
def test_what_has_to_go_is_known_at_every_structure(to: str) -> None:
    kept = torch.rand(32, 64) < 0.5
    best = solve(torch.rand(32, 64) * kept + 2.0 * kept, to).mask & kept
    found = violation(kept, to)
    # Every kept weight counts nearly the same in those scores, so that their best mask keeps as many as can be.
    assert found.weights == pytest.approx(1 - float(best.sum() / kept.sum()), abs=0.01)
    assert 0 < found.weights < 1 and found.groups > 0
    assert (found.predicted_weights is None) == (to == "30%")


def test_the_guide_says_what_share_of_the_groups_has_to_fit():
    page = Path(__file__).parents[2] / "docs" / "pruning.md"
    assert f"in at least {100 * CONFIDENCE:.0f} % of its groups" in page.read_text()


def test_an_unstructured_pattern_is_violated_by_what_is_beyond_its_density() -> None:
    kept = torch.arange(64).view(8, 8) < 32
    assert violation(kept, "25%").weights == pytest.approx(0.5)
    assert violation(kept, "50%").weights == 0 and violation(kept, "50%").groups == 0


def test_only_patterns_have_a_prediction() -> None:
    with pytest.raises(ValueError, match="expected a pattern such as"):
        predicted_violation(0.5, "50%")


@pytest.mark.parametrize("pattern", ["1:1025", "1:99999-T", "1:99999-seq"])
@pytest.mark.parametrize("origin", [0.0, 0.5, "2:4"])
def test_groups_too_large_for_float64_are_refused(origin, pattern):
    with pytest.raises(ValueError, match="M up to 1024"):
        predicted_violation(origin, pattern)
    assert predicted_violation(0.5, "512:1024")[1] > 0
