"""The exact solver on CPU: numba kernels over bands of tiles, registered for torch's "cpu" device.

Idea: prices of all tiles at once, one tile a lane, by sorting networks on 16-bit scores; then, tile by tile, the exact mask
those prices ask for on 24-bit scores; then shortest augmenting paths for the tiles left unbalanced. See `reference` for the
algorithm in plain torch, `vectors` for the instructions, `middle` for 2:4.

Nothing is left to torch's own threads: they spin for a while after their work and take the cores from ours.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from bisparse.kernels import ops
from bisparse.kernels import vectors as vec
from bisparse.kernels.general import solve_integers
from bisparse.kernels.memory import LARGE, empty
from bisparse.kernels.middle import (
    FEW,
    WIDTH,
    best_at_most_2,
    best_exactly_2,
    fence,
    fetch_ahead,
    mask_bits,
    spans_too_far,
    store_masks,
    store_masks_past_caches,
)  # fmt: skip
from bisparse.kernels.networks import sorting_network
from bisparse.kernels.prices import balance_prices, coarsen_prices, refine_prices, rescale_prices
from bisparse.kernels.repair import repair
from bisparse.kernels.threads import over_bands
from bisparse.kernels.vectors import LANES, SMALL

COLD_ALTERNATIONS = 5  # before the prices are balanced
BALANCED_ALTERNATIONS = 3
WARM_ALTERNATIONS = 2
VECTOR_SIDES = (4, 8, 16, 32, 64)
UNBOUNDED = 0x7F800000  # the bit pattern of infinity: NaN and, read as unsigned, every negative number lie above
MIDDLE_CHUNK = 128
FOUND_COARSE = 1 << 32
MASK_BITS = mask_bits()


@njit(nogil=True, cache=True)
def median_sweep(lanes, prices, other, out, line_stride, entry_stride, floor, side):  # type: ignore[no-untyped-def]
    """One half-sweep at N = M / 2: a price for every line of every lane."""
    vec.never_inline()
    for line in range(len(side)):
        vec.median_prices(lanes, line * line_stride, entry_stride, prices, other, out + line * LANES, floor, side)


@njit(nogil=True, cache=True)
def general_sweep(lanes, prices, other, out, line_stride, entry_stride, network, n, spare, floor, side):  # type: ignore[no-untyped-def]
    """One half-sweep at any N < M, by a whole sorting network held as data."""
    vec.never_inline()
    m = len(side)
    for line in range(m):
        vec.lane_differences(lanes, line * line_stride, entry_stride, prices, other, spare, side)
        for k in range(network.shape[0]):
            vec.compare_exchange(spare, network[k, 0] * LANES, network[k, 1] * LANES)
        vec.store_midpoint(spare, (m - n) * LANES, (m - n - 1) * LANES, prices, out + line * LANES, floor)


@njit(nogil=True, cache=True)
def sweep_prices(lanes, prices16, alternations, network, n, spare, floor, side):  # type: ignore[no-untyped-def]
    """Alternate: row prices from column prices, column prices from row prices. Rows first in `prices16`."""
    vec.never_inline()
    m = len(side)
    columns = m * LANES
    for _ in range(alternations):
        if network.shape[0] == 0:
            median_sweep(lanes, prices16, columns, 0, m * LANES, LANES, floor, side)
            median_sweep(lanes, prices16, 0, columns, LANES, m * LANES, floor, side)
        else:
            general_sweep(lanes, prices16, columns, 0, m * LANES, LANES, network, n, spare, floor, side)
            general_sweep(lanes, prices16, 0, columns, LANES, m * LANES, network, n, spare, floor, side)


@njit(nogil=True, cache=True)
def start_prices(prices16, settled, prices, u, v, chosen, side):  # type: ignore[no-untyped-def]
    """The prices of the sweeps in units of the 24-bit scores, for the chosen tiles; `settled` is room for their transpose."""
    vec.never_inline()
    m = len(side)
    for t in range(0, LANES, 8):
        for k in range(0, 2 * m, 8):
            vec.transpose_8x8(prices16, k * LANES + t, LANES, settled, t * 2 * m + k, 2 * m)
    for t in range(LANES):
        if chosen[t]:
            refine_prices(settled, t * 2 * m, prices, u + t * m, side)
            refine_prices(settled, t * 2 * m + m, prices, v + t * m, side)


@njit(nogil=True, cache=True)
def solve_band(scores, columns, mask, prices, exponents, n, free, warm, network, side, first, last):  # type: ignore[no-untyped-def]
    """Solve tiles first..last; with `warm`, prices and exponents hold an earlier solution. Largest bit pattern seen."""
    m = len(side)
    across, tiles = columns // m, exponents.shape[0]
    source, lanes = np.zeros(LANES * m * m, np.int16), np.zeros(LANES * m * m, np.int16)
    prices16, settled, spare = np.zeros(2 * m * LANES, np.int16), np.zeros(2 * m * LANES, np.int16), np.zeros(m * LANES, np.int16)
    scales, bases = np.zeros(LANES, np.float32), np.zeros(LANES, np.int64)
    work, bits = np.zeros(2 * m * m + 8 * m, np.int32), np.zeros(4 * m + 1, np.int64)
    kept_row = 2 * m * m + 6 * m
    chosen = np.zeros(LANES, np.bool_)
    floor = -32768 if free else 0
    worst = np.int64(0)
    for start in range(first, last, LANES):
        count = min(LANES, last - start)
        u, v = start * m, (tiles + start) * m
        chosen[:] = False
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
                exponent = np.int32(ops.COARSE)
            elif 2 * small < m * m * SMALL:
                few = 0
                for i in range(m):
                    for j in range(m):
                        score = scores[base + i * columns + j]
                        if score > 0:
                            few += 1 if score * scales[t] < SMALL - 0.5 else -1
                if few > 0:
                    exponent = np.int32(ops.COARSE)
            if exponent == ops.COARSE:
                scales[t] = np.float32(0)
                source[t * m * m : (t + 1) * m * m] = 0
            if warm:
                before = exponents[tile]
                usable = before != ops.COARSE and exponent != ops.COARSE
                change = min(max(exponent - before, -31), 8) if usable else -31
                for side_of in (u, v):
                    rescale_prices(prices, side_of + t * m, change, -(1 << 25) if free else 0, side)
                row, column = u + t * m, v + t * m
                off = vec.tile_mask(
                    scores, base, columns, scales[t], prices, row, column, free, n, mask, bits, work, kept_row, side
                )  # fmt: skip
                chosen[t] = off != 0
            else:
                chosen[t] = True
            exponents[tile] = exponent
        if not chosen.any():
            continue
        if count < LANES:
            source[count * m * m :] = 0
        for t in range(0, LANES, 8):
            for k in range(0, m * m, 8):
                vec.transpose_8x8(source, t * m * m + k, m * m, lanes, k * LANES + t, LANES)
        if warm:
            settled[:] = 0
            for t in range(count):
                coarsen_prices(prices, u + t * m, settled, t * 2 * m, side)
                coarsen_prices(prices, v + t * m, settled, t * 2 * m + m, side)
            for t in range(0, LANES, 8):
                for k in range(0, 2 * m, 8):
                    vec.transpose_8x8(settled, t * 2 * m + k, 2 * m, prices16, k * LANES + t, LANES)
        else:
            prices16[:] = 0
            sweep_prices(lanes, prices16, COLD_ALTERNATIONS, network, n, spare, -32768, side)
            if not free:
                balance_prices(prices16, side)
        sweep_prices(lanes, prices16, WARM_ALTERNATIONS if warm else BALANCED_ALTERNATIONS, network, n, spare, floor, side)
        start_prices(prices16, settled, prices, u, v, chosen, side)
        for t in range(count):
            if not chosen[t]:
                continue
            base, row, column = bases[t], u + t * m, v + t * m
            off = vec.tile_mask(scores, base, columns, scales[t], prices, row, column, free, n, mask, bits, work, kept_row, side)
            if off == 0:
                continue
            if not repair(scores, base, columns, scales[t], prices, row, column, n, free, mask, bits, work, side):
                exponents[start + t] = ops.COARSE
    return worst


@njit(nogil=True, cache=True)
def middle_tiles(scores, offset, ahead, stride, count, bits, flags, exactly, extremes):  # type: ignore[no-untyped-def]
    """2:4-T of `count` tiles side by side, at least `WIDTH`: their masks as bits. Does `flags` name coarse ones?

    What comes next is at `ahead`: four rows far apart are more streams than the processor follows by itself.
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


