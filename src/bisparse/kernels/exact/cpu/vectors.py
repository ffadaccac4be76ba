"""The vector operations of the CPU kernels, as numba intrinsics.

Each works on whole rows of a tile, or on one entry of `LANES` tiles, as one LLVM vector, so that nothing depends on automatic
vectorisation; LLVM splits a vector over as many registers as the machine needs. The side M of a tile is passed in the type of an
argument, `side = (0,) * M`, so that one source serves every M and numba caches each.

Arrays are 1-D and contiguous; offsets count elements; nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bisparse.kernels.exact.sorting_network import sorting_network
from bisparse.kernels.numba_runtime.llvm import (
    BIT,
    F32,
    I8,
    I16,
    I32,
    I64,
    at,
    call_llvm,
    data_of,
    from_bits,
    larger,
    load,
    number,
    row_of,
    smaller,
    spread,
    store,
    to_bits,
)  # fmt: skip

LANES = 16
"""Tiles per vector in the sweeps."""
COARSE_SHIFT = 10
"""The sweeps use 14-bit scores, so that a lane is 16 bits wide; their prices are only starting values."""
SMALL = 1 << 12

Codegen = Callable[[Any, Any, Any, Any], Any]


def quantised(b: Any, scores: Any, offset: Any, scale: Any, count: int) -> Any:
    """Scores times a scale, rounded to int32."""
    product = b.fmul(load(b, scores, offset, F32, count), spread(b, scale, count))
    return call_llvm(b, f"llvm.lrint.v{count}i32.v{count}f32", ir.VectorType(I32, count), [product])


@intrinsic
def never_inline(typing: Any) -> tuple[Any, Codegen]:
    """Prevent inlining of the enclosing function, which bounds compile time."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def bits_to_float(typing: Any, bits: Any) -> tuple[Any, Codegen]:
    """The float32 of a bit pattern."""
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], F32)


@intrinsic
def tile_largest_bits(typing: Any, scores: Any, base: Any, stride: Any, side: Any) -> tuple[Any, Codegen]:
    """Largest float32 bit pattern of a tile, read as unsigned: negative, NaN and infinite scores compare as largest."""
    return types.int64(scores, types.intp, types.intp, side), _extreme_of_tile(side.count, ">", "umax")


@intrinsic
def tile_smallest_bits(typing: Any, scores: Any, base: Any, stride: Any, side: Any) -> tuple[Any, Codegen]:
    """Smallest float32 bit pattern of a tile, read as unsigned."""
    return types.int64(scores, types.intp, types.intp, side), _extreme_of_tile(side.count, "<", "umin")


def _extreme_of_tile(m: int, comparison: str, reduction: str) -> Codegen:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        pointer = b.bitcast(data_of(context, b, signature, args, 0), I32.as_pointer())
        extreme = load(b, pointer, args[1], I32, m)
        for row in range(1, m):
            other = load(b, pointer, row_of(b, args[1], args[2], row), I32, m)
            extreme = b.select(b.icmp_unsigned(comparison, extreme, other), extreme, other)
        return b.zext(call_llvm(b, f"llvm.vector.reduce.{reduction}.v{m}i32", I32, [extreme]), I64)

    return codegen


