"""The vector operations of a tile's repair, as numba intrinsics: rows of integers, and the steps of Dijkstra's search.

Conventions as in `vectors`: the side M is passed in the type of `side = (0,) * M`, offsets count elements, nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bisparse.kernels.exact.cpu.vectors import Codegen, quantised
from bisparse.kernels.numba_runtime.llvm import (
    BIT,
    I32,
    I64,
    at,
    call_llvm,
    data_of,
    from_bits,
    larger,
    load,
    number,
    smaller,
    spread,
    store,
    to_bits,
)  # fmt: skip

FAR = 1 << 29
"""Beyond every distance: with prices up to `repair.LIMIT` from their start, row + column + distance stays below 2**31."""


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> tuple[Any, Codegen]:
    """Index of the lowest bit set."""
    return types.int64(types.int64), lambda context, b, signature, args: b.cttz(args[0], ir.Constant(BIT, 0))


@intrinsic
def row_integers(
    typing: Any, scores: Any, offset: Any, scale: Any, prices: Any, row_price: Any, v: Any, work: Any, to: Any, side: Any
) -> tuple[Any, Codegen]:
    """Write the integers of a tile's row to work[to : to + M]; return the bits where q == u + v."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, price, target = (data_of(context, b, signature, args, k) for k in (0, 3, 6))
        q = quantised(b, source, args[1], args[2], m)
        store(b, q, target, args[7])
        sums = b.add(load(b, price, args[5], I32, m), spread(b, b.load(b.gep(price, [args[4]])), m))
        return to_bits(b, b.icmp_signed("==", q, sums), m)

    intp = types.intp
    return types.int64(scores, intp, types.float32, prices, intp, intp, work, intp, side), codegen


@intrinsic
def column_bits(typing: Any, bits: Any, rows: Any, columns: Any, side: Any) -> tuple[Any, Codegen]:
    """Transpose an M x M matrix of bits, stored as one integer per row."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        pointer = data_of(context, b, signature, args, 0)
        lane = I64 if m == 64 else I32
        matrix = load(b, pointer, args[1], I64, m)
        matrix = matrix if m == 64 else b.trunc(matrix, ir.VectorType(I32, m))
        for column in range(m):
            bit = ir.Constant(
                ir.VectorType(lane, m), [(1 << column) if m == 64 else (1 << column) - (1 << 32) * (column == 31)] * m
            )
            there = b.icmp_signed("!=", b.and_(matrix, bit), number(lane, m, 0))
            b.store(to_bits(b, there, m), b.gep(pointer, [at(b, args[2], column)]))
        return context.get_dummy_value()

    return types.void(bits, types.intp, types.intp, side), codegen


@intrinsic
def start_search(
    typing: Any, work: Any, near: Any, final: Any, origin: Any, counts: Any, prices: Any, price: Any, free: Any, n: Any, side: Any
) -> tuple[Any, Codegen]:  # fmt: skip
    """Set distance 0 for rows that keep fewer than n at a price above zero (any price if `free`); returns whether any did."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        work, prices = (data_of(context, b, signature, args, k) for k in (0, 5))
        zero, far = number(I32, m, 0), number(I32, m, FAR)
        priced = b.icmp_signed(">", load(b, prices, args[6], I32, m), zero)
        short = b.icmp_signed("<", load(b, work, args[4], I32, m), spread(b, b.trunc(args[8], I32), m))
        source = b.and_(short, b.or_(priced, spread(b, b.trunc(args[7], BIT), m)))
        store(b, b.select(source, zero, far), work, args[1])
        store(b, far, work, args[2])
        store(b, number(I32, m, -1), work, args[3])
        return to_bits(b, source, m)

    intp = types.intp
    return types.int64(work, intp, intp, intp, intp, prices, intp, intp, intp, side), codegen


