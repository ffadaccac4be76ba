"""The Triton kernel that lays out positions and metadata, in Triton's interpreter: bit by bit what the specification says."""

import pytest
import torch
from test_kernels_metadata import any_layout, mask_both_ways

from bisparse.kernels.sparse24 import cuda_metadata
from bisparse.kernels.sparse24.metadata import NO_LAYOUT, empty_slots, reference_lay_out

MORE_SHAPES = ((80, 48), (32, 160))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_metadata, "BANDS", 8)
    monkeypatch.setattr(cuda_metadata, "GROUPS", 8)
    monkeypatch.setattr(cuda_metadata, "WORDS", 64)


@pytest.mark.parametrize(
    "shape", [(16, 16), (48, 80), *(pytest.param(one, marks=pytest.mark.slow) for one in ((80, 48), (32, 160)))]
)
@pytest.mark.parametrize("both_ways", [False, True])
def test_positions_and_metadata_are_those_of_the_specification(shape: tuple[int, int], both_ways: bool) -> None:
    rows, columns = shape
    mask, layout = mask_both_ways(*shape), any_layout(*shape, 5)
    layout_t = any_layout(columns, rows, 6)
    column = mask.clone()
    column[4:8, 3], column[4:8, :3] = torch.tensor([True, True, True, False]), False
    row = mask.clone()
    row[9, 4:8], row[8, 4:8], row[10:12, 4:8] = torch.tensor([True, True, True, False]), False, False
    for one, breaks in ((mask, False), (torch.zeros_like(mask), False), (column, both_ways), (row, True)):
        results = []
        for kernel in (cuda_metadata.lay_out, reference_lay_out):
            slots = [
                two.fill_(77) for two in (*empty_slots(rows, columns, mask.device), *empty_slots(columns, rows, mask.device))
            ]
            words, words_t = slots[1].view(torch.int16), slots[3].view(torch.int16)
            sides = (layout_t, (slots[2], words_t)) if both_ways else (NO_LAYOUT, (None, None))
            for broken in (None, torch.zeros((), dtype=torch.int32)):
                kernel(one, *layout, *sides[0], slots[0], words, *sides[1], broken)
            assert bool(broken) == breaks
            results.append(slots)
        # What is written of a broken group is undefined.
        assert breaks or all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


def test_a_mask_in_strides_and_no_mask() -> None:
    mask, layout = mask_both_ways(48, 32), any_layout(32, 48, 5)
    results = []
    for kernel in (cuda_metadata.lay_out, reference_lay_out):
        positions, metadata = empty_slots(32, 48, mask.device)
        kernel(mask.t(), *layout, *NO_LAYOUT, positions, metadata.view(torch.int16), None, None, None)
        results.append((positions, metadata))
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))
    positions, metadata = empty_slots(0, 32, mask.device)
    cuda_metadata.lay_out(mask[:0], *layout, *NO_LAYOUT, positions, metadata.view(torch.int16), None, None, None)
