"""Prices that prove 2:4-T masks optimal: shortest paths by Bellman and Ford, one tile per vector lane.

Complementary slackness, with w = -v, is a system of differences: u_i <= w_j + q_ij where the mask keeps, w_j <= u_i - q_ij where
it does not; for "at most 2" also w_j <= 0 <= u_i, with equality where a column or row keeps fewer. Lengths of shortest paths in
the graph of these differences solve it; for a feasible mask they exist if and only if it is optimal for the integer scores q.

Source: Ahuja, Magnanti, Orlin, Network Flows (1993), sections 5.4 and 9.2.
"""

from __future__ import annotations

from functools import cache, partial, reduce
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bisparse.kernels.exact.cpu.bands import UNBOUNDED
from bisparse.kernels.exact.cpu.enumerate_2to4 import LANE_OF_TILE, LANES_I32, WIDTH, in_order, quantiser, transposed
from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.llvm import I32, I64, at, call_llvm, data_of, load, number, row_of, smaller, store
from bisparse.kernels.numba_runtime.memory import empty
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands

__all__ = ["prices_of_masks"]

FAR = 1 << 28
"""More than the length of any path, of at most 8 scores of 24 bits."""
ROUNDS = 10
"""Shortest paths among 9 nodes are found in fewer; if some get shorter in the last one, the mask is not optimal."""
NOT_PROVED = 1


def _limits(b: Any, q: list[Any], words: list[Any], exactly: bool) -> tuple[tuple[list[Any], ...], Any]:
    """What a mask allows, and which masks are infeasible.

    Allowed are, at most, u_i - w_j and w_j - u_i, entry by entry; u_i and, for columns, -w_j, line by line.
    """
    far, zero, one = (number(I32, WIDTH, value) for value in (FAR, 0, 1))
    up, down, kept = [], [], []
    for row in range(4):
        for column in range(4):
            bit = b.and_(b.lshr(words[row], number(I32, WIDTH, 8 * column)), one)
            held = b.icmp_signed("!=", bit, zero)
            up.append(b.select(held, q[4 * row + column], far))
            down.append(b.select(held, far, b.sub(zero, q[4 * row + column])))
            kept.append(bit)
    two = number(I32, WIDTH, 2)
    sums = [reduce(b.add, line) for line in (*(kept[4 * row : 4 * row + 4] for row in range(4)), *(kept[k::4] for k in range(4)))]
    infeasible = reduce(b.or_, [b.icmp_signed("!=" if exactly else ">", one, two) for one in sums])
    slack = [far if exactly else b.select(b.icmp_signed("<", one, two), zero, far) for one in sums]
    return (up, down, slack[:4], slack[4:]), infeasible


def _shorter(b: Any, nodes: list[Any], limits: tuple[list[Any], ...], exactly: bool) -> list[Any]:
    """The lengths to rows, columns and, for "at most", the node of zero, after one more round over all edges."""
    up, down, rows, columns = limits
    least = partial(reduce, partial(smaller, b))
    u, w, zero = nodes[:4], nodes[4:8], nodes[8]
    for i in range(4):
        paths = [b.add(w[j], up[4 * i + j]) for j in range(4)]
        u[i] = least([u[i], *paths, *([] if exactly else [b.add(zero, rows[i])])])
    for j in range(4):
        paths = [b.add(u[i], down[4 * i + j]) for i in range(4)]
        w[j] = least([w[j], *paths, *([] if exactly else [zero])])
    if not exactly:
        zero = least([zero, *u, *(b.add(w[j], columns[j]) for j in range(4))])
    return [*u, *w, zero]


def _price_tiles(exactly: bool) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        scores, mask, prices, exponents = (data_of(context, b, signature, args, k) for k in (0, 1, 4, 5))
        offset, stride, tile, tiles = args[2], args[3], args[6], args[7]
        none = number(I32, WIDTH, 0)
        floats, largest, scale = quantiser(b, scores, offset, stride)
        q = [call_llvm(b, f"llvm.lrint.v{WIDTH}i32.v{WIDTH}f32", LANES_I32, [b.fmul(x, scale)]) for x in floats]
        exponent = b.sub(number(I32, WIDTH, 150), b.lshr(largest, number(I32, WIDTH, 23)))
        store(b, in_order(b, b.select(b.icmp_signed("!=", largest, none), exponent, none)), exponents, tile)
        words = b.bitcast(mask, I32.as_pointer())
        entries = [row_of(b, offset, stride, row) for row in range(4)]
        four = ir.Constant(I64, 4)
        held = [_by_lane(b, load(b, words, b.udiv(entry, four), I32, WIDTH)) for entry in entries]
        limits, infeasible = _limits(b, q, held, exactly)
        places = [cgutils.alloca_once(b, LANES_I32) for _ in range(9)]
        for place in places:
            b.store(none, place)
        unsettled = cgutils.alloca_once(b, I32)
        with cgutils.for_range(b, ir.Constant(I64, ROUNDS)) as loop:
            before = [b.load(place) for place in places]
            after = _shorter(b, list(before), limits, exactly)
            changes = reduce(b.or_, [b.xor(old, new) for old, new in zip(before, after, strict=True)])
            for value, place in zip(after, places, strict=True):
                b.store(value, place)
            some = call_llvm(b, f"llvm.vector.reduce.or.v{WIDTH}i32", I32, [changes])
            b.store(some, unsettled)
            with b.if_then(b.icmp_signed("==", some, ir.Constant(I32, 0))):
                loop.do_break()
        *nodes, zero = (b.load(place) for place in places)
        u, v = [b.sub(one, zero) for one in nodes[:4]], [b.sub(zero, one) for one in nodes[4:]]
        for side, first in ((u, tile), (v, b.add(tile, tiles))):
            for k, part in enumerate(transposed(b, side)):
                store(b, part, prices, at(b, b.mul(first, four), WIDTH * k))
        bad = b.zext(b.or_(infeasible, b.icmp_unsigned(">=", largest, number(I32, WIDTH, UNBOUNDED))), LANES_I32)
        return b.or_(b.load(unsettled), call_llvm(b, f"llvm.vector.reduce.or.v{WIDTH}i32", I32, [bad]))

    def typing(
        context: Any, scores: Any, mask: Any, offset: Any, stride: Any, prices: Any, exponents: Any, tile: Any, tiles: Any
    ) -> tuple[Any, Any]:
        numbers = (types.intp, types.intp)
        return types.int32(scores, mask, *numbers, prices, exponents, *numbers), codegen

    return typing