@intrinsic
def start_search_surplus(
    typing: Any, work: Any, near: Any, final: Any, origin: Any, counts: Any, n: Any, side: Any
) -> tuple[Any, Codegen]:
    """Set distance 0 for columns that keep more than n; returns whether any did."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        work = data_of(context, b, signature, args, 0)
        zero, far = number(I32, m, 0), number(I32, m, FAR)
        source = b.icmp_signed(">", load(b, work, args[4], I32, m), spread(b, b.trunc(args[5], I32), m))
        store(b, b.select(source, zero, far), work, args[1])
        store(b, far, work, args[2])
        store(b, number(I32, m, -1), work, args[3])
        return to_bits(b, source, m)

    intp = types.intp
    return types.int64(work, intp, intp, intp, intp, intp, side), codegen


@intrinsic
def relax(
    typing: Any, work: Any, line: Any, distance: Any, sign: Any, prices: Any, price: Any, near: Any, origin: Any, allowed: Any,
    node: Any, side: Any,
) -> tuple[Any, Codegen]:  # fmt: skip
    """near = min(near, distance + sign * (price - q)) over the allowed nodes, with `node` as their predecessor."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        work, prices = (data_of(context, b, signature, args, k) for k in (0, 4))
        cost = b.sub(load(b, prices, args[5], I32, m), load(b, work, args[1], I32, m))
        reached = b.add(b.mul(cost, spread(b, b.trunc(args[3], I32), m)), spread(b, b.trunc(args[2], I32), m))
        near, origin = load(b, work, args[6], I32, m), load(b, work, args[7], I32, m)
        closer = b.and_(b.icmp_signed("<", reached, near), from_bits(b, args[8], m))
        store(b, b.select(closer, reached, near), work, args[6])
        store(b, b.select(closer, spread(b, b.trunc(args[9], I32), m), origin), work, args[7])
        return context.get_dummy_value()

    intp = types.intp
    return types.void(work, intp, intp, intp, prices, intp, intp, intp, types.int64, intp, side), codegen


@intrinsic
def nearest(typing: Any, work: Any, rows: Any, columns: Any, side: Any) -> tuple[Any, Codegen]:
    """The nearest unfinished node: distance << 8 | index; an index from M on is a column. Rows win ties."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        work = data_of(context, b, signature, args, 0)
        row, column = (load(b, work, offset, I32, m) for offset in args[1:3])
        best = call_llvm(b, f"llvm.vector.reduce.smin.v{m}i32", I32, [smaller(b, row, column)])
        bests = spread(b, best, m)
        row_bits, column_bits = (to_bits(b, b.icmp_signed("==", vector, bests), m) for vector in (row, column))
        in_rows = b.icmp_signed("!=", row_bits, ir.Constant(I64, 0))
        zero_ok = ir.Constant(BIT, 0)
        index = b.select(in_rows, b.cttz(row_bits, zero_ok), b.add(b.cttz(column_bits, zero_ok), ir.Constant(I64, m)))
        return b.or_(b.shl(b.sext(best, I64), ir.Constant(I64, 8)), index)

    return types.int64(work, types.intp, types.intp, side), codegen


@intrinsic
def shift_prices(
    typing: Any, prices: Any, price: Any, work: Any, final: Any, distance: Any, sign: Any, side: Any
) -> tuple[Any, Codegen]:
    """price += sign * max(0, distance - final): keeps every reduced cost non-negative after an augmentation."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        prices, work = (data_of(context, b, signature, args, k) for k in (0, 2))
        lead = b.sub(spread(b, b.trunc(args[4], I32), m), load(b, work, args[3], I32, m))
        lead = b.mul(larger(b, lead, number(I32, m, 0)), spread(b, b.trunc(args[5], I32), m))
        store(b, b.add(load(b, prices, args[1], I32, m), lead), prices, args[1])
        return context.get_dummy_value()

    intp = types.intp
    return types.void(prices, intp, work, intp, intp, intp, side), codegen
