"""The assignment problem: rows to columns one to one, for the most total gain.

Guarantee: optimal. Cost: O(n^3). Hungarian method with shortest augmenting paths; ties are broken by the lowest index.
Source: Jonker and Volgenant, "A shortest augmenting path algorithm", Computing 38 (1987).
Departure: without their initial reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["assign"]


def assign(gain: NDArray[np.float64]) -> NDArray[np.int64]:
    """The assignment of most total gain, for a square finite table: entry i is the column of row i.

    >>> assign(np.array([[3.0, 2.0], [3.0, 0.0]])).tolist()
    [1, 0]
    """
    if gain.ndim != 2 or gain.shape[0] != gain.shape[1] or not np.isfinite(gain).all():
        raise ValueError(f"assign needs a square table of finite gains, not one of shape {gain.shape}")
    if not gain.size:
        return np.empty(0, dtype=np.int64)
    columns: NDArray[np.int64] = _compiled()(np.ascontiguousarray(gain.max() - gain, dtype=np.float64))
    return columns


@cache
def _compiled() -> Callable[[Any], Any]:
    # Imported at the first call: numba is slow to load.
    from numba import njit

    compiled: Callable[[Any], Any] = njit(cache=True, nogil=True)(_shortest_paths)
    return compiled


def _shortest_paths(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    n = cost.shape[0]
    # Row and column numbers are 1-based, 0 = none; column 0 stands for the row to be placed.
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, dtype=np.int64)
    came_from = np.zeros(n + 1, dtype=np.int64)
    for row in range(1, n + 1):
        row_of[0] = row
        column = 0
        shortest = np.full(n + 1, np.inf)
        visited = np.zeros(n + 1, dtype=np.bool_)
        while True:
            visited[column] = True
            at = row_of[column]
            step = np.inf
            following = 0
            for j in range(1, n + 1):
                if not visited[j]:
                    reduced = cost[at - 1, j - 1] - u[at] - v[j]
                    if reduced < shortest[j]:
                        shortest[j] = reduced
                        came_from[j] = column
                    if shortest[j] < step:
                        step = shortest[j]
                        following = j
            for j in range(n + 1):
                if visited[j]:
                    u[row_of[j]] += step
                    v[j] -= step
                else:
                    shortest[j] -= step
            column = following
            if row_of[column] == 0:
                break
        while column:
            previous = came_from[column]
            row_of[column] = row_of[previous]
            column = previous
    result = np.empty(n, dtype=np.int64)
    for j in range(1, n + 1):
        result[row_of[j] - 1] = j - 1
    return result
