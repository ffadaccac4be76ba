"""The exact solver for any M, any N and 64-bit scores, one tile at a time: `reference` in numba, by loops."""

from __future__ import annotations

from functools import cache

import numpy as np

from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel

__all__ = ["integers_kernel"]

ALTERNATIONS = 4
UNREACHED = np.int64(1) << 62


@cached_njit(from_python=False)
def midpoint_of_line(q, line, stride, other, n, top):  # type: ignore[no-untyped-def]
    """Midpoint of the n-th and the next largest of q - other along a line; `top` is scratch for n + 1 numbers."""
    held = 0
    for k in range(other.shape[0]):
        value = q[line + k * stride] - other[k]
        if held > n and value <= top[n]:
            continue
        place = min(held, n)
        while place > 0 and top[place - 1] < value:
            top[place] = top[place - 1]
            place -= 1
        top[place] = value
        held = min(held + 1, n + 1)
    return (top[n - 1] + top[n]) >> 1


@cached_njit(from_python=False)
def augment(q, row_stride, column_stride, x, u, v, row_kept, column_kept, n, free, near, origin, final):  # type: ignore[no-untyped-def]
    """Shortest augmenting paths from rows that keep too few and columns that keep too many, until there are none.

    `near`, `origin` and `final` hold 2 M numbers, rows before columns.
    """
    m = u.shape[0]
    while True:
        found = False
        for k in range(2 * m):
            near[k] = UNREACHED
            final[k] = UNREACHED
            origin[k] = -1
        for i in range(m):
            if row_kept[i] < n and (free or u[i] > 0):
                near[i] = 0
                found = True
            if column_kept[i] > n:
                near[m + i] = 0
                found = True
        if not found:
            return
        ground, ground_row = UNREACHED, -1
        while True:
            node = 0
            for k in range(1, 2 * m):
                if near[k] < near[node]:
                    node = k
            distance = near[node]
            if distance >= ground:
                distance, node = ground, ground_row
                break
            if node < m:
                if row_kept[node] > n:
                    break
                if not free and distance + u[node] < ground:
                    ground, ground_row = distance + u[node], node
            elif column_kept[node - m] < n:
                break
            near[node] = UNREACHED
            final[node] = distance
            if node < m:
                for j in range(m):
                    at = node * row_stride + j * column_stride
                    reached = distance + u[node] + v[j] - q[at]
                    if not x[at] and final[m + j] == UNREACHED and reached < near[m + j]:
                        near[m + j] = reached
                        origin[m + j] = node
            else:
                column = node - m
                for i in range(m):
                    at = i * row_stride + column * column_stride
                    reached = distance - u[i] - v[column] + q[at]
                    if x[at] and final[i] == UNREACHED and reached < near[i]:
                        near[i] = reached
                        origin[i] = node
        for k in range(m):
            u[k] -= max(0, distance - final[k])
            v[k] += max(0, distance - final[m + k])
        if node < m:
            row_kept[node] -= 1
        else:
            column_kept[node - m] += 1
        while origin[node] >= 0:
            previous = origin[node]
            row, column = (node, previous - m) if node < m else (previous, node - m)
            at = row * row_stride + column * column_stride
            x[at] = not x[at]
            node = previous
        if node < m:
            row_kept[node] += 1
        else:
            column_kept[node - m] -= 1


@cached_njit(from_python=False)
def solve_integers(q, n, free, warm, x, u, v, first, last):  # type: ignore[no-untyped-def]
    """Solve tiles first..last of q (B, M * M) into x (B, M * M) and the prices u, v (B, M), which hold the start if warm."""
    m = u.shape[1]
    top = np.empty(n + 1, np.int64)
    near, origin, final = np.empty(2 * m, np.int64), np.empty(2 * m, np.int64), np.empty(2 * m, np.int64)
    row_kept, column_kept = np.empty(m, np.int64), np.empty(m, np.int64)
    for t in range(first, last):
        if not warm:
            v[t, :] = 0
        for _ in range(ALTERNATIONS):
            for i in range(m):
                price = midpoint_of_line(q[t], i * m, 1, v[t], n, top)
                u[t, i] = price if free else max(price, 0)
            for j in range(m):
                price = midpoint_of_line(q[t], j, m, u[t], n, top)
                v[t, j] = price if free else max(price, 0)
        row_kept[:] = 0
        column_kept[:] = 0
        for i in range(m):
            for j in range(m):
                keep = q[t, i * m + j] > u[t, i] + v[t, j]
                x[t, i * m + j] = keep
                row_kept[i] += keep
                column_kept[j] += keep
        for i in range(m):  # ties: lowest row first, then lowest column, while there is room
            for j in range(m):
                if row_kept[i] < n and column_kept[j] < n and q[t, i * m + j] == u[t, i] + v[t, j] and not x[t, i * m + j]:
                    x[t, i * m + j] = True
                    row_kept[i] += 1
                    column_kept[j] += 1
        augment(q[t], m, 1, x[t], u[t], v[t], row_kept, column_kept, n, free, near, origin, final)
        if not free:
            augment(q[t], 1, m, x[t], v[t], u[t], column_kept, row_kept, n, free, near, origin, final)


@cache
def integers_kernel() -> Kernel:
    """`solve_integers`. Arguments: q, x, u, v; tiles, M, n, exactly, warm."""

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        q, x, u, v, tiles, m, n, exactly, warm = array_at(arguments, (9,), np.int64)
        solve_integers(
            array_at(q, (tiles, m * m), np.int64),
            n,
            exactly != 0,
            warm != 0,
            array_at(x, (tiles, m * m), np.bool_),
            array_at(u, (tiles, m), np.int64),
            array_at(v, (tiles, m), np.int64),
            first,
            last,
        )
        return 1

    return kernel(entry)
