"""Compiled kernels over blocks of 4 rows of a packed matrix: products with a few tokens, and unpacking."""

from __future__ import annotations

from functools import cache

import numpy as np

from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel
from bisparse.kernels.packed_cpu.instructions import INT8, MASK_BYTES, MAX_TOKENS, Way, expand_block, multiply_block
from bisparse.kernels.packed_cpu.layout import BLOCK_ROWS, GROUP

__all__ = ["expand_kernel", "multiply_kernel"]

NEAR_BYTES, FAR_BYTES = 1 << 15, 1 << 20
"""Maximum bytes of an expanded block and 4 tokens for which a block is expanded once per call, and not once per pass over 4
tokens (2 with AVX2): with few passes they fit into the L1 cache, with many into the L2 cache."""
MANY_PASSES = 4
"""Passes from which it is faster to read an expanded block from the L2 cache than to expand it again: at 4096 x 4096 and 512
tokens 1.2 (float16, AVX-512) to 1.7 times (bfloat16, AVX2). In int8, whose expansion takes longer, two are enough."""


@cache
def multiply_kernel(way: int, kind: int, size: int) -> Kernel:
    """Products of a packed matrix, `size` bytes per value, with all tokens.

    Arguments: values, masks, starts, input, bias or 0, output, scales of rows for `INT8`; groups, tokens, bytes per token of the
    input and of the output.
    """

    most, size_out = MAX_TOKENS[Way(way)], max(size, 2)
    many = most * (1 if kind == INT8 else MANY_PASSES)
    group_bytes = GROUP * (2 if way == Way.AVX512_BF16 else 4)

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        packed, masks, starts, x, bias, out, scales, groups, tokens, x_stride, out_stride = array_at(arguments, (11,), np.int64)
        where = array_at(starts, (last + 1,), np.int64)
        room_for = FAR_BYTES if tokens >= many else NEAR_BYTES
        expands = tokens > most and 2 * BLOCK_ROWS * group_bytes * groups <= room_for  # once per block
        room = np.empty(BLOCK_ROWS * group_bytes * groups if expands else 0, np.uint8)
        expanded = room.ctypes.data
        for block in range(first, last):
            values, own = packed + size * where[block], masks + MASK_BYTES * groups * block
            if expands:
                expand_block(way, kind, 1, values, own, groups, expanded, group_bytes, BLOCK_ROWS * group_bytes)
            added = bias + size_out * BLOCK_ROWS * block if bias != 0 else 0
            factors = scales + 4 * BLOCK_ROWS * block
            token, to, left = x, out + size_out * BLOCK_ROWS * block, tokens
            while left > 0:
                if expands and most >= 4 and left >= 4:
                    count = 4
                    multiply_block(way, kind, 4, 0, expanded, 0, groups, token, x_stride, factors, added, to, out_stride)
                elif expands and left >= 2:
                    count = 2
                    multiply_block(way, kind, 2, 0, expanded, 0, groups, token, x_stride, factors, added, to, out_stride)
                elif expands:
                    count = 1
                    multiply_block(way, kind, 1, 0, expanded, 0, groups, token, x_stride, factors, added, to, out_stride)
                elif not expands and most >= 4 and left >= 4:
                    count = 4
                    multiply_block(way, kind, 4, 1, values, own, groups, token, x_stride, factors, added, to, out_stride)
                elif left >= 2:
                    count = 2
                    multiply_block(way, kind, 2, 1, values, own, groups, token, x_stride, factors, added, to, out_stride)
                else:
                    count = 1
                    multiply_block(way, kind, 1, 1, values, own, groups, token, x_stride, factors, added, to, out_stride)
                token, to, left = token + count * x_stride, to + count * out_stride, left - count
        if expands:
            room[0] = 0  # numba frees an array after its last use, and addresses are no use
        return 1

    return kernel(entry)


@cache
def expand_kernel(way: int, kind: int, size: int) -> Kernel:
    """Blocks of a packed matrix as dense rows, from a block on.

    Arguments: values, masks, starts, output; groups, the first block.
    """

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        packed, masks, starts, out, groups, before = array_at(arguments, (6,), np.int64)
        where = array_at(starts, (before + last + 1,), np.int64)
        rows_bytes = BLOCK_ROWS * GROUP * size * groups
        for index in range(first, last):
            block = before + index
            values, own, target = packed + size * where[block], masks + MASK_BYTES * groups * block, out + rows_bytes * index
            expand_block(way, kind, 0, values, own, groups, target, rows_bytes // BLOCK_ROWS, GROUP * size)
        return 1

    return kernel(entry)
