"""The Triton kernels of layers in training, in Triton's interpreter: bit by bit what their specification says."""

import pytest
import torch
from test_accelerate import random_mask

from bisparse.kernels.sparse24 import cuda_values
from bisparse.kernels.sparse24.positions import find_positions, reference_find_positions, reference_take_values


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_values, "BLOCK_ROWS", 4)
    monkeypatch.setattr(cuda_values, "BLOCK_GROUPS", 8)


@pytest.mark.parametrize("shape", [(1, 4), (5, 36), (9, 30), (12, 64), (3, 33)])
@pytest.mark.parametrize(("given", "wanted"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float16")])
def test_values_are_those_of_the_specification(shape: tuple[int, int], given: str, wanted: str) -> None:
    rows, columns = shape
    # The interpreter cuts float32 to bfloat16 where a GPU rounds (test_kernels_values.py looks for that): exact numbers only.
    weight = torch.randn(rows, columns).to(getattr(torch, wanted)).to(getattr(torch, given))
    weight[0, 0] = float("inf")
    for matrix, mask in ((weight, random_mask(rows, columns)), (weight.t(), random_mask(columns, rows))):
        positions, dtype = find_positions(mask), getattr(torch, wanted)
        behind = torch.arange(5, dtype=dtype)
        expected = reference_take_values(matrix, positions, dtype)
        # Fresh memory is poisoned, so that what is not written shows.
        torch.empty = poisoned(torch.empty)  # type: ignore[assignment]
        try:
            found = cuda_values.take_values(matrix, positions, dtype)
            followed = cuda_values.take_values(matrix, positions, dtype, behind)
        finally:
            torch.empty = torch.empty.honest  # type: ignore[attr-defined]
        assert torch.equal(found, expected) and found.is_contiguous()
        assert torch.equal(followed, torch.cat((expected.flatten(), behind)))
        assert torch.equal(followed, reference_take_values(matrix, positions, dtype, behind))


@pytest.mark.parametrize("shape", [(1, 4), (5, 36), (9, 30), (3, 33)])
def test_positions_are_those_of_the_specification(shape: tuple[int, int]) -> None:
    for mask in (random_mask(*shape), random_mask(*shape).t().contiguous().t(), torch.zeros(shape, dtype=torch.bool)):
        found, broken = cuda_values.find_positions(mask)
        expected, expected_broken = reference_find_positions(mask)
        assert torch.equal(found, expected) and bool(broken) == bool(expected_broken)
        for place in range(mask.shape[0]):
            wrong = mask.clone()
            wrong[place, :3] = True
            assert bool(cuda_values.find_positions(wrong)[1]) == bool(reference_find_positions(wrong)[1]) == (shape[1] > 2)


def test_no_rows_and_no_groups() -> None:
    for rows, columns in ((0, 8), (8, 0)):
        positions = torch.zeros(rows, columns // 4, dtype=torch.uint8)
        assert cuda_values.take_values(torch.zeros(rows, columns), positions, torch.bfloat16).shape == (rows, columns // 2)


def poisoned(honest):  # type: ignore[no-untyped-def]
    def empty(*arguments, **how):  # type: ignore[no-untyped-def]
        made = honest(*arguments, **how)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    empty.honest = honest  # type: ignore[attr-defined]
    return empty