@intrinsic
def tile_to_lanes_source(
    typing: Any, scores: Any, base: Any, stride: Any, scale: Any, out: Any, offset: Any, side: Any
) -> tuple[Any, Codegen]:
    """Write a tile's 14-bit scores, row by row, as int16; return the sum of min(q, SMALL) over the tile."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (data_of(context, b, signature, args, k) for k in (0, 4))
        total = None
        for row in range(m):
            q = quantised(b, source, row_of(b, args[1], args[2], row), args[3], m)
            limited = smaller(b, q, number(I32, m, SMALL))
            total = limited if total is None else b.add(total, limited)
            coarse = b.trunc(b.lshr(q, number(I32, m, COARSE_SHIFT)), ir.VectorType(I16, m))
            store(b, coarse, target, at(b, args[5], row * m))
        return b.sext(call_llvm(b, f"llvm.vector.reduce.add.v{m}i32", I32, [total]), I64)

    return types.int64(scores, types.intp, types.intp, types.float32, out, types.intp, side), codegen


@intrinsic
def transpose_8x8(
    typing: Any, source: Any, from_: Any, from_stride: Any, target: Any, to: Any, to_stride: Any
) -> tuple[Any, Codegen]:
    """Transpose a block of 8 x 8 integers."""
    element = ir.IntType(source.dtype.bitwidth)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        read, write = (data_of(context, b, signature, args, k) for k in (0, 3))
        rows = [load(b, read, row_of(b, args[1], args[2], k), element, 8) for k in range(8)]
        low = ir.Constant(ir.VectorType(I32, 8), [0, 8, 1, 9, 2, 10, 3, 11])
        high = ir.Constant(ir.VectorType(I32, 8), [4, 12, 5, 13, 6, 14, 7, 15])
        for _ in range(3):  # three perfect shuffles
            rows = [b.shuffle_vector(rows[k // 2], rows[k // 2 + 4], high if k % 2 else low) for k in range(8)]
        for k in range(8):
            store(b, rows[k], write, row_of(b, args[4], args[5], k))
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


def _lane_differences(b: Any, lanes: Any, prices: Any, line: Any, stride: Any, other: Any, places: range) -> list[Any]:
    vector = ir.VectorType(I16, LANES)
    return [
        call_llvm(
            b,
            f"llvm.ssub.sat.v{LANES}i16",
            vector,
            [load(b, lanes, row_of(b, line, stride, k), I16, LANES), load(b, prices, at(b, other, k * LANES), I16, LANES)],
        )
        for k in places
    ]


def _store_midpoint(b: Any, above: Any, below: Any, floor: Any, prices: Any, offset: Any) -> None:
    half = b.ashr(b.xor(above, below), number(I16, LANES, 1))
    midpoint = b.add(b.and_(above, below), half)
    store(b, larger(b, midpoint, spread(b, b.trunc(floor, I16), LANES)), prices, offset)


@intrinsic
def median_prices(
    typing: Any, lanes: Any, line: Any, stride: Any, prices: Any, other: Any, out: Any, floor: Any, side: Any
) -> tuple[Any, Codegen]:
    """Midpoint of the two middle ones of M differences score - price, at least `floor`, by a sorting network in every lane."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lanes, prices = (data_of(context, b, signature, args, k) for k in (0, 3))
        values: list[Any] = []
        for half in (0, m // 2):  # one half after the other: both together do not fit the registers at M = 32
            part = _lane_differences(b, lanes, prices, args[1], args[2], args[4], range(half, half + m // 2))
            for i, j in sorting_network(m // 2):
                part[i], part[j] = smaller(b, part[i], part[j]), larger(b, part[i], part[j])
            values += part
        # Of a bitonic pair of sorted halves, min(a_i, b_(last - i)) are the smaller M/2 and the max the larger.
        below = [smaller(b, values[i], values[m - 1 - i]) for i in range(m // 2)]
        above = [larger(b, values[i], values[m - 1 - i]) for i in range(m // 2)]
        while len(below) > 1:
            below = [larger(b, *below[i : i + 2]) for i in range(0, len(below), 2)]
            above = [smaller(b, *above[i : i + 2]) for i in range(0, len(above), 2)]
        _store_midpoint(b, above[0], below[0], args[6], prices, args[5])
        return context.get_dummy_value()

    intp = types.intp
    return types.void(lanes, intp, intp, prices, intp, intp, intp, side), codegen


@intrinsic
def lane_differences(
    typing: Any, lanes: Any, line: Any, stride: Any, prices: Any, other: Any, out: Any, side: Any
) -> tuple[Any, Codegen]:
    """Differences score - price of one line in every lane, written to `out`."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lanes, prices, out = (data_of(context, b, signature, args, k) for k in (0, 3, 5))
        for k, value in enumerate(_lane_differences(b, lanes, prices, args[1], args[2], args[4], range(m))):
            store(b, value, out, ir.Constant(I64, k * LANES))
        return context.get_dummy_value()

    return types.void(lanes, types.intp, types.intp, prices, types.intp, out, side), codegen


@intrinsic
def compare_exchange(typing: Any, lanes: Any, low: Any, high: Any) -> tuple[Any, Codegen]:
    """Put the smaller of two entries first, in every lane."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        pointer = data_of(context, b, signature, args, 0)
        x, y = (load(b, pointer, offset, I16, LANES) for offset in args[1:])
        store(b, smaller(b, x, y), pointer, args[1])
        store(b, larger(b, x, y), pointer, args[2])
        return context.get_dummy_value()

    return types.void(lanes, types.intp, types.intp), codegen


@intrinsic
def store_midpoint(typing: Any, lanes: Any, above: Any, below: Any, prices: Any, out: Any, floor: Any) -> tuple[Any, Codegen]:
    """Midpoint of two entries, at least `floor`, in every lane, as a price."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lanes, prices = (data_of(context, b, signature, args, k) for k in (0, 3))
        above, below = (load(b, lanes, offset, I16, LANES) for offset in args[1:3])
        _store_midpoint(b, above, below, args[5], prices, args[4])
        return context.get_dummy_value()

    return types.void(lanes, types.intp, types.intp, prices, types.intp, types.intp), codegen


@intrinsic
def tile_mask(
    typing: Any, scores: Any, base: Any, stride: Any, scale: Any, prices: Any, u: Any, v: Any, free: Any, n: Any, out: Any,
    bits: Any, work: Any, counts: Any, side: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """Write x = [q > u + v] as bytes to `out`, as bits per row, and the kept counts; returns whether the tile is unbalanced.

    Unbalanced: a row or column keeps more than n, or fewer at a price above zero (at any price if `free` is 1).
    """
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, price, bytes_, rows, work = (data_of(context, b, signature, args, k) for k in (0, 4, 9, 10, 11))
        column_prices = load(b, price, args[6], I32, m)
        kept = number(I8, m, 0)
        unbalanced = ir.Constant(BIT, 0)
        n, free = b.trunc(args[8], I32), b.trunc(args[7], BIT)
        for row in range(m):
            offset = row_of(b, args[1], args[2], row)
            row_price = b.load(b.gep(price, [at(b, args[5], row)]))
            q = quantised(b, source, offset, args[3], m)
            x = b.icmp_signed(">", q, b.add(column_prices, spread(b, row_price, m)))
            ones = b.zext(x, ir.VectorType(I8, m))
            store(b, ones, bytes_, offset)
            kept = b.add(kept, ones)
            row_bits = to_bits(b, x, m)
            b.store(row_bits, b.gep(rows, [ir.Constant(I64, row)]))
            row_kept = b.trunc(b.ctpop(row_bits), I32)
            b.store(row_kept, b.gep(work, [at(b, args[12], row)]))
            short = b.and_(b.icmp_signed("<", row_kept, n), b.or_(free, b.icmp_signed(">", row_price, ir.Constant(I32, 0))))
            unbalanced = b.or_(unbalanced, b.or_(short, b.icmp_signed(">", row_kept, n)))
        kept = b.zext(kept, ir.VectorType(I32, m))
        store(b, kept, work, at(b, args[12], m))
        wanted = spread(b, n, m)
        priced = b.or_(b.icmp_signed(">", column_prices, number(I32, m, 0)), spread(b, free, m))
        off = b.or_(b.icmp_signed(">", kept, wanted), b.and_(b.icmp_signed("<", kept, wanted), priced))
        return b.or_(to_bits(b, off, m), b.zext(unbalanced, I64))

    intp = types.intp
    return types.int64(
        scores, intp, intp, types.float32, prices, intp, intp, intp, intp, out, bits, work, intp, side
    ), codegen  # fmt: skip


@intrinsic
def store_row(typing: Any, out: Any, offset: Any, bits: Any, side: Any) -> tuple[Any, Codegen]:
    """Write a row's bits as bytes."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out = data_of(context, b, signature, args, 0)
        store(b, b.zext(from_bits(b, args[2], m), ir.VectorType(I8, m)), out, args[1])
        return context.get_dummy_value()

    return types.void(out, types.intp, types.int64, side), codegen
