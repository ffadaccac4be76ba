"""Positions of a mask and values of a weight, one Triton kernel each.

At a refresh, the positions of a mask: one byte per weight is read, a quarter written. In every pass, the kept values of the
weight, cast: 4 bytes per weight and a quarter for the positions are read, 1 written; plain torch needs an index of 8 bytes per
value, and several passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["find_positions", "take_values"]

BLOCK_ROWS, BLOCK_GROUPS = 32, 64


def find_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`positions.find_positions` on a GPU; the mask with any strides."""
    rows, columns = mask.shape
    groups = -(-columns // 4)
    positions = torch.empty((rows, groups), dtype=torch.uint8, device=mask.device)
    invalid = torch.zeros((), dtype=torch.int32, device=mask.device)
    if positions.numel():
        positions_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(groups, BLOCK_GROUPS))](
            mask.view(torch.uint8), positions, invalid, rows, columns, groups, mask.stride(0), mask.stride(1),
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return positions, invalid != 0


def take_values(weight: Tensor, positions: Tensor, dtype: torch.dtype, tail: Tensor | None = None) -> Tensor:
    """`positions.take_values` on a GPU; the weight with any strides."""
    rows, groups = positions.shape
    count = 2 * rows * groups
    values = torch.empty(count + (0 if tail is None else tail.numel()), dtype=dtype, device=weight.device)
    if tail is not None:
        values[count:] = tail
    if count:
        take_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(groups, BLOCK_GROUPS))](
            weight, positions.contiguous(), values, rows, weight.shape[1], groups, weight.stride(0), weight.stride(1),
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS,
            ROW_MAJOR=weight.stride(1) == 1, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return values.view(rows, 2 * groups) if tail is None else values


@triton.jit
def positions_kernel(  # type: ignore[no-untyped-def]
    mask,
    positions,
    invalid,
    rows,
    columns,
    groups,
    row_stride,
    column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The positions of a block of rows and groups; sets `invalid` if a group keeps more than two."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    group = (tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)).to(tl.int64)[None, :]
    in_bounds = (row < rows) & (group < groups)
    start = mask + row * row_stride + 4 * group * column_stride
    m0 = tl.load(start, mask=in_bounds & (4 * group < columns), other=0).to(tl.int32)
    m1 = tl.load(start + column_stride, mask=in_bounds & (4 * group + 1 < columns), other=0).to(tl.int32)
    m2 = tl.load(start + 2 * column_stride, mask=in_bounds & (4 * group + 2 < columns), other=0).to(tl.int32)
    m3 = tl.load(start + 3 * column_stride, mask=in_bounds & (4 * group + 3 < columns), other=0).to(tl.int32)
    first = tl.where(m0 == 1, 0, tl.where(m1 == 1, 1, 2))
    second = tl.where((m0 & m1) == 1, 1, tl.where((m0 | m1) == 0, 3, 2 + m3))
    second_used = tl.where((m0 & m1) == 1, m1, tl.where(second == 2, m2, m3))
    code = first | second << 2 | (m0 | m1 | m2) << 4 | second_used << 5
    tl.store(positions + row * groups + group, code.to(tl.uint8), mask=in_bounds)
    worst = tl.max(tl.max(m0 + m1 + m2 + m3, axis=1), axis=0)
    tl.atomic_max(invalid, 1, mask=worst > 2)


@triton.jit
def take_kernel(  # type: ignore[no-untyped-def]
    weight,
    positions,
    values,
    rows,
    columns,
    groups,
    row_stride,
    column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
):
    """Two values of each group of a block of rows and groups.

    All four entries are read, in the order of memory, since a gather would touch their sectors anyway. ROW_MAJOR: entries of a
    row are adjacent. Otherwise those of a column are, as in W^T: then the groups of a block are along its first axis.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    group = (tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)).to(tl.int64)
    if ROW_MAJOR:
        column = (tl.program_id(1) * 4 * BLOCK_GROUPS + tl.arange(0, 4 * BLOCK_GROUPS)).to(tl.int64)[None, :]
        in_bounds = (row[:, None] < rows) & (column < columns)
        line = tl.load(weight + row[:, None] * row_stride + column, mask=in_bounds, other=0.0)
        even, odd = tl.split(tl.reshape(line, [BLOCK_ROWS, BLOCK_GROUPS, 2, 2]))
        e0, e2 = tl.split(even)
        e1, e3 = tl.split(odd)
        in_bounds = (row[:, None] < rows) & (group[None, :] < groups)
        code = tl.load(positions + row[:, None] * groups + group[None, :], mask=in_bounds, other=0).to(tl.int32)
    else:
        in_bounds = (row[None, :] < rows) & (group[:, None] < groups)
        start = weight + row[None, :] * row_stride + 4 * group[:, None] * column_stride
        e0 = tl.load(start, mask=in_bounds & (4 * group[:, None] < columns), other=0.0)
        e1 = tl.load(start + column_stride, mask=in_bounds & (4 * group[:, None] + 1 < columns), other=0.0)
        e2 = tl.load(start + 2 * column_stride, mask=in_bounds & (4 * group[:, None] + 2 < columns), other=0.0)
        e3 = tl.load(start + 3 * column_stride, mask=in_bounds & (4 * group[:, None] + 3 < columns), other=0.0)
        code = tl.load(positions + row[None, :] * groups + group[:, None], mask=in_bounds, other=0).to(tl.int32)
    low, high = code & 3, code >> 2 & 3
    first = tl.where(low < 2, tl.where(low == 0, e0, e1), tl.where(low == 2, e2, e3))
    second = tl.where(high < 2, tl.where(high == 0, e0, e1), tl.where(high == 2, e2, e3))
    first = tl.where((code & 16) != 0, first, 0.0).to(values.dtype.element_ty)
    second = tl.where((code & 32) != 0, second, 0.0).to(values.dtype.element_ty)
    pair = tl.join(first, second)
    if not ROW_MAJOR:
        pair = tl.permute(pair, (1, 0, 2))
    slot = (tl.program_id(1) * 2 * BLOCK_GROUPS + tl.arange(0, 2 * BLOCK_GROUPS)).to(tl.int64)[None, :]
    place = values + row[:, None] * (2 * groups) + slot
    tl.store(place, tl.reshape(pair, [BLOCK_ROWS, 2 * BLOCK_GROUPS]), mask=(row[:, None] < rows) & (slot < 2 * groups))
