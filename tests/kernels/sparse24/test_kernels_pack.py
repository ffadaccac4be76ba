"""Packing for sparse tensor cores: the specification against torch's own conversions, bit by bit."""

import pytest
import torch
from test_kernels_metadata import any_layout
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from bisparse import solve, verify
from bisparse.kernels.sparse24 import pack
from bisparse.kernels.sparse24.metadata import empty_slots, lay_out
from bisparse.kernels.sparse24.pack import metadata_place, pack_2to4, pack_2to4_transposable, split_packed
from bisparse.kernels.sparse24.positions import take_values

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 96), (128, 160)], ids=str)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def assert_packed_as_torch_does(dense: Tensor, packed: Tensor) -> None:
    values, metadata = split_packed(packed, *dense.shape)
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(dense.contiguous())
    assert (values.dtype, metadata.dtype) == (dense.dtype, torch.int16)
    assert torch.equal(bits(values), bits(expected_values))
    assert torch.equal(metadata, expected_metadata)
    assert torch.equal(bits(sparse_semi_structured_to_dense_cutlass(values, metadata)), bits(dense))


@HALF
@SHAPES
def test_mask_is_the_optimum_and_both_sides_are_packed_as_torch_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    mask, *packed = pack_2to4_transposable(weight)
    assert torch.equal(mask, solve(weight.abs(), "2:4-T").mask)
    dense = torch.where(mask, weight, torch.zeros_like(weight))
    assert_packed_as_torch_does(dense, packed[0])
    assert_packed_as_torch_does(dense.t(), packed[1])


@HALF
def test_every_group_there_is(dtype: torch.dtype) -> None:
    # All 11 groups with at most two kept, at every place, in both operands.
    kept = [[int(b) for b in f"{code:04b}"] for code in range(16) if code.bit_count() <= 2]
    mask = torch.zeros(64, 64, dtype=torch.bool)
    for place in range(16 * 16):
        group = torch.tensor(kept[place % len(kept)], dtype=torch.bool)
        row, column = place // 16 * 4, place % 16 * 4
        if place % 2:
            mask[row + place % 4, column : column + 4] = group
        else:
            mask[row : row + 4, column + place % 4] = group
    assert bool(verify(mask, "2:4-T"))
    weight = torch.randn(64, 64).to(dtype)
    weight[weight == 0] = 1
    dense = torch.where(mask, weight, torch.zeros_like(weight))
    packed = pack_2to4(weight, mask)
    assert_packed_as_torch_does(dense, packed[0])
    assert_packed_as_torch_does(dense.t(), packed[1])


def test_weights_that_are_zero_or_full_of_ties() -> None:
    for weight in (torch.zeros(32, 64), torch.ones(32, 64), torch.randint(-2, 3, (32, 64))):
        weight = weight.to(torch.bfloat16)
        mask, *packed = pack_2to4_transposable(weight)
        verify(mask, "2:4-T").check()
        dense = torch.where(mask, weight, torch.zeros_like(weight))
        assert_packed_as_torch_does(dense, packed[0])
        assert_packed_as_torch_does(dense.t(), packed[1])


def test_what_the_mask_drops_is_zero_even_if_it_is_not_finite() -> None:
    weight, mask = torch.ones(32, 32, dtype=torch.float16), torch.zeros(32, 32, dtype=torch.bool)
    mask[0, 1] = True
    weight[0, 0], weight[1, 0] = torch.inf, torch.nan
    for packed in pack_2to4(weight, mask):
        assert split_packed(packed, 32, 32)[0].sum() == 1


def test_metadata_places_are_a_permutation() -> None:
    place = metadata_place(96, 6)
    assert torch.equal(place.flatten().sort().values, torch.arange(96 * 6))


def test_strides_do_not_matter() -> None:
    weight = torch.randn(64, 32).half()
    for packed, other in zip(pack_2to4_transposable(weight), pack_2to4_transposable(weight.t().contiguous().t()), strict=True):
        assert torch.equal(packed, other)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(32, 32), "float16 or bfloat16"),
        (torch.zeros(2, 32, 32).half(), "matrix"),
        (torch.zeros(32, 48).half(), "divisible by 32"),
        (torch.zeros(16, 32).half(), "divisible by 32"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_2to4_transposable(weight)


def test_a_mask_of_another_shape_or_dtype_is_refused() -> None:
    weight = torch.zeros(32, 32).half()
    for mask in (torch.zeros(32, 64, dtype=torch.bool), torch.zeros(32, 32)):
        with pytest.raises(ValueError, match="bool mask"):
            pack_2to4(weight, mask)


@HALF
def test_packed_in_another_librarys_form(dtype: torch.dtype) -> None:
    """Values and metadata each as that layout has them, by the operators that a refresh and every pass use."""
    weight = torch.randn(64, 96).to(dtype)
    layout = any_layout(64, 96, 1)
    layout_t = any_layout(96, 64, 2, 8, 8)
    mask, *packed = pack_2to4_transposable(weight, (layout, layout_t))
    slots, slots_t = empty_slots(64, 96, mask.device), empty_slots(96, 64, mask.device)
    lay_out(mask, layout, *slots, (layout_t, *slots_t))
    for found, matrix, (positions, metadata) in zip(packed, (weight, weight.t()), (slots, slots_t), strict=True):
        values, words = split_packed(found, *matrix.shape)
        assert torch.equal(values, take_values(matrix, positions)) and torch.equal(words.view(torch.uint8), metadata)


def test_a_form_of_other_matrices_is_refused() -> None:
    weight = torch.zeros(32, 96).half()
    layout, layout_t = any_layout(32, 96, 0), any_layout(96, 32, 1)
    tall = any_layout(64, 96, 0, 64, 8)
    for layouts, which in (((tall, layout_t), "32 x 96"), ((layout, tall), "96 x 32")):
        message = f"in blocks of 64 x 32 does not tile a {which} matrix"
        with pytest.raises(ValueError, match=message):
            pack_2to4(weight, weight != 0, layouts)
        with pytest.raises(ValueError, match=message):
            pack_2to4_transposable(weight, layouts)


def test_operators_keep_the_rules_of_torch() -> None:
    weight = torch.randn(32, 64).half()
    mask = pack_2to4_transposable(weight)[0]
    layouts = pack._flat(pack._cutlass_layouts(weight))
    torch.library.opcheck(torch.ops.bisparse.pack_2to4.default, (weight, mask, *layouts))
    torch.library.opcheck(torch.ops.bisparse.pack_2to4_transposable.default, (weight, *layouts))
