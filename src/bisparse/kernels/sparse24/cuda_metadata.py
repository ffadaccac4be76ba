"""Positions of a mask, of W and W^T in one pass, and metadata from positions, in any library's layout.

A refresh of the masks runs these once per layer: one byte per weight is read and a quarter per side written; then a quarter per
side is read and an eighth written. Plain torch takes about forty operations and ten times the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bisparse.kernels.sparse24.metadata import MetadataLayout, both_layouts

__all__ = ["lay_out", "write_metadata"]

BANDS, GROUPS = 32, 32
"""Bands of four rows, and groups, per program: rows of W^T are written 32 bytes at a time, like those of W."""
WORDS = 512


def lay_out(mask: Tensor, *arguments: Any) -> None:
    """`metadata.lay_out` on a GPU."""
    layout, layout_t = both_layouts(*arguments[:14])
    positions, metadata, positions_t, metadata_t, invalid = arguments[14:]
    mask = mask.contiguous()
    rows, columns = mask.shape
    if not mask.numel():
        return
    both_ways = positions_t is not None
    positions_kernel[(triton.cdiv(rows, 4 * BANDS), triton.cdiv(columns, 4 * GROUPS))](
        mask.view(torch.int32), layout.codes, layout_t.codes if both_ways else layout.codes,
        positions, positions_t if both_ways else positions,
        positions if invalid is None else invalid, rows, columns,
        BANDS=BANDS, GROUPS=GROUPS, BOTH_WAYS=both_ways, CHECK=invalid is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    write_metadata(positions, layout, metadata)
    if both_ways:
        write_metadata(positions_t, layout_t, metadata_t)


def write_metadata(positions: Tensor, layout: MetadataLayout, metadata: Tensor) -> None:
    """`metadata.metadata_of` on a GPU, into given memory; positions are row-major."""
    rows, groups = positions.shape
    words = layout.height * groups // 4
    if positions.numel():
        metadata_kernel[(rows // layout.height * triton.cdiv(words, WORDS),)](  # one axis: the others are limited to 65535
            positions, layout.nibbles, layout.sources, metadata, words, groups, layout.row_stride, layout.group_stride,
            HEIGHT=layout.height, WIDTH=layout.width, WORDS=WORDS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def positions_kernel(  # type: ignore[no-untyped-def]
    mask,
    codes,
    codes_t,
    positions,
    positions_t,
    invalid,
    rows,
    columns,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    BOTH_WAYS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A block of bands of four rows, and groups. `mask` is viewed as one int32 per four entries."""
    band = tl.program_id(0) * BANDS + tl.arange(0, BANDS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    across = columns // 4
    stacked = tl.zeros([BANDS, GROUPS], tl.int32)  # byte j: the kept set of column j of each tile
    most = tl.zeros([BANDS, GROUPS], tl.int32)
    for k in tl.static_range(4):
        row = band * 4 + k
        in_bounds = (row < rows) & (group < across)
        four = tl.load(mask + row.to(tl.int64) * across + group, mask=in_bounds, other=0)
        stacked |= four << k
        if CHECK:
            most = tl.maximum(most, (four * 0x1010101) >> 24)
        code = tl.load(codes + ((four | four >> 7 | four >> 14 | four >> 21) & 15))
        tl.store(positions + row.to(tl.int64) * across + group, code, mask=in_bounds)
    if BOTH_WAYS:
        down = rows // 4
        for j in tl.static_range(4):
            column = group * 4 + j
            kept = stacked >> (8 * j) & 15
            in_bounds = (column < columns) & (band < down)
            if CHECK:
                most = tl.maximum(most, (kept & 1) + (kept >> 1 & 1) + (kept >> 2 & 1) + (kept >> 3))
            tl.store(positions_t + column.to(tl.int64) * down + band, tl.load(codes_t + kept), mask=in_bounds)
    if CHECK:
        tl.atomic_max(invalid, 1, mask=tl.max(tl.max(most, axis=1), axis=0) > 2)


@triton.jit
def metadata_kernel(  # type: ignore[no-untyped-def]
    positions,
    nibbles,
    sources,
    metadata,
    words,
    groups,
    row_stride,
    group_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Words of a row of blocks, block after block. Its sides are constants, so that divisions by powers of two are shifts."""
    SIZE: tl.constexpr = HEIGHT * WIDTH // 4
    strips = tl.cdiv(words, WORDS)
    block_row = (tl.program_id(0) // strips).to(tl.int64)
    number = tl.program_id(0) % strips * WORDS + tl.arange(0, WORDS)
    in_bounds = number < words
    within, block = number % SIZE, number // SIZE
    start = positions + block_row * HEIGHT * groups
    word = tl.zeros([WORDS], tl.int32)
    for k in tl.static_range(4):
        source = tl.load(sources + within * 4 + k, mask=in_bounds, other=0)
        code = tl.load(start + source // WIDTH * groups + block * WIDTH + source % WIDTH, mask=in_bounds, other=0).to(tl.int32)
        word |= tl.load(nibbles + code, mask=in_bounds, other=0).to(tl.int32) << (4 * k)
    tl.store(metadata + block_row * row_stride + block.to(tl.int64) * group_stride + within, word.to(tl.int16), mask=in_bounds)
