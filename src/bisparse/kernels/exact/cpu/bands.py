"""The CPU kernels over bands of tiles: the exact solver's sweeps and repairs, and 2:4 by meeting in the middle.

Idea: prices of all tiles at once, one tile per lane, by sorting networks on 16-bit scores; then, tile by tile, the mask that
those prices give on 24-bit scores; then shortest augmenting paths for unbalanced tiles. See `reference` for the algorithm in
plain torch, `vectors` for the instructions, `enumerate_2to4` for 2:4.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from bisparse.kernels.exact.cpu import vectors as vec
from bisparse.kernels.exact.cpu.enumerate_2to4 import (
    FEW,
    WIDTH,
    best_at_most_2,
    best_exactly_2,
    fence,
    fetch_ahead,
    fetch_to_write,
    mask_bits,
    spans_too_far,
    store_masks,
    store_masks_past_caches,
)  # fmt: skip
from bisparse.kernels.exact.cpu.prices import balance_prices, coarsen_prices, refine_prices, rescale_prices
from bisparse.kernels.exact.cpu.repair import repair
from bisparse.kernels.exact.cpu.vectors import LANES, SMALL
from bisparse.kernels.exact.schema import NEEDS_EXACT
from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel

COLD_ALTERNATIONS = 5  # before the prices are balanced
BALANCED_ALTERNATIONS = 3
WARM_ALTERNATIONS = 2
UNBOUNDED = 0x7F800000  # the bit pattern of infinity: NaN and, read as unsigned, every negative number are larger
MIDDLE_CHUNK = 128
BAD, FOUND_NEEDS_EXACT = 1, 2
"""Flags: a score may be NaN, infinite or negative; a tile is coarse."""
MASK_BITS = mask_bits()
WARM = 1
"""Passed as `warm` to compile the warm start; None leaves it out."""


@cached_njit(from_python=False)
def median_sweep(lanes, prices, other, out, line_stride, entry_stride, floor, side):  # type: ignore[no-untyped-def]
    """One half-sweep at N = M / 2: a price for every line of every lane."""
    vec.never_inline()
    for line in range(len(side)):
        vec.median_prices(lanes, line * line_stride, entry_stride, prices, other, out + line * LANES, floor, side)


@cached_njit(from_python=False)
def general_sweep(lanes, prices, other, out, line_stride, entry_stride, network, n, spare, floor, side):  # type: ignore[no-untyped-def]
    """One half-sweep at any N < M, by a whole sorting network held as data."""
    vec.never_inline()
    m = len(side)
    for line in range(m):
        vec.lane_differences(lanes, line * line_stride, entry_stride, prices, other, spare, side)
        for k in range(network.shape[0]):
            vec.compare_exchange(spare, network[k, 0] * LANES, network[k, 1] * LANES)
        vec.store_midpoint(spare, (m - n) * LANES, (m - n - 1) * LANES, prices, out + line * LANES, floor)


@cached_njit(from_python=False)
def sweep_prices(lanes, prices16, alternations, network, n, spare, floor, side):  # type: ignore[no-untyped-def]
    """Alternate: row prices from column prices, column prices from row prices. Rows first in `prices16`."""
    vec.never_inline()
    m = len(side)
    # numba would type literals separately and compile each combination of them.
    rows, columns, across, along = np.int64(0), np.int64(m * LANES), np.int64(m * LANES), np.int64(LANES)
    for _ in range(alternations):
        if network is None:
            median_sweep(lanes, prices16, columns, rows, across, along, floor, side)
            median_sweep(lanes, prices16, rows, columns, along, across, floor, side)
        else:
            general_sweep(lanes, prices16, columns, rows, across, along, network, n, spare, floor, side)
            general_sweep(lanes, prices16, rows, columns, along, across, network, n, spare, floor, side)


@cached_njit(from_python=False)
def start_prices(prices16, settled, prices, u, v, chosen, side):  # type: ignore[no-untyped-def]
    """The prices of the sweeps in units of the 24-bit scores, for the chosen tiles; `settled` is scratch for their transpose."""
    vec.never_inline()
    m = len(side)
    for t in range(0, LANES, 8):
        for k in range(0, 2 * m, 8):
            vec.transpose_8x8(prices16, k * LANES + t, LANES, settled, t * 2 * m + k, 2 * m)
    for t in range(LANES):
        if chosen[t] != 0:
            refine_prices(settled, t * 2 * m, prices, u + t * m, side)
            refine_prices(settled, t * 2 * m + m, prices, v + t * m, side)


@cached_njit(from_python=False)
def clear(array, first, last):  # type: ignore[no-untyped-def]
    """Set entries first to last to zero; numba compiles a slice assignment ten times slower."""
    for k in range(first, last):
        array[k] = 0


@cached_njit(from_python=False)
def solve_band(scores, columns, mask, prices, exponents, n, free, warm, network, side, first, last):  # type: ignore[no-untyped-def]
    """Solve tiles first..last; with `warm`, prices and exponents hold an earlier solution. Returns flags."""
    m = len(side)
    across, tiles = columns // m, exponents.shape[0]
    source, lanes = np.empty(LANES * m * m, np.int16), np.empty(LANES * m * m, np.int16)
    prices16, settled, spare = np.empty(2 * m * LANES, np.int16), np.empty(2 * m * LANES, np.int16), np.empty(m * LANES, np.int16)
    scales, bases = np.empty(LANES, np.float32), np.empty(LANES, np.int64)
    work, bits = np.empty(2 * m * m + 8 * m, np.int32), np.empty(4 * m + 1, np.int64)
    kept_row = 2 * m * m + 6 * m
    chosen = np.empty(LANES, np.int64)
    equal = np.empty(
        2 * m, np.int64
    )  # rows of the mask of a tile of zeros, and of a tile of another number: n per row and column
    for i in range(m):
        equal[i] = equal[m + i] = 0
        for k in range(n):
            equal[m + i] |= np.int64(1) << ((i + k) % m)
    floor = -32768 if free else 0
    worst, flags = np.int64(0), np.int64(0)
    for start in range(first, last, LANES):
        count = min(LANES, last - start)
        u, v = start * m, (tiles + start) * m
        some = False
        for t in range(LANES):
            chosen[t], scales[t], bases[t] = 0, np.float32(0), 0
        for t in range(count):
            tile = start + t
            base = (tile // across) * m * columns + (tile % across) * m
            bases[t] = base
            largest = vec.tile_largest_bits(scores, base, columns, side)
            worst = max(worst, largest)
            biased = max(min(largest >> 23, 254), 23)
            exponent = np.int32(150 - biased) if largest > 0 else np.int32(0)
            scales[t] = vec.bits_to_float(np.int32((277 - biased) << 23))
            small = vec.tile_to_lanes_source(scores, base, columns, scales[t], source, t * m * m, side)
            if largest >= UNBOUNDED:
                scales[t] = np.float32(0)
            elif 0 < largest < (24 << 23):
                exponent = np.int32(NEEDS_EXACT)
            elif largest > 0 and 2 * small < m * m * SMALL:
                few = 0
                for i in range(m):
                    for j in range(m):
                        score = scores[base + i * columns + j]
                        if score > 0:
                            few += 1 if score * scales[t] < SMALL - 0.5 else -1
                if few > 0:
                    exponent = np.int32(NEEDS_EXACT)
            if exponent == NEEDS_EXACT:
                flags |= FOUND_NEEDS_EXACT
                scales[t] = np.float32(0)
                clear(source, t * m * m, (t + 1) * m * m)
            if warm is not None:
                before = exponents[tile]
                usable = before != NEEDS_EXACT and exponent != NEEDS_EXACT
                change = min(max(exponent - before, -31), 8) if usable else -31
                for side_of in (u, v):
                    rescale_prices(prices, side_of + t * m, change, -(1 << 25) if free else 0, side)
                row, column = u + t * m, v + t * m
                off = vec.tile_mask(
                    scores, base, columns, scales[t], prices, row, column, free, n, mask, bits, work, kept_row, side
                )  # fmt: skip
                chosen[t] = off != 0
                some |= off != 0
            elif (
                exponent != NEEDS_EXACT
                and scores[base] == scores[base + columns + 1]
                and (largest < UNBOUNDED and vec.tile_smallest_bits(scores, base, columns, side) == largest)
            ):  # all equal, as in what was pruned before: one mask for all such tiles, whatever the score, but for zeros
                price = np.int32(scores[base] * scales[t])
                kept = m if price > 0 or free else 0
                for i in range(m):
                    prices[u + t * m + i], prices[v + t * m + i] = price >> 1, price - (price >> 1)
                    vec.store_row(mask, base + i * columns, equal[kept + i], side)
            else:
                chosen[t] = 1
                some = True
            exponents[tile] = exponent
        if not some:
            continue
        if count < LANES:
            clear(source, count * m * m, LANES * m * m)
        for t in range(0, LANES, 8):
            for k in range(0, m * m, 8):
                vec.transpose_8x8(source, t * m * m + k, m * m, lanes, k * LANES + t, LANES)
        if warm is not None:
            clear(settled, 0, 2 * m * LANES)
            for t in range(count):
                coarsen_prices(prices, u + t * m, settled, t * 2 * m, side)
                coarsen_prices(prices, v + t * m, settled, t * 2 * m + m, side)
            for t in range(0, LANES, 8):
                for k in range(0, 2 * m, 8):
                    vec.transpose_8x8(settled, t * 2 * m + k, 2 * m, prices16, k * LANES + t, LANES)
        else:
            clear(prices16, 0, 2 * m * LANES)
            sweep_prices(lanes, prices16, np.int64(COLD_ALTERNATIONS), network, n, spare, np.int64(-32768), side)
            if not free:
                balance_prices(prices16, side)
        more = np.int64(WARM_ALTERNATIONS if warm is not None else BALANCED_ALTERNATIONS)
        sweep_prices(lanes, prices16, more, network, n, spare, np.int64(floor), side)
        start_prices(prices16, settled, prices, u, v, chosen, side)
        for t in range(count):
            if chosen[t] == 0:
                continue
            base, row, column = bases[t], u + t * m, v + t * m
            off = vec.tile_mask(scores, base, columns, scales[t], prices, row, column, free, n, mask, bits, work, kept_row, side)
            if off == 0:
                continue
            if not repair(scores, base, columns, scales[t], prices, row, column, n, free, mask, bits, work, side):
                exponents[start + t] = NEEDS_EXACT
                flags |= FOUND_NEEDS_EXACT
    return flags | BAD if worst >= UNBOUNDED else flags


@cached_njit(from_python=False)
def middle_tiles(scores, offset, ahead, stride, count, bits, flags, exactly, extremes):  # type: ignore[no-untyped-def]
    """2:4-T masks, as bits, of `count` adjacent tiles, at least `WIDTH`. Returns whether some are coarse, by `flags`.

    `ahead` is the address to prefetch: the hardware prefetcher does not follow four distant rows.
    """
    vec.never_inline()
    extremes[:WIDTH] = FEW
    if exactly:
        for t in range(0, count, WIDTH):
            k = min(t, count - WIDTH)  # the last call overlaps with the one before
            fetch_ahead(scores, ahead + 4 * k, stride)
            best_exactly_2(scores, offset + 4 * k, stride, bits, k, extremes)
    else:
        for t in range(0, count, WIDTH):
            k = min(t, count - WIDTH)
            fetch_ahead(scores, ahead + 4 * k, stride)
            best_at_most_2(scores, offset + 4 * k, stride, bits, k, extremes)
    for t in range(count):
        bits[t] = MASK_BITS[bits[t]]
    least = np.int32(FEW)
    for k in range(WIDTH):
        least = min(least, extremes[k])
    if least == FEW:
        return False
    for t in range(0, count, WIDTH):
        k = min(t, count - WIDTH)
        spans_too_far(scores, offset + 4 * k, stride, flags, k)
    return True


@cached_njit(from_python=False)
def middle_band(scores, mask, past_caches, exactly, first, last):  # type: ignore[no-untyped-def]
    """2:4-T masks of bands first..last of four rows of a matrix or, if it has one band only, of its tiles first..last.

    Returns flags.
    """
    bits, flags = np.empty(MIDDLE_CHUNK, np.int32), np.empty(MIDDLE_CHUNK, np.int32)
    extremes = np.zeros(2 * WIDTH, np.int32)
    columns = scores.shape[1]
    across = columns // 4
    left, right = 0, across
    if scores.shape[0] == 4:
        left, right, first, last = first, last, 0, 1
    seen = np.int64(0)
    for band in range(first, last):
        for chunk in range(left, right, MIDDLE_CHUNK):
            start = max(0, min(chunk, right - WIDTH))
            count = min(MIDDLE_CHUNK, right - start)
            offset = 4 * (band * columns + start)
            ahead = offset + 4 * count if start + count < across else 4 * (band + 1) * columns
            if not past_caches:
                for t in range(0, count, WIDTH):
                    fetch_to_write(mask, offset + 4 * min(t, count - WIDTH), columns)
            if middle_tiles(scores, offset, ahead, columns, count, bits, flags, exactly, extremes) and flags[:count].any():
                seen |= FOUND_NEEDS_EXACT
            for t in range(0, count, WIDTH):
                k = min(t, count - WIDTH)
                if past_caches:
                    store_masks_past_caches(bits, k, mask, offset + 4 * k, columns)
                else:
                    store_masks(bits, k, mask, offset + 4 * k, columns)
    fence()
    worst = np.int64(0)
    for k in range(WIDTH):
        worst = max(worst, np.int64(extremes[WIDTH + k]) & 0xFFFFFFFF)
    return seen | BAD if worst >= UNBOUNDED else seen


@cached_njit()
def coarse_tiles(scores, coarse):  # type: ignore[no-untyped-def]
    """Which tiles of a matrix at least `WIDTH` tiles wide are coarse."""
    flags = np.empty(WIDTH, np.int32)
    columns = scores.shape[1]
    across = columns // 4
    for band in range(len(coarse) // across):
        for chunk in range(0, across, WIDTH):
            start = min(chunk, across - WIDTH)
            spans_too_far(scores, 4 * (band * columns + start), columns, flags, 0)
            for t in range(WIDTH):
                coarse[band * across + start + t] = flags[t] != 0


@cache
def solve_kernel(m: int, median: bool, warm: bool) -> Kernel:
    """`solve_band` for tiles of a side, at N = M / 2 (`median`) or any N, cold or `warm`; compiles what such a call needs.

    Arguments: scores, mask, prices with the exponents behind them, network; tiles, columns, entries of the network, n, exactly.
    """
    side = (0,) * m
    start = WARM if warm else None

    if median:

        def entry(arguments, first, last):  # type: ignore[no-untyped-def]
            scores, mask, prices, _network, tiles, columns, _entries, n, exactly = array_at(arguments, (9,), np.int64)
            return 1 + solve_band(
                array_at(scores, (tiles * m * m,), np.float32),
                columns,
                array_at(mask, (tiles * m * m,), np.uint8),
                array_at(prices, (2 * tiles * m,), np.int32),
                array_at(prices + 4 * 2 * tiles * m, (tiles,), np.int32),
                n,
                exactly,
                start,
                None,
                side,
                first,
                last,
            )
    else:

        def entry(arguments, first, last):  # type: ignore[no-untyped-def]
            scores, mask, prices, network, tiles, columns, entries, n, exactly = array_at(arguments, (9,), np.int64)
            return 1 + solve_band(
                array_at(scores, (tiles * m * m,), np.float32),
                columns,
                array_at(mask, (tiles * m * m,), np.uint8),
                array_at(prices, (2 * tiles * m,), np.int32),
                array_at(prices + 4 * 2 * tiles * m, (tiles,), np.int32),
                n,
                exactly,
                start,
                array_at(network, (entries, 2), np.int64),
                side,
                first,
                last,
            )

    return kernel(entry)


@cache
def middle_kernel() -> Kernel:
    """`middle_band`. Arguments: scores, mask; rows, columns, past caches, exactly."""

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        given = array_at(arguments, (6,), np.int64)
        shape = given[2], given[3]
        scores, mask = array_at(given[0], shape, np.float32), array_at(given[1], shape, np.bool_)
        return 1 + middle_band(scores, mask, given[4] != 0, given[5] != 0, first, last)

    return kernel(entry)
