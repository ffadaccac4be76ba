"""Structures: their text, their values, and what each forbids."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from bisparse import Pattern, solve, verify
from bisparse.pattern import Paired, Sequential, Structure, Unstructured, parse_pattern, row_groups

STRUCTURES = st.integers(2, 64).flatmap(
    lambda m: st.integers(1, m).flatmap(
        lambda n: st.one_of(
            st.booleans().map(lambda transposable: Pattern(n, m, transposable)),
            st.just(Sequential(n, m)),
            st.just(Paired(2 * n, 2 * m)),
            st.integers(1, 100).map(lambda percent: Unstructured(percent / 100)),
        )
    )
)


@given(structure=STRUCTURES)
def test_text_and_value_are_inverse(structure: Structure) -> None:
    assert parse_pattern(str(structure)) == structure
    assert Structure.parse(str(structure)) == Pattern.parse(f" {structure} ") == structure
    assert parse_pattern(structure) is structure
    assert hash(parse_pattern(str(structure))) == hash(structure)


@pytest.mark.parametrize(
    ("text", "structure", "density"),
    [
        ("2:4", Pattern(2, 4), 0.5),
        ("4:8-T", Pattern(4, 8, transposable=True), 0.5),
        ("1:4-T", Pattern(1, 4, transposable=True), 0.25),
        ("32:64-T", Pattern(32, 64, transposable=True), 0.5),
        ("8:8-T", Pattern(8, 8, transposable=True), 1.0),
        ("3:5", Pattern(3, 5), 0.6),
        ("4:8-seq", Sequential(4, 8), 0.5),
        ("4:8-paired", Paired(4, 8), 0.5),
        ("50%", Unstructured(0.5), 0.5),
        ("12.5%", Unstructured(0.125), 0.125),
        ("100 %", Unstructured(1.0), 1.0),
    ],
)
def test_texts_and_densities(text: str, structure: Structure, density: float) -> None:
    assert parse_pattern(text) == structure
    assert structure.density == density


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:4", r"pattern 5:4 does not exist: N \(kept\) must be between 1 and M"),
        ("0:4", r"pattern 0:4 does not exist"),
        ("1:1", r"M at least 2"),
        ("5:4-T", r"N counts the weights KEPT of every M"),
        ("2:4-X", r"pattern '2:4-X' is unknown: expected '2:4' .*'4:8-T'.*'4:8-seq'.*'4:8-paired'.*'50%'"),
        ("2:4-t", r"is unknown"),
        ("2:4-T-T", r"is unknown"),
        ("2/4", r"is unknown"),
        ("2 : 4", r"is unknown"),
        ("-2:4", r"is unknown"),
        ("2.0:4", r"is unknown"),
        ("", r"pattern '' is unknown"),
        ("٢:٤-X", r"is unknown"),
        ("3:8-paired", r"3:8-paired: N and M must be even"),
        ("0%", r"above 0 %"),
        ("101%", r"at most 100 %"),
        (None, r"pattern None: expected a text such as '2:4'"),
        (24, r"pattern 24: expected a text"),
    ],
)
def test_what_is_no_pattern_is_refused_with_what_would_be(text: object, message: str) -> None:
    for reader in (parse_pattern, lambda text: solve(torch.ones(4, 4), text), lambda text: verify(torch.ones(4, 4), text)):
        with pytest.raises(ValueError, match=message):
            reader(text)


@pytest.mark.parametrize(("n", "m"), [(2.0, 4), (2, 4.0), (True, 4), ("2", 4), (None, 4)])
@pytest.mark.parametrize("kind", [Pattern, Sequential, Paired])
def test_numbers_must_be_whole(kind: type[Pattern], n: object, m: object) -> None:
    with pytest.raises(ValueError, match="N and M must be whole numbers"):
        kind(n, m)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_unstructured_density_must_be_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="above 0 % and at most 100 %"):
        Unstructured(fraction)


def test_structures_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pattern(2, 4).n = 3
    with pytest.raises(TypeError):
        Structure()


def test_unstructured_keeps_a_rounded_share() -> None:
    assert Unstructured(0.5).kept(10) == 5
    assert Unstructured(1 / 3).kept(10) == 3
    assert Unstructured(0.01).kept(10) == 0


# ---- which groups break a structure ----------------------------------------------------------------------------------

MASKS = st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(0, 2**32 - 1), st.floats(0, 1))


def random_mask(rows: int, columns: int, seed: int, density: float) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@given(shape=MASKS, m=st.integers(2, 8), data=st.data())
def test_groups_that_keep_too_many(shape: tuple[int, int, int, float], m: int, data: st.DataObject) -> None:
    mask, pattern = random_mask(*shape), Pattern(data.draw(st.integers(1, m)), m)
    broken = pattern.row_violations(mask)
    assert broken.shape == (mask.shape[0], -(-mask.shape[1] // m))
    found = {(row, group) for _, row, group, _ in oracle.overfull(mask, pattern)}
    assert {tuple(place) for place in broken.nonzero().tolist()} == found


@given(shape=MASKS, m=st.integers(2, 8), data=st.data())
def test_groups_whose_zeros_are_not_together(shape: tuple[int, int, int, float], m: int, data: st.DataObject) -> None:
    mask, n = random_mask(*shape), data.draw(st.integers(1, m))
    broken = Sequential(n, m).row_violations(mask)
    for row, entries in enumerate(mask.tolist()):
        for group, start in enumerate(range(0, len(entries), m)):
            text = "".join("x" if kept else "0" for kept in entries[start : start + m]).ljust(m, "0")
            assert bool(broken[row, group]) == ("0" * (m - n) not in text)


@given(shape=MASKS, half=st.integers(1, 4), data=st.data())
def test_groups_with_too_many_pairs(shape: tuple[int, int, int, float], half: int, data: st.DataObject) -> None:
    mask, pairs = random_mask(*shape), data.draw(st.integers(1, half))
    m = 2 * half
    broken = Paired(2 * pairs, m).row_violations(mask)
    for row, entries in enumerate(mask.tolist()):
        for group, start in enumerate(range(0, len(entries), m)):
            touched = {place // 2 for place, kept in enumerate(entries[start : start + m]) if kept}
            assert bool(broken[row, group]) == (len(touched) > pairs)


@given(shape=MASKS, percent=st.integers(1, 100))
def test_matrix_that_keeps_too_many(shape: tuple[int, int, int, float], percent: int) -> None:
    mask, structure = random_mask(*shape), Unstructured(percent / 100)
    broken = structure.row_violations(mask)
    assert int(broken.sum()) == (sum(map(sum, mask.tolist())) > round(percent / 100 * mask.numel()))


def test_short_last_group_is_completed_with_pruned_entries() -> None:
    groups = row_groups(torch.ones(1, 5, dtype=torch.bool), 4)
    assert groups.int().tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0]]]
    # Sequential zeros may be the completion: the last group of 5 holds with one kept entry of its own.
    assert Sequential(2, 4).row_violations(torch.tensor([[1, 1, 0, 0, 1]]).bool()).tolist() == [[False, False]]


def test_batches_of_matrices() -> None:
    mask = torch.zeros(2, 3, 8, dtype=torch.bool)
    mask[1, 2, 4:7] = True
    assert Pattern(2, 4).row_violations(mask).nonzero().tolist() == [[1, 2, 1]]
