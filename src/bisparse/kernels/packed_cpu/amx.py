"""Products of a packed bfloat16 matrix with several tokens by AMX, the matrix instructions of Intel's server CPUs since 2023.

Idea: an AMX tile has 16 rows of 32 bfloat16 weights, so a group of 4 blocks is expanded row by row, as it is stored, into the
memory of a tile, and one instruction multiplies it with the same 32 columns of 16 tokens. Each row is expanded once for all
tokens, and stays in the caches meanwhile.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.target import processor
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands
from bisparse.kernels.packed_cpu.amx_tiles import (
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
    clear,
    configure,
    load,
    multiply,
    release,
    store,
    to_pairs,
    write_tile,
)
from bisparse.kernels.packed_cpu.instructions import BF16, INT8, MASK_BYTES, Way, expand_groups, usable_ways
from bisparse.kernels.packed_cpu.layout import BLOCK_ROWS, GROUP, MIN_ENTRIES_PER_BAND

__all__ = ["amx_works", "multiply_amx"]

BLOCKS = 2 * SIDE // BLOCK_ROWS
"""Blocks of a stripe of 32 rows."""
CHUNK = 8
"""Groups of a stripe that are expanded at a time for up to 32 tokens; with their tokens they fit into the L1 cache."""
EXPANDED_BYTES = 3 << 18
"""Bytes of rows that are expanded at a time: with a tile of tokens they fit into the L2 cache, of 2 MiB where there is AMX."""
ASK, EXTENDED_STATE, TILE_DATA = 158, 0x1023, 18
"""Linux on x86-64: the system call arch_prctl, its request ARCH_REQ_XCOMP_PERM, and the number of the tile state."""


@cache
def amx_works() -> bool:
    """Whether this processor has AMX's bfloat16 products, numba compiles for them, and Linux allows this process to use them."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not {"amx-tile", "amx-bf16"} <= processor()[1] or Way.AVX512_BF16 not in usable_ways(torch.bfloat16):
        return False
    return bool(ctypes.CDLL(None, use_errno=True).syscall(ASK, EXTENDED_STATE, TILE_DATA) == 0)


@cached_njit(from_python=False)
def _write_part(sums, scales, bias, out, stride, tokens, rows):  # type: ignore[no-untyped-def]
    """`write_tile` for fewer than 16 tokens or rows."""
    given, added, factors = np.empty(SIDE * SIDE, np.uint16), np.zeros(SIDE, np.uint16), np.ones(SIDE, np.float32)
    if scales != 0:
        factors[:rows] = array_at(scales, (rows,), np.float32)
    if bias != 0:
        added[:rows] = array_at(bias, (rows,), np.uint16)
    write_tile(sums, factors.ctypes.data, added.ctypes.data, given.ctypes.data, 2 * SIDE)
    for token in range(tokens):
        array_at(out + token * stride, (rows,), np.uint16)[:] = given[SIDE * token : SIDE * token + rows]
    added[0] = factors[0] = 0  # numba frees an array after its last use, and addresses are no use


@cache
def pairs_kernel() -> Kernel:
    """Tokens in the order that AMX reads, per tile of 16 tokens: (tiles, groups, 16 pairs of columns, 16 tokens).

    Arguments: input in whole groups, output; groups, number of tokens, bytes per token.
    """

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        x, out, groups, tokens, stride = array_at(arguments, (5,), np.int64)
        for tile in range(first, last):
            for group in range(groups):
                place = x + SIDE * stride * tile + ROW_BYTES * group
                to_pairs(place, stride, min(SIDE, tokens - SIDE * tile), out + TILE_BYTES * (groups * tile + group))
        return 1

    return kernel(entry)


@cached_njit(inline="always")
def _add(weights, token, line, groups, two):  # type: ignore[no-untyped-def]
    """Add the products of 32 rows with 16 tokens to tiles 0 and 1 and, if `two`, with the next 16 tokens to tiles 2 and 3."""
    for _ in range(groups):
        load(4, weights)
        load(6, token)
        multiply(0, 4, 6)
        load(5, weights + TILE_BYTES)
        multiply(1, 5, 6)
        if two:
            load(7, token + line)
            multiply(2, 4, 7)
            multiply(3, 5, 7)
        weights += 2 * TILE_BYTES
        token += TILE_BYTES


