"""Layouts: the matrices that a weight holds are the ones its GEMMs multiply by."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import bisparse
from bisparse.pruning import violation
from bisparse.tiles import (
    Layout,
    LayoutKind,
    check_padding,
    default_layout,
    from_matrices,
    from_tiles,
    pad_to_multiple,
    to_matrices,
    to_tiles,
)

SHAPES = {
    LayoutKind.LINEAR: st.tuples(st.integers(1, 6), st.integers(1, 6)),
    LayoutKind.TRANSPOSED: st.tuples(st.integers(1, 6), st.integers(1, 6)),
    LayoutKind.EXPERTS: st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    LayoutKind.EXPERTS_TRANSPOSED: st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
}
LAYOUTS = st.one_of(
    *(st.tuples(st.just(Layout(kind)), shape) for kind, shape in SHAPES.items()),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)).map(
        lambda size: (Layout(LayoutKind.PACKED, parts=size[0]), (size[0] * size[1], size[2]))
    ),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3)).map(
        lambda size: (Layout(LayoutKind.CONV, groups=size[0]), (size[0] * size[1], size[2], *size[3]))
    ),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3)).map(
        lambda size: (Layout(LayoutKind.CONV_TRANSPOSED, groups=size[0]), (size[0] * size[1], size[2], *size[3]))
    ),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3)).map(
        lambda size: (Layout(LayoutKind.CONV_LAST, groups=size[0]), (size[0] * size[1], *size[3], size[2]))
    ),
)


def counting(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@given(layout_and_shape=LAYOUTS)
def test_matrices_and_weight_are_inverse(layout_and_shape: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = layout_and_shape
    weight = counting(*shape)
    matrices = to_matrices(weight, layout)
    assert matrices.ndim == 3
    assert sorted(matrices.flatten().tolist()) == list(range(weight.numel()))
    cropped = pad_to_multiple(matrices, 7)[:, : matrices.shape[1], : matrices.shape[2]]
    for copy in (matrices, matrices.contiguous(), cropped):
        again = from_matrices(copy, layout, weight.shape)
        assert torch.equal(again, weight)
        assert again.is_contiguous()


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), m=st.integers(2, 5))
def test_tiles_and_matrix_are_inverse(rows: int, columns: int, m: int) -> None:
    matrix = counting(rows * m, columns * m)
    tiles = to_tiles(matrix, m)
    assert tiles.shape == (rows * columns, m, m)
    for tile in range(rows * columns):
        top, left = tile // columns * m, tile % columns * m
        assert torch.equal(tiles[tile], matrix[top : top + m, left : left + m])
    assert torch.equal(from_tiles(tiles, rows * m, columns * m), matrix)


def test_tiles_of_a_transposed_view() -> None:
    matrix = counting(4, 8).t()
    assert torch.equal(to_tiles(matrix, 4)[1], matrix[4:, :])


@pytest.mark.parametrize(("rows", "columns", "m"), [(4, 8, 4), (5, 8, 4), (5, 9, 4), (1, 1, 3)])
def test_padding_appends_zeros(rows: int, columns: int, m: int) -> None:
    matrices = counting(2, rows, columns) + 1
    padded = pad_to_multiple(matrices, m)
    assert padded.shape[-2] % m == padded.shape[-1] % m == 0
    assert padded.shape[-2] - rows < m and padded.shape[-1] - columns < m
    assert torch.equal(padded[:, :rows, :columns], matrices)
    assert int(padded.sum()) == int(matrices.sum())
    if (padded.shape[-2], padded.shape[-1]) == (rows, columns):
        assert padded is matrices


# ---- the same numbers as the layers compute --------------------------------------------------------------------------


def test_linear_rows_are_outputs() -> None:
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(2, 5)
    (matrix,) = to_matrices(layer.weight, Layout(LayoutKind.LINEAR))
    assert torch.allclose(layer(x), x @ matrix.t(), atol=1e-6)


@pytest.mark.transformers
def test_gpt2_conv1d_is_transposed() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 5)
    x = torch.randn(2, 5)
    (matrix,) = to_matrices(conv1d.weight, Layout(LayoutKind.TRANSPOSED))
    assert matrix.shape == (3, 5)
    assert torch.allclose(conv1d(x), x @ matrix.t() + conv1d.bias, atol=1e-6)


def test_packed_attention_parts_are_query_key_value() -> None:
    attention, x = nn.MultiheadAttention(4, 2, bias=False), torch.randn(3, 4)
    matrices = to_matrices(attention.in_proj_weight, Layout(LayoutKind.PACKED, parts=3))
    together = functional.linear(x, attention.in_proj_weight)
    assert torch.allclose(together, torch.cat([x @ matrix.t() for matrix in matrices], 1), atol=1e-6)


def test_experts_are_a_matrix_each() -> None:
    weight, x = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    matrices = to_matrices(weight, Layout(LayoutKind.EXPERTS))
    assert torch.allclose(torch.einsum("eoi,eti->eto", weight, x), x @ matrices.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolution_is_a_sum_over_kernel_positions(dimensions: int, groups: int) -> None:
    # The GEMM's reduction runs over input channels at one kernel position: that is the axis a group must lie on.
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](4, 6, (2, 3, 2)[:dimensions], groups=groups, bias=False)
    x = torch.randn(2, 4, *(5, 4, 3)[:dimensions])
    expected = conv(x)
    matrices = to_matrices(conv.weight, Layout(LayoutKind.CONV, groups=groups))
    positions = list(itertools.product(*(range(size) for size in conv.kernel_size)))
    assert matrices.shape == (groups * len(positions), 6 // groups, 4 // groups)
    outputs = []
    for group, channels in enumerate(x.chunk(groups, 1)):
        total = torch.zeros(2, 6 // groups, *expected.shape[2:])
        for place, position in enumerate(positions):
            window = channels
            for axis, start in enumerate(position):
                window = window.narrow(2 + axis, start, expected.shape[2 + axis])
            total += torch.einsum("oi,bi...->bo...", matrices[group * len(positions) + place], window)
        outputs.append(total)
    assert torch.allclose(torch.cat(outputs, 1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ndim", "kind"), [(2, LayoutKind.LINEAR), (3, LayoutKind.EXPERTS), (4, LayoutKind.CONV), (5, LayoutKind.CONV)]
)
def test_layout_of_a_bare_tensor(ndim: int, kind: LayoutKind) -> None:
    assert default_layout(ndim) == Layout(kind)


@pytest.mark.parametrize("ndim", [0, 1, 6])
def test_no_layout_for_other_dimensions(ndim: int) -> None:
    with pytest.raises(ValueError, match=rf"a weight of {ndim} dimensions has no GEMM layout: expected 2-D \(O, I\)"):
        default_layout(ndim)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((2, 3, 4), Layout(LayoutKind.LINEAR), r"shape \(2, 3, 4\) cannot have the layout 'linear', which needs 2 dimensions"),
        ((2, 3), Layout(LayoutKind.CONV), r"'conv', which needs 3 or 4 or 5 dimensions"),
        ((2, 3), Layout(LayoutKind.EXPERTS), r"'experts', which needs 3 dimensions"),
        ((4, 3), Layout(LayoutKind.PACKED, parts=3), r"shape \(4, 3\) cannot be split into 3 parts"),
        ((4, 3, 2), Layout(LayoutKind.CONV, groups=3), r"cannot be split into 3 groups"),
    ],
)
def test_layout_that_does_not_fit_the_weight(shape: tuple[int, ...], layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_matrices(torch.zeros(shape), layout)
    with pytest.raises(ValueError, match=message):
        from_matrices(torch.zeros(1, *shape[:2]), layout, shape)


@pytest.mark.parametrize("call", [bisparse.solve, violation])
def test_a_pattern_that_would_take_gigabytes_of_padding_is_refused(call: Callable[[Tensor, str], Any]) -> None:
    with pytest.raises(ValueError, match="M = 99999 is far larger"):
        call(torch.rand(16, 16), "1:99999-T")
    assert bisparse.solve(torch.rand(16, 16), "1:64-T").mask.sum() > 0


@pytest.mark.parametrize("m", [0, -4, True, 4.0, "4", None, torch.ones(2)], ids=str)
def test_a_side_that_is_no_whole_number_is_refused(m: Any) -> None:
    for call in (lambda: pad_to_multiple(torch.ones(4, 4), m), lambda: to_tiles(torch.ones(4, 4), m)):
        with pytest.raises(ValueError, match="is no side of a tile"):
            call()


@pytest.mark.parametrize("store", [Tensor.to_mkldnn, Tensor.to_sparse])
def test_tensors_that_are_not_stored_by_strides_are_refused(store: Callable[[Tensor], Tensor]) -> None:
    stored, linear = store(torch.ones(4, 8)), Layout(LayoutKind.LINEAR)
    for call in (
        lambda: pad_to_multiple(stored, 3),
        lambda: to_tiles(stored, 4),
        lambda: from_tiles(store(torch.ones(2, 4, 4)), 4, 8),
        lambda: to_matrices(stored, linear),
        lambda: from_matrices(store(torch.ones(1, 4, 8)), linear, (4, 8)),
    ):
        with pytest.raises(ValueError, match=r"stored as torch\..* pass its dense form"):
            call()


def test_shapes_that_hold_tensors_are_refused():
    with pytest.raises(ValueError, match="tuples of integers"):
        check_padding((16, 16), (torch.ones(2),), 4)
