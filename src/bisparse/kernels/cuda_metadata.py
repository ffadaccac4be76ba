"""Positions and metadata of a mask, of W and W^T in one pass: a byte a weight in, 3/8 of a byte a side out.

A refresh of the masks runs this once a layer. In plain torch it is about forty operations, and ten times the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["lay_out"]

BANDS, GROUPS = 32, 32
"""A program owns so many bands of four rows, and groups: lines of W^T are written 32 bytes at a time, as those of W are."""


def lay_out(
    mask: Tensor, codes: Tensor, inner: Tensor, row_stride: int, word_stride: int, inner_t: Tensor | None, row_stride_t: int,
    word_stride_t: int, positions: Tensor, metadata: Tensor, positions_t: Tensor | None, metadata_t: Tensor | None,
    broken: Tensor | None,
) -> None:  # fmt: skip
    """`metadata.lay_out` on a GPU."""
    mask = mask.contiguous()
    rows, columns = mask.shape
    if not mask.numel():
        return
    both_ways = inner_t is not None
    if inner_t is None or positions_t is None or metadata_t is None:
        inner_t, positions_t, metadata_t = inner, positions, metadata
    lay_out_kernel[(triton.cdiv(rows, 4 * BANDS), triton.cdiv(columns, 4 * GROUPS))](
        mask.view(torch.int32), codes, inner, row_stride, word_stride, inner_t, row_stride_t, word_stride_t,
        positions, metadata, positions_t, metadata_t, metadata if broken is None else broken, rows, columns,
        HEIGHT=inner.shape[0], WIDTH=inner.shape[1], HEIGHT_T=inner_t.shape[0], WIDTH_T=inner_t.shape[1],
        BANDS=BANDS, GROUPS=GROUPS, BOTH_WAYS=both_ways, CHECK=broken is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def word_place(  # type: ignore[no-untyped-def]
    row, word, inner, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, row_stride, word_stride, there
):
    """`MetadataForm.places`. The block's sides are constants: nearly always powers of two, by which nothing is divided."""
    within = tl.load(inner + (row % HEIGHT) * WIDTH + word % WIDTH, mask=there, other=0)
    return within + (row // HEIGHT).to(tl.int64) * row_stride + (word // WIDTH).to(tl.int64) * word_stride


@triton.jit
def lay_out_kernel(  # type: ignore[no-untyped-def]
    mask,
    codes,
    inner,
    row_stride,
    word_stride,
    inner_t,
    row_stride_t,
    word_stride_t,
    positions,
    metadata,
    positions_t,
    metadata_t,
    broken,
    rows,
    columns,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT_T: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    BOTH_WAYS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A block of bands of four rows, and groups. `mask` is seen as one int32 for four entries."""
    band = tl.program_id(0) * BANDS + tl.arange(0, BANDS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    word = tl.program_id(1) * (GROUPS // 4) + tl.arange(0, GROUPS // 4)[None, :]
    across = columns // 4
    quarter = tl.arange(0, 4)
    stacked = tl.zeros([BANDS, GROUPS], tl.int32)  # byte j: the kept set of column j of each tile
    most = tl.zeros([BANDS, GROUPS], tl.int32)
    for k in tl.static_range(4):
        row = band * 4 + k
        there = (row < rows) & (group < across)
        four = tl.load(mask + row.to(tl.int64) * across + group, mask=there, other=0)
        stacked |= four << k
        if CHECK:
            most = tl.maximum(most, (four * 0x1010101) >> 24)
        entry = tl.load(codes + ((four | four >> 7 | four >> 14 | four >> 21) & 15)).to(tl.int32)
        tl.store(positions + row.to(tl.int64) * across + group, (entry & 63).to(tl.uint8), mask=there)
        nibbles = tl.reshape(entry >> 6 & 15, [BANDS, GROUPS // 4, 4]) << (4 * quarter[None, None, :])
        there = (row < rows) & (word * 4 < across)
        place = word_place(row, word, inner, HEIGHT, WIDTH, row_stride, word_stride, there)
        tl.store(metadata + place, tl.sum(nibbles, axis=2).to(tl.int16), mask=there)
    if BOTH_WAYS:
        down = rows // 4
        word_t = tl.program_id(0) * (BANDS // 4) + tl.arange(0, BANDS // 4)[:, None]
        for j in tl.static_range(4):
            column = group * 4 + j
            kept = stacked >> (8 * j) & 15
            there = (column < columns) & (band < down)
            if CHECK:
                most = tl.maximum(most, (kept & 1) + (kept >> 1 & 1) + (kept >> 2 & 1) + (kept >> 3))
            entry = tl.load(codes + kept).to(tl.int32)
            tl.store(positions_t + column.to(tl.int64) * down + band, (entry & 63).to(tl.uint8), mask=there)
            nibbles = tl.reshape(entry >> 6 & 15, [BANDS // 4, 4, GROUPS]) << (4 * quarter[None, :, None])
            there = (column < columns) & (word_t * 4 < down)
            place = word_place(column, word_t, inner_t, HEIGHT_T, WIDTH_T, row_stride_t, word_stride_t, there)
            tl.store(metadata_t + place, tl.sum(nibbles, axis=1).to(tl.int16), mask=there)
    if CHECK:
        tl.atomic_max(broken, 1, mask=tl.max(tl.max(most, axis=1), axis=0) > 2)
