"""Intrinsics on prices: of one tile per lane (int16, in units of the sweeps), and of a single tile (int32)."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bisparse.kernels.exact.cpu.vectors import COARSE_SHIFT, LANES, Codegen
from bisparse.kernels.numba_runtime.llvm import I16, I32, I64, call_llvm, data_of, larger, load, number, smaller, spread, store

__all__ = ["balance_prices", "coarsen_prices", "refine_prices", "rescale_prices"]


@intrinsic
def balance_prices(typing: Any, prices: Any, side: Any) -> tuple[Any, Codegen]:
    """Shift prices between rows and columns of each lane, which changes no mask, until both minima are equal; clamp at 0."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        pointer = data_of(context, b, signature, args, 0)
        vector = ir.VectorType(I16, LANES)
        lines = [load(b, pointer, ir.Constant(I64, k * LANES), I16, LANES) for k in range(2 * m)]
        rows, columns = lines[:m], lines[m:]
        low_row, low_column = reduce(partial(smaller, b), rows), reduce(partial(smaller, b), columns)
        half = b.ashr(b.xor(low_row, low_column), number(I16, LANES, 1))
        shift = call_llvm(b, f"llvm.ssub.sat.v{LANES}i16", vector, [low_row, b.add(b.and_(low_row, low_column), half)])
        for name, part, start in (("ssub", rows, 0), ("sadd", columns, m)):
            for k, line in enumerate(part):
                moved = call_llvm(b, f"llvm.{name}.sat.v{LANES}i16", vector, [line, shift])
                store(b, larger(b, moved, number(I16, LANES, 0)), pointer, ir.Constant(I64, (start + k) * LANES))
        return context.get_dummy_value()

    return types.void(prices, side), codegen


@intrinsic
def refine_prices(typing: Any, coarse: Any, from_: Any, prices: Any, to: Any, side: Any) -> tuple[Any, Codegen]:
    """Prices of a tile's rows, or columns, from units of the sweeps to units of the 24-bit scores."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (data_of(context, b, signature, args, k) for k in (0, 2))
        wide = b.sext(load(b, source, args[1], I16, m), ir.VectorType(I32, m))
        store(b, b.shl(wide, number(I32, m, COARSE_SHIFT)), target, args[3])
        return context.get_dummy_value()

    return types.void(coarse, types.intp, prices, types.intp, side), codegen


@intrinsic
def coarsen_prices(typing: Any, prices: Any, from_: Any, coarse: Any, to: Any, side: Any) -> tuple[Any, Codegen]:
    """The inverse of `refine_prices`."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (data_of(context, b, signature, args, k) for k in (0, 2))
        units = b.ashr(load(b, source, args[1], I32, m), number(I32, m, COARSE_SHIFT))
        units = larger(b, smaller(b, units, number(I32, m, 32767)), number(I32, m, -32768))
        store(b, b.trunc(units, ir.VectorType(I16, m)), target, args[3])
        return context.get_dummy_value()

    return types.void(prices, types.intp, coarse, types.intp, side), codegen


@intrinsic
def rescale_prices(typing: Any, prices: Any, offset: Any, change: Any, lowest: Any, side: Any) -> tuple[Any, Codegen]:
    """Multiply prices by 2**change, from -31 to 8, keeping them between `lowest` and 2**25."""
    m = side.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        pointer = data_of(context, b, signature, args, 0)
        zero = ir.Constant(I32, 0)
        change, lowest = b.trunc(args[2], I32), b.trunc(args[3], I32)
        left, right = larger(b, change, zero), larger(b, b.neg(change), zero)
        kept = smaller(b, load(b, pointer, args[1], I32, m), spread(b, b.ashr(ir.Constant(I32, 1 << 25), left), m))
        kept = larger(b, kept, spread(b, b.ashr(lowest, left), m))
        store(b, b.ashr(b.shl(kept, spread(b, left, m)), spread(b, right, m)), pointer, args[1])
        return context.get_dummy_value()

    return types.void(prices, types.intp, types.int64, types.int64, side), codegen