@njit(nogil=True, cache=True)
def middle_band(scores, mask, past_caches, exactly, first, last):  # type: ignore[no-untyped-def]
    """2:4-T of bands first..last of four rows of a matrix. Largest bit pattern seen, plus `FOUND_COARSE` if a tile is coarse."""
    bits, flags = np.empty(MIDDLE_CHUNK, np.int32), np.empty(MIDDLE_CHUNK, np.int32)
    extremes = np.zeros(2 * WIDTH, np.int32)
    columns = scores.shape[1]
    across = columns // 4
    found = np.int64(0)
    for band in range(first, last):
        for chunk in range(0, across, MIDDLE_CHUNK):
            start = min(chunk, across - WIDTH)
            count = min(MIDDLE_CHUNK, across - start)
            offset = 4 * (band * columns + start)
            ahead = offset + 4 * count if start + count < across else 4 * (band + 1) * columns
            if middle_tiles(scores, offset, ahead, columns, count, bits, flags, exactly, extremes) and flags[:count].any():
                found = np.int64(FOUND_COARSE)
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
    return worst + found


@njit(nogil=True, cache=True)
def coarse_tiles(scores, coarse):  # type: ignore[no-untyped-def]
    """Which tiles of a matrix of at least `WIDTH` across are coarse."""
    flags = np.empty(WIDTH, np.int32)
    columns = scores.shape[1]
    across = columns // 4
    for band in range(len(coarse) // across):
        for chunk in range(0, across, WIDTH):
            start = min(chunk, across - WIDTH)
            spans_too_far(scores, 4 * (band * columns + start), columns, flags, 0)
            for t in range(WIDTH):
                coarse[band * across + start + t] = flags[t] != 0


@njit(nogil=True, cache=True)
def largest_band(groups, n, mask, first, last):  # type: ignore[no-untyped-def]
    """Keep an entry if fewer than n of its group are larger, or equal and before it."""
    m = groups.shape[1]
    for g in range(first, last):
        for i in range(m):
            score = groups[g, i]
            before = 0
            for j in range(i):
                before += groups[g, j] >= score
            for j in range(i + 1, m):
                before += groups[g, j] > score
            mask[g, i] = before < n
    return 0


def _usable(worst: list[int], scores: torch.Tensor) -> bool:
    """Whether the kernels could use the scores as they are; raises for scores that no solver takes."""
    if max(worst, default=0) < UNBOUNDED:
        return True
    ops.check_scores(scores)
    return False  # only -0.0


def keep_largest(groups: torch.Tensor, n: int) -> torch.Tensor:
    """`ops.keep_largest` on CPU."""
    if groups.dtype in (torch.float16, torch.bfloat16):
        groups = groups.float()
    numbers = groups.contiguous().numpy()
    mask = empty(numbers.shape, np.bool_)
    worth = max(1, 65536 // max(groups.shape[1], 1))
    over_bands(lambda first, last: int(largest_band(numbers, n, mask, first, last)), len(groups), 1, worth)
    return torch.from_numpy(mask)


def exact_mask(scores: torch.Tensor, n: int, m: int, exactly: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ops.exact_mask` on CPU."""
    if (n, m) != (2, 4):
        solved, _, exponent = exact_solve(scores, n, m, exactly, None, None)
        return solved, exponent == ops.COARSE
    rows, columns = scores.shape
    wide = scores.numpy()
    # Narrow matrices are laid side by side, four rows in all, so that the lanes are full.
    beside = columns < 4 * MIDDLE_CHUNK
    if beside:
        wide = wide.reshape(rows // 4, 4, columns).swapaxes(0, 1).reshape(4, -1)
    lacking = max(0, 4 * WIDTH - wide.shape[1])
    if lacking > 0:
        wide = np.pad(wide, ((0, 0), (0, lacking)))
    wide = np.ascontiguousarray(wide)
    height, width = wide.shape
    mask = empty((height, width), np.bool_)
    result = torch.from_numpy(mask)  # before the kernel, which leaves the caches cold
    # What is larger than the caches would be read only to be overwritten.
    past_caches = height * width >= LARGE and width % (4 * WIDTH) == 0 and mask.ctypes.data % (4 * WIDTH) == 0

    def bands_of_rows(first: int, last: int) -> int:
        return int(middle_band(wide, mask, past_caches, exactly, first, last))

    def columns_of_one_band(first: int, last: int) -> int:
        part = np.ascontiguousarray(wide[:, 4 * first : 4 * last])
        rows_out = np.empty(part.shape, np.bool_)
        seen = middle_band(part, rows_out, False, exactly, 0, 1)
        mask[:, 4 * first : 4 * last] = rows_out
        return int(seen)

    if height == 4:
        seen = over_bands(columns_of_one_band, width // 4, MIDDLE_CHUNK, 4096)
    else:
        seen = over_bands(bands_of_rows, height // 4, 1, max(1, 16384 // width))
    if not _usable([one % FOUND_COARSE for one in seen], scores):
        return exact_mask(scores.abs(), n, m, exactly)
    coarse = None
    if max(seen, default=0) >= FOUND_COARSE:
        flags = np.zeros(mask.size // 16, np.bool_)
        coarse_tiles(wide, flags)
        coarse = torch.from_numpy(flags[: scores.numel() // 16])
    if beside:
        apart = mask[:, : width - lacking].reshape(4, rows // 4, columns).swapaxes(0, 1).reshape(rows, columns)
        result = torch.from_numpy(np.ascontiguousarray(apart))
    return result, coarse


def exact_solve(
    scores: torch.Tensor, n: int, m: int, exactly: bool, start: torch.Tensor | None, start_exponent: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.exact_solve` on CPU."""
    if m not in VECTOR_SIDES:
        return ops.reference_exact_solve(scores, n, m, exactly, start, start_exponent)
    rows, columns = scores.shape
    scores = scores.contiguous()
    tiles = (rows // m) * (columns // m)
    mask, prices, exponents = empty((rows, columns), np.bool_), empty((2, tiles, m), np.int32), empty((tiles,), np.int32)
    warm = start is not None and start_exponent is not None
    if start is not None and start_exponent is not None:
        np.copyto(prices, start.numpy())
        np.copyto(exponents, start_exponent.numpy())
    median = 2 * n == m and m in (4, 8, 16, 32)
    network = np.array([] if median else sorting_network(m), dtype=np.int64).reshape(-1, 2)
    flat, bytes_, numbers, side = scores.numpy().reshape(-1), mask.reshape(-1).view(np.uint8), prices.reshape(-1), (0,) * m

    def band(first: int, last: int) -> int:
        return int(solve_band(flat, columns, bytes_, numbers, exponents, n, int(exactly), warm, network, side, first, last))

    worst = over_bands(band, tiles, LANES, max(LANES, 16384 // (m * m)))
    if not _usable(worst, scores):
        return exact_solve(scores.abs(), n, m, exactly, start, start_exponent)
    return torch.from_numpy(mask), torch.from_numpy(prices), torch.from_numpy(exponents)


def exact_solve_integers(
    q: torch.Tensor, n: int, exactly: bool, u: torch.Tensor | None, v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.exact_solve_integers` on CPU."""
    tiles, m, _ = q.shape
    warm = u is not None and v is not None
    prices = [torch.zeros(tiles, m, dtype=torch.int64) if start is None else start.clone().contiguous() for start in (u, v)]
    mask = torch.zeros(tiles, m * m, dtype=torch.bool)
    flat = q.contiguous().view(tiles, m * m).numpy()
    arrays = mask.numpy(), prices[0].numpy(), prices[1].numpy()
    over_bands(
        lambda first, last: int(solve_integers(flat, n, exactly, warm, *arrays, first, last)), tiles, 1, max(1, 4096 // (m * m))
    )
    return mask.view(tiles, m, m), prices[0], prices[1]