def _by_lane(b: Any, words: Any) -> Any:
    """One word per tile, tiles in order, in the lanes of `LANE_OF_TILE`."""
    place = [LANE_OF_TILE.index(lane) for lane in range(WIDTH)]
    return b.shuffle_vector(words, ir.Constant(LANES_I32, ir.Undefined), ir.Constant(LANES_I32, place))


@intrinsic
def price_at_most_2(
    typing: Any, scores: Any, mask: Any, offset: Any, stride: Any, prices: Any, exponents: Any, tile: Any, tiles: Any
) -> Any:
    """Write prices and exponents of `WIDTH` adjacent tiles, the first at an offset; returns not 0 if they prove nothing."""
    return _price_tiles(exactly=False)(typing, scores, mask, offset, stride, prices, exponents, tile, tiles)


@intrinsic
def price_exactly_2(
    typing: Any, scores: Any, mask: Any, offset: Any, stride: Any, prices: Any, exponents: Any, tile: Any, tiles: Any
) -> Any:
    """`price_at_most_2`, for masks of exactly 2 in every row and column."""
    return _price_tiles(exactly=True)(typing, scores, mask, offset, stride, prices, exponents, tile, tiles)


@cached_njit(from_python=False)
def prices_band(scores, mask, prices, exponents, columns, exactly, first, last):  # type: ignore[no-untyped-def]
    """Prices and exponents of bands first..last of four rows, at least 4 * `WIDTH` wide. Returns flags."""
    across, tiles = columns // 4, exponents.shape[0]
    open_tiles = np.int32(0)
    for band in range(first, last):
        for start in range(0, across, WIDTH):
            t = min(start, across - WIDTH)  # the last call overlaps with the one before
            offset, tile = 4 * (band * columns + t), band * across + t
            if exactly:
                open_tiles |= price_exactly_2(scores, mask, offset, columns, prices, exponents, tile, tiles)
            else:
                open_tiles |= price_at_most_2(scores, mask, offset, columns, prices, exponents, tile, tiles)
    return NOT_PROVED if open_tiles != 0 else 0


@cache
def prices_kernel() -> Kernel:
    """`prices_band`. Arguments: scores, mask, prices with the exponents behind them; tiles, columns, exactly."""

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        scores, mask, prices, tiles, columns, exactly = array_at(arguments, (6,), np.int64)
        return 1 + prices_band(
            array_at(scores, (16 * tiles,), np.float32),
            array_at(mask, (16 * tiles,), np.uint8),
            array_at(prices, (8 * tiles,), np.int32),
            array_at(prices + 4 * 8 * tiles, (tiles,), np.int32),
            columns,
            exactly != 0,
            first,
            last,
        )

    return kernel(entry)


def prices_of_masks(
    scores: torch.Tensor, mask: torch.Tensor, exactly: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Row and column prices (tiles, 4) and exponents, int32, of 2:4-T masks of float32 scores (rows, columns) >= 0.

    None if a mask is infeasible, or not optimal for the scores as rounded to 24 bits of each tile's largest, for scores that are
    NaN, infinite, negative or -0.0, and for matrices narrower than the vectors. Tiles must not be coarse.
    """
    rows, columns = scores.shape
    if columns < 4 * WIDTH:
        return None
    scores, mask = scores.contiguous(), mask.contiguous()
    tiles = scores.numel() // 16
    numbers = empty((9 * tiles,), torch.int32)
    arguments = scores, mask, numbers, tiles, columns, exactly
    if over_bands(prices_kernel(), arguments, rows // 4, 1, max(1, 16384 // max(columns, 1))):
        return None
    return numbers[: 4 * tiles].view(tiles, 4), numbers[4 * tiles : 8 * tiles].view(tiles, 4), numbers[8 * tiles :]
