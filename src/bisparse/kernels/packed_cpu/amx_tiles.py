"""Instructions of AMX, Intel's matrix unit, for numba kernels: tiles of 16 rows of 64 bytes, and their order in memory.

Source: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bisparse.kernels.numba_runtime.llvm import F32, I8, I16, I32, I64, call_llvm, number
from bisparse.kernels.packed_cpu.instructions import BF16, from_float, vector_at, write_vector

__all__ = [
    "ROW_BYTES",
    "SIDE",
    "TILE_BYTES",
    "clear",
    "configure",
    "load",
    "multiply",
    "release",
    "store",
    "to_pairs",
    "write_tile",
]

Codegen = Callable[[Any, Any, Any, Any], Any]

SIDE = 16
"""Rows of a tile, tokens of a tile, and pairs of columns of a tile."""
ROW_BYTES = 64
TILE_BYTES = SIDE * ROW_BYTES


def _tile(number: int) -> Any:
    return ir.Constant(I8, number)


def _address(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I8.as_pointer())


@intrinsic
def configure(typing: Any, address: Any) -> tuple[Any, Codegen]:
    """Configure the shapes of the tiles from the 64 bytes at an address."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.ldtilecfg", ir.VoidType(), [_address(b, args[0])])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release(typing: Any) -> tuple[Any, Codegen]:
    """Leave the mode in which tiles are in use."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def clear(typing: Any, tile: Any) -> tuple[Any, Codegen]:
    """Set a tile, given by its number, to zero."""
    tile_ = tile.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tilezero", ir.VoidType(), [_tile(tile_)])
        return context.get_dummy_value()

    return types.void(tile), codegen


def _access(instruction: str) -> Any:
    """An instruction that moves a tile, given by its number, from or to 1,024 bytes at an address."""

    @intrinsic(prefer_literal=True)
    def access(typing: Any, tile: Any, address: Any) -> tuple[Any, Codegen]:
        tile_ = tile.literal_value

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            call_llvm(b, instruction, ir.VoidType(), [_tile(tile_), _address(b, args[1]), ir.Constant(I64, ROW_BYTES)])
            return context.get_dummy_value()

        return types.void(tile, types.int64), codegen

    return access


load, store = _access("llvm.x86.tileloadd64"), _access("llvm.x86.tilestored64")


@intrinsic(prefer_literal=True)
def multiply(typing: Any, sums: Any, weights: Any, tokens: Any) -> tuple[Any, Codegen]:
    """Add the products of a tile of weights and one of tokens (bfloat16) to a tile of sums (float32)."""
    tiles = [one.literal_value for one in (sums, weights, tokens)]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        call_llvm(b, "llvm.x86.tdpbf16ps", ir.VoidType(), [_tile(one) for one in tiles])
        return context.get_dummy_value()

    return types.void(sums, weights, tokens), codegen


def _transposed(b: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers, transposed by swapping blocks of 1, 2, 4 and 8 numbers between pairs of vectors."""
    for step in (1, 2, 4, 8):
        upper = [lane if lane & step == 0 else SIDE + lane - step for lane in range(SIDE)]
        lower = [lane + step if lane & step == 0 else SIDE + lane for lane in range(SIDE)]
        places = [ir.Constant(ir.VectorType(I32, SIDE), one) for one in (upper, lower)]
        swapped = list(rows)
        for row in range(SIDE):
            if row & step == 0:
                swapped[row], swapped[row + step] = (b.shuffle_vector(rows[row], rows[row + step], one) for one in places)
        rows = swapped
    return rows


@intrinsic
def to_pairs(typing: Any, x: Any, stride: Any, left: Any, out: Any) -> tuple[Any, Codegen]:
    """Transpose 16 tokens of 16 pairs of bfloat16, `stride` bytes apart; the last of `left` tokens stands for those missing."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, stride, left, out = args
        last = b.sub(left, ir.Constant(I64, 1))
        rows = []
        for token in range(SIDE):
            here = ir.Constant(I64, token)
            here = b.select(b.icmp_signed("<", here, last), here, last)
            rows.append(vector_at(b, b.add(x, b.mul(here, stride)), I32, SIDE))
        for pair, row in enumerate(_transposed(b, rows)):
            write_vector(b, row, b.add(out, ir.Constant(I64, ROW_BYTES * pair)))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


@intrinsic
def write_tile(typing: Any, sums: Any, scales: Any, bias: Any, out: Any, stride: Any) -> tuple[Any, Codegen]:
    """Transpose a tile of sums (16 rows of 16 tokens), scale the rows, add their bias, round to bfloat16, and write 16 tokens.

    Scales are float32, the bias is bfloat16; each is left out if its address is 0.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        sums, scales, bias, out, stride = args
        floats = ir.VectorType(F32, SIDE)
        shift = cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * SIDE))
        with b.if_then(b.icmp_signed("!=", bias, ir.Constant(I64, 0))):
            raw = b.zext(vector_at(b, bias, I16, SIDE), ir.VectorType(I32, SIDE))
            b.store(b.bitcast(b.shl(raw, number(I32, SIDE, 16)), floats), shift)
        factor = cgutils.alloca_once_value(b, ir.Constant(floats, [1.0] * SIDE))
        with b.if_then(b.icmp_signed("!=", scales, ir.Constant(I64, 0))):
            b.store(vector_at(b, scales, F32, SIDE), factor)
        added, factors = b.load(shift), b.load(factor)
        rows = [vector_at(b, b.add(sums, ir.Constant(I64, ROW_BYTES * row)), I32, SIDE) for row in range(SIDE)]
        for token, row in enumerate(_transposed(b, rows)):
            rounded = from_float(b, b.fadd(b.fmul(b.bitcast(row, floats), factors), added), BF16)
            write_vector(b, rounded, b.add(out, b.mul(stride, ir.Constant(I64, token))))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), codegen