@cache
def amx_kernel(kind: int) -> Kernel:
    """Products of stripes of 32 rows with all tokens, plus the bias, rounded to bfloat16.

    Up to 32 tokens, `most` groups of a stripe are expanded at a time, which stay in the L1 cache; for more tokens `most` stripes,
    which stay in the L2 cache while all tokens pass.

    Arguments: values, masks, starts, tokens as `pairs_kernel` orders them, bias (bfloat16) or 0, output, configuration, scales
    of rows (float32) or 0; groups, blocks, number of tokens, rows, `most`.
    """

    size = 1 if kind == INT8 else 2

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        packed, masks, starts, x, added, out, configuration, scales, groups, blocks, tokens, rows, most = array_at(
            arguments, (13,), np.int64
        )
        where = array_at(starts, (blocks + 1,), np.int64)
        configure(configuration)
        tiles, line = (tokens + SIDE - 1) // SIDE, TILE_BYTES * groups  # bytes of 16 rows, or of 16 tokens
        once = tiles <= 2
        span, at_a_time = (min(most, groups), 1) if once else (groups, min(most, last - first))
        room = np.empty(2 * TILE_BYTES * span * at_a_time + 5 * TILE_BYTES, np.uint8)
        sums = (room.ctypes.data + ROW_BYTES - 1) // ROW_BYTES * ROW_BYTES
        expanded = sums + 4 * TILE_BYTES
        position = np.empty(BLOCKS * at_a_time, np.int64)
        for start in range(first, last, at_a_time):
            count = min(at_a_time, last - start)
            for index in range(BLOCKS * count):
                position[index] = packed + size * where[min(BLOCKS * start + index, blocks)]
            for begin in range(0, groups, span):
                length = min(span, groups - begin)
                for index in range(BLOCKS * count):
                    block = BLOCKS * start + index
                    if block < blocks:  # what is missing only affects rows that are not written
                        own = masks + MASK_BYTES * (groups * block + begin)
                        target = expanded + 2 * TILE_BYTES * span * (index // BLOCKS) + BLOCK_ROWS * ROW_BYTES * (index % BLOCKS)
                        position[index] = expand_groups(kind, position[index], own, length, target, ROW_BYTES, 2 * TILE_BYTES)
                for tile in range(0, tiles, 2):
                    two = tile + 1 < tiles
                    for stripe in range(count):
                        weights, token = expanded + 2 * TILE_BYTES * span * stripe, x + line * tile + TILE_BYTES * begin
                        if begin == 0:
                            clear(0)
                            clear(1)
                            clear(2)
                            clear(3)
                        _add(weights, token, line, length, two)
                        if begin + length < groups:
                            continue
                        store(0, sums)
                        store(1, sums + TILE_BYTES)
                        if two:
                            store(2, sums + 2 * TILE_BYTES)
                            store(3, sums + 3 * TILE_BYTES)
                        for part in range(4 if two else 2):
                            row, column = 2 * SIDE * (start + stripe) + SIDE * (part % 2), SIDE * (tile + part // 2)
                            found, place = sums + TILE_BYTES * part, out + 2 * (rows * column + row)
                            bias = added + 2 * row if added != 0 else 0
                            factors = scales + 4 * row if scales != 0 else 0
                            if rows - row >= SIDE and tokens - column >= SIDE:
                                write_tile(found, factors, bias, place, 2 * rows)
                            elif rows > row:
                                _write_part(
                                    found, factors, bias, place, 2 * rows, min(SIDE, tokens - column), min(SIDE, rows - row)
                                )
        release()
        room[0] = 0  # numba frees an array after its last use, and addresses are no use
        return 1

    return kernel(entry)


@cache
def _configuration() -> Tensor:
    """The configuration of all eight tiles, with 16 rows of 64 bytes each."""
    bytes_ = torch.zeros(64, dtype=torch.uint8, device="cpu")
    bytes_[0] = 1
    bytes_[16:32:2] = ROW_BYTES
    bytes_[48:56] = SIDE
    return bytes_


def multiply_amx(
    x: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int, scales: Tensor | None = None
) -> Tensor:
    """``x W^T + bias`` for x of (tokens, columns) and bias in bfloat16, W packed in bfloat16 or int8: one pass over W.

    Args:
        scales: for int8, a float32 factor per row of whole blocks.

    Raises:
        RuntimeError: `amx_works` is False; the instructions would end the process.
    """
    if not amx_works():
        raise RuntimeError("this processor, or its system, has no AMX")
    blocks, groups, _ = masks.shape
    tokens = x.shape[0]
    output = x.new_empty(tokens, rows)
    if not output.numel():
        return output
    missing = groups * GROUP - x.shape[1]
    x = pad(x, (0, missing)) if missing else x.contiguous()
    tiles, stripes = -(-tokens // SIDE), -(-blocks // BLOCKS)
    pairs = x.new_empty(tiles * SIDE, groups * GROUP)
    worth = max(1, MIN_ENTRIES_PER_BAND // (SIDE * GROUP * max(groups, 1)))
    over_bands(pairs_kernel(), (x, pairs, groups, tokens, 2 * GROUP * groups), tiles, 1, worth)
    added, factors = 0 if bias is None else bias.contiguous(), 0 if scales is None else scales
    most = CHUNK if tiles <= 2 else max(1, EXPANDED_BYTES // (2 * TILE_BYTES * max(groups, 1)))
    worth = max(1, MIN_ENTRIES_PER_BAND // (2 * SIDE * GROUP * max(groups, 1)))
    arguments = values, masks, starts, pairs, added, output, _configuration(), factors, groups, blocks, tokens, rows, most
    over_bands(amx_kernel(BF16 if scales is None else INT8), arguments, stripes, 1, worth)
    return output
