"""Products of a packed bfloat16 matrix with several tokens by AMX, the matrix instructions of Intel's servers since 2023.

Idea: an AMX tile holds 16 rows of 32 bfloat16 weights, so a group of 4 blocks is expanded as it is stored, row by row, into the
memory of a tile, and one instruction multiplies it with the same 32 columns of 16 tokens. Expanding is what takes time, so up to
64 tokens cost little more than one. The tokens are transposed once per call into the order that AMX reads: pairs of columns.

Source: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.llvm import I8, I64, call_llvm
from bisparse.kernels.numba_runtime.target import processor
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands
from bisparse.kernels.packed_cpu.instructions import MASK_BYTES, Way, expand_groups, usable_ways
from bisparse.kernels.packed_cpu.layout import BLOCK_ROWS, GROUP

__all__ = ["MAX_TOKENS", "amx_works", "multiply_amx"]

Codegen = Callable[[Any, Any, Any, Any], Any]

SIDE = 16
"""Rows of a tile, tokens of a tile, and pairs of columns of a tile."""
ROW_BYTES = 64
TILE_BYTES = SIDE * ROW_BYTES
CHUNK = 8
"""Groups that are expanded at a time; with their tiles they stay in the L1 cache."""
MAX_TOKENS = 64
"""Of one pass over the matrix: four tiles of sums, one of weights and one of tokens, of the eight there are."""
ASK, EXTENDED_STATE, TILE_DATA = 158, 0x1023, 18
"""Linux on x86-64: the system call arch_prctl, its request ARCH_REQ_XCOMP_PERM, and the number of the tiles' state."""
MIN_ENTRIES_PER_BAND = 1 << 16


@cache
def amx_works() -> bool:
    """Whether this processor has AMX's bfloat16 products, numba compiles for them, and Linux lets this process use them."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not {"amx-tile", "amx-bf16"} <= processor()[1] or Way.AVX512_BF16 not in usable_ways(torch.bfloat16):
        return False
    return bool(ctypes.CDLL(None, use_errno=True).syscall(ASK, EXTENDED_STATE, TILE_DATA) == 0)


def _tile(number: int) -> Any:
    return ir.Constant(I8, number)


def _address(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I8.as_pointer())


@intrinsic
def _configure(typing: Any, address: Any) -> tuple[Any, Codegen]:
    """Give the tiles the shapes in the 64 bytes at an address."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.ldtilecfg", ir.VoidType(), [_address(b, args[0])])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _release(typing: Any) -> tuple[Any, Codegen]:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def _clear(typing: Any, tile: Any) -> tuple[Any, Codegen]:
    number = tile.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tilezero", ir.VoidType(), [_tile(number)])
        return context.get_dummy_value()

    return types.void(tile), codegen


@intrinsic(prefer_literal=True)
def _load(typing: Any, tile: Any, address: Any) -> tuple[Any, Codegen]:
    number = tile.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tileloadd64", ir.VoidType(), [_tile(number), _address(b, args[1]), ir.Constant(I64, ROW_BYTES)])
        return context.get_dummy_value()

    return types.void(tile, types.int64), codegen


@intrinsic(prefer_literal=True)
def _store(typing: Any, tile: Any, address: Any) -> tuple[Any, Codegen]:
    number = tile.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tilestored64", ir.VoidType(), [_tile(number), _address(b, args[1]), ir.Constant(I64, ROW_BYTES)])
        return context.get_dummy_value()

    return types.void(tile, types.int64), codegen


@intrinsic(prefer_literal=True)
def _multiply(typing: Any, sums: Any, weights: Any, tokens: Any) -> tuple[Any, Codegen]:
    numbers = [one.literal_value for one in (sums, weights, tokens)]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tdpbf16ps", ir.VoidType(), [_tile(one) for one in numbers])
        return context.get_dummy_value()

    return types.void(sums, weights, tokens), codegen


