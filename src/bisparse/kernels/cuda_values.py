"""What a 2:4 layer in training reads of its weight in every pass, in one Triton kernel: the kept values, cast.

A dense weight is read once, half of it written: 4 bytes a weight in, 1 out, and a quarter for the positions. In plain torch the
same takes an index of 8 bytes a value and several passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["take_values"]

BLOCK_ROWS, BLOCK_GROUPS = 32, 64


def take_values(weight: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """`positions.take_values` on a GPU; the weight with any strides."""
    rows, groups = positions.shape
    values = torch.empty((rows, 2 * groups), dtype=dtype, device=weight.device)
    if values.numel():
        take_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(groups, BLOCK_GROUPS))](
            weight, positions.contiguous(), values, rows, groups, weight.stride(0), weight.stride(1),
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return values


@triton.jit  # type: ignore[untyped-decorator]
def take_kernel(  # type: ignore[no-untyped-def]
    weight,
    positions,
    values,
    rows,
    groups,
    row_stride,
    column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """Two values of each group of a block of rows and groups."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    group = (tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)).to(tl.int64)[None, :]
    there = (row < rows) & (group < groups)
    code = tl.load(positions + row * groups + group, mask=there, other=0).to(tl.int32)
    start = weight + row * row_stride + 4 * group * column_stride
    # A slot that is not in use may point beyond the last column.
    first = tl.load(start + (code & 3) * column_stride, mask=there & ((code & 16) != 0), other=0.0)
    second = tl.load(start + (code >> 2 & 3) * column_stride, mask=there & ((code & 32) != 0), other=0.0)
    pair = tl.join(first, second)
    slot = tl.arange(0, 2)[None, None, :]
    place = values + ((row * groups + group) * 2)[:, :, None] + slot
    tl.store(place, pair.to(values.dtype.element_ty), mask=there[:, :, None] & (slot < 2))
