"""Balancing one tile on CPU: ties first, then shortest augmenting paths, rows and columns of the mask held as bits.

Scratch memory of a tile of side M, `work` (int32): q and its transpose, M * M each; then, rows before columns, M each:
tentative distance, final distance, predecessor, number kept. `bits` (int64): rows, columns, ties by row, columns by room.
Cost: a path visits few nodes, since the prices are nearly right; a visit is two or three vector operations.
"""

from __future__ import annotations

import numpy as np

from bisparse.kernels.exact.cpu import search
from bisparse.kernels.exact.cpu import vectors as vec
from bisparse.kernels.exact.cpu.search import FAR
from bisparse.kernels.numba_runtime.cache import cached_njit

__all__ = ["repair"]

LIMIT = FAR // 2
"""Maximum total change of a tile's prices. They start within 2**25."""


@cached_njit(from_python=False)
def augment(work, bits, prices, u, v, n, free, flip, side):  # type: ignore[no-untyped-def]
    """Dijkstra on reduced costs from rows that keep too few and columns that keep too many, until there are none.

    Returns False once prices have moved by `LIMIT` in total: then sums might overflow 32 bits.
    `flip` does the same on the transposed tile; u is then the offset of the column prices.
    """
    vec.never_inline()
    m = len(side)
    row, column = (m, 0) if flip else (0, m)
    q, transposed = (m * m, 0) if flip else (0, m * m)
    near_row, near_column = 2 * m * m + row, 2 * m * m + column
    final_row, final_column = near_row + 2 * m, near_column + 2 * m
    origin_row, origin_column = near_row + 4 * m, near_column + 4 * m
    kept_row, kept_column = near_row + 6 * m, near_column + 6 * m
    spent = np.int64(0)
    while True:
        sources = search.start_search(work, near_row, final_row, origin_row, kept_row, prices, u, free, n, side)
        sources |= search.start_search_surplus(work, near_column, final_column, origin_column, kept_column, n, side)
        if sources == 0:
            return True
        rows_done, columns_done = np.int64(0), np.int64(0)
        ground, ground_row = FAR, -1
        while True:
            packed = search.nearest(work, near_row, near_column, side)
            distance, node = packed >> 8, packed & 255
            if distance >= ground:
                distance, node = ground, ground_row
                break
            if node < m:
                if work[kept_row + node] > n:
                    break
                price = np.int64(prices[u + node])
                if not free and distance + price < ground:
                    ground, ground_row = distance + price, node
                rows_done |= np.int64(1) << node
                work[near_row + node], work[final_row + node] = FAR, distance
                allowed = ~(bits[row + node] | columns_done)
                search.relax(
                    work, q + node * m, distance + price, 1, prices, v, near_column, origin_column, allowed, node, side
                )  # fmt: skip
            else:
                node -= m
                if work[kept_column + node] < n:
                    node += m
                    break
                columns_done |= np.int64(1) << node
                work[near_column + node], work[final_column + node] = FAR, distance
                allowed = bits[column + node] & ~rows_done
                search.relax(
                    work, transposed + node * m, distance - prices[v + node], -1, prices, u, near_row, origin_row, allowed,
                    node, side,
                )  # fmt: skip
        spent += distance
        if spent >= LIMIT:
            return False
        search.shift_prices(prices, u, work, final_row, distance, -1, side)
        search.shift_prices(prices, v, work, final_column, distance, 1, side)
        in_rows = node < m
        node = node if in_rows else node - m
        if in_rows:
            work[kept_row + node] -= 1
        else:
            work[kept_column + node] += 1
        while True:
            previous = work[origin_row + node] if in_rows else work[origin_column + node]
            if previous < 0:
                break
            i, j = (node, np.int64(previous)) if in_rows else (np.int64(previous), node)
            bits[row + i] ^= np.int64(1) << j
            bits[column + j] ^= np.int64(1) << i
            node, in_rows = np.int64(previous), not in_rows
        if in_rows:
            work[kept_row + node] += 1
        else:
            work[kept_column + node] -= 1


@cached_njit(from_python=False)
def fill_ties(bits, work, kept_row, kept_column, n, side):  # type: ignore[no-untyped-def]
    """Keep entries at reduced cost zero, row by row, in the columns with the most room left, of those the lowest first.

    On a constant tile this is the Gale-Ryser construction and leaves nothing to repair.
    """
    vec.never_inline()
    m = len(side)
    rooms = 3 * m  # bits[rooms + k]: the columns with room for k more
    for k in range(rooms, rooms + n + 1):
        bits[k] = 0
    for j in range(m):
        room = n - work[kept_column + j]
        if room > 0:
            bits[rooms + room] |= np.int64(1) << j
    for i in range(m):
        need = n - work[kept_row + i]
        room = n
        while need > 0 and room > 0:
            candidates = bits[2 * m + i] & bits[rooms + room]
            moved = np.int64(0)
            while candidates != 0 and need > 0:
                lowest = candidates & -candidates
                candidates ^= lowest
                moved |= lowest
                need -= 1
                work[kept_row + i] += 1
                work[kept_column + search.lowest_bit(lowest)] += 1
            bits[i] |= moved
            bits[2 * m + i] &= ~moved
            bits[rooms + room] ^= moved
            bits[rooms + room - 1] |= moved
            room -= 1


@cached_njit(from_python=False)
def repair(scores, base, stride, scale, prices, u, v, n, free, mask, bits, work, side):  # type: ignore[no-untyped-def]
    """Balance one tile; `bits` holds the rows of its mask and `work` the kept counts, as `tile_mask` left them."""
    vec.never_inline()
    m = len(side)
    kept_row, kept_column = 2 * m * m + 6 * m, 2 * m * m + 7 * m
    tied = np.int64(0)
    for i in range(m):
        equal = search.row_integers(scores, base + i * stride, scale, prices, u + i, v, work, i * m, side)
        bits[2 * m + i] = equal
        tied |= equal
    if tied != 0:
        fill_ties(bits, work, kept_row, kept_column, n, side)
    search.column_bits(bits, 0, m, side)
    if m >= 8:
        for i in range(0, m, 8):
            for j in range(0, m, 8):
                vec.transpose_8x8(work, i * m + j, m, work, m * m + j * m + i, m)
    else:
        for i in range(m):
            for j in range(m):
                work[m * m + j * m + i] = work[i * m + j]
    solved = augment(work, bits, prices, u, v, n, free, False, side)
    if not free and solved:
        solved = augment(work, bits, prices, v, u, n, free, True, side)
    for i in range(m):
        vec.store_row(mask, base + i * stride, bits[i], side)
    return solved