@cached_njit()
def _write(sums, bias, output, first, tokens, rows):  # type: ignore[no-untyped-def]
    """Add the bias to a stripe's sums, round to nearest even, and write them to the rows of the output from `first` on."""
    bits = np.empty(SIDE, np.uint32)
    as_float = bits.view(np.float32)
    for row in range(first, min(first + SIDE, rows)):
        shift = np.float32(0)
        if bias != 0:
            bits[0] = np.uint32(array_at(bias, (rows,), np.uint16)[row]) << np.uint32(16)
            shift = as_float[0]
        for token in range(0, tokens, SIDE):
            start = (token + row - first) * SIDE
            for k in range(SIDE):
                as_float[k] = sums[start + k] + shift
            for k in range(min(SIDE, tokens - token)):
                upper = bits[k] >> np.uint32(16)
                rounded = (bits[k] + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
                output[(token + k) * rows + row] = rounded if as_float[k] == as_float[k] else upper | np.uint32(0x40)


@cache
def amx_kernel(tiles: int) -> Kernel:
    """Products of stripes of 16 rows with up to 16 * `tiles` tokens, `tiles` from 1 to 4, plus the bias, rounded to bfloat16.

    Arguments: values, masks, starts, tokens as `_in_pairs` orders them, bias (bfloat16) or 0, output, configuration; groups,
    blocks, number of tokens, rows.
    """

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        packed, masks, starts, x, added, out, configuration, groups, blocks, tokens, rows = array_at(arguments, (11,), np.int64)
        output = array_at(out, (tokens * rows,), np.uint16)
        sums = np.empty(tiles * SIDE * SIDE, np.float32)
        to = sums.ctypes.data
        where = array_at(starts, (blocks + 1,), np.int64)
        _configure(configuration)
        room = np.zeros((CHUNK + 1) * TILE_BYTES, np.uint8)
        expanded = (room.ctypes.data + ROW_BYTES - 1) // ROW_BYTES * ROW_BYTES
        position = np.zeros(4, np.int64)
        for stripe in range(first, last):
            for k in range(4):
                position[k] = packed + 2 * where[min(4 * stripe + k, blocks)]
            _clear(0)
            if tiles > 1:
                _clear(1)
            if tiles > 2:
                _clear(2)
            if tiles > 3:
                _clear(3)
            token = x
            for start in range(0, groups, CHUNK):
                count = min(CHUNK, groups - start)
                for k in range(4):
                    block = 4 * stripe + k
                    if block < blocks:
                        own = masks + MASK_BYTES * (groups * block + start)
                        part = expanded + BLOCK_ROWS * ROW_BYTES * k
                        position[k] = expand_groups(position[k], own, count, part, ROW_BYTES, TILE_BYTES)
                for group in range(count):
                    _load(4, expanded + TILE_BYTES * group)
                    _load(5, token)
                    _multiply(0, 4, 5)
                    if tiles > 1:
                        _load(6, token + TILE_BYTES)
                        _multiply(1, 4, 6)
                    if tiles > 2:
                        _load(5, token + 2 * TILE_BYTES)
                        _multiply(2, 4, 5)
                    if tiles > 3:
                        _load(6, token + 3 * TILE_BYTES)
                        _multiply(3, 4, 6)
                    token += tiles * TILE_BYTES
            _store(0, to)
            if tiles > 1:
                _store(1, to + TILE_BYTES)
            if tiles > 2:
                _store(2, to + 2 * TILE_BYTES)
            if tiles > 3:
                _store(3, to + 3 * TILE_BYTES)
            _write(sums, added, output, stripe * SIDE, tokens, rows)
        _release()
        return 1

    return kernel(entry)


@cache
def _configuration() -> Tensor:
    """All eight tiles are of 16 rows of 64 bytes."""
    bytes_ = torch.zeros(64, dtype=torch.uint8)
    bytes_[0] = 1
    bytes_[16:32:2] = ROW_BYTES
    bytes_[48:56] = SIDE
    return bytes_


def _in_pairs(x: Tensor, groups: int, tiles: int) -> Tensor:
    """Tokens as (groups, tiles, 16 pairs of columns, 16 tokens), each pair of bfloat16 as one int32."""
    x = pad(x, (0, groups * GROUP - x.shape[1], 0, tiles * SIDE - x.shape[0]))
    return x.view(torch.int32).view(tiles, SIDE, groups, SIDE).permute(2, 0, 3, 1).contiguous()


def multiply_amx(x: Tensor, values: Tensor, masks: Tensor, starts: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """``x W^T + bias`` for x of (tokens, columns) and bias in bfloat16, W packed: one pass over W per 64 tokens."""
    blocks, groups, _ = masks.shape
    output = x.new_empty(x.shape[0], rows)
    added = 0 if bias is None else bias.contiguous()
    worth = max(1, MIN_ENTRIES_PER_BAND // (SIDE * GROUP * max(groups, 1)))
    for first in range(0, x.shape[0], MAX_TOKENS):
        part = x[first : first + MAX_TOKENS]
        count = part.shape[0]
        tiles = -(-count // SIDE)
        tokens = _in_pairs(part, groups, tiles)
        place = output[first : first + count]
        arguments = values, masks, starts, tokens, added, place, _configuration(), groups, blocks, count, rows
        over_bands(amx_kernel(tiles), arguments, -(-blocks // 4), 1, worth)
    return output
