"""The compiled kernel: each row by itself, so that a row's columns stay in the L1 cache.

Plain torch takes some twenty small operators per group of columns.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands

__all__ = ["prune_columns"]

MIN_UPDATES_PER_THREAD = 1 << 16
NOT_FINITE = 1


def prune_columns(weight: Tensor, upper: Tensor, mask: Tensor, scores: Tensor, columns: slice, n: int, m: int) -> Tensor | None:
    """See `bisparse.kernels.column_sweep.dispatch.prune_columns`."""
    rows, count = weight.shape[0], columns.stop - columns.start
    errors = torch.empty(rows, count, dtype=torch.float32, device="cpu")
    tensors = (weight, upper, mask, scores, errors)
    assert all(one.is_contiguous() for one in tensors)
    numbers = (weight.shape[1], columns.start, columns.stop, n, m)
    flags = over_bands(_sweep_kernel(), (*tensors, *numbers), rows, 1, max(1, MIN_UPDATES_PER_THREAD // max(1, count * count)))
    return None if flags & NOT_FINITE else errors


@cache
def _sweep_kernel() -> Kernel:
    def sweep_rows(arguments, first, last):  # type: ignore[no-untyped-def]
        weight, upper, mask, scores, errors, width, start, stop, n, m = array_at(arguments, (10,), np.int64)
        flags = 0
        factor = array_at(upper, (stop, width), np.float32)
        for row in range(first, last):
            values = array_at(weight + 4 * width * row, (stop,), np.float32)
            kept = array_at(mask + width * row, (stop,), np.bool_)
            costs = array_at(scores + 4 * width * row, (stop,), np.float32)
            own = array_at(errors + 4 * (stop - start) * row, (stop - start,), np.float32)
            for group in range(start, stop, m):
                end = min(group + m, stop)
                for column in range(group, end):
                    diagonal = factor[column, column]
                    costs[column] = values[column] * values[column] / (diagonal * diagonal)
                    if not costs[column] < np.float32(np.inf):
                        flags = NOT_FINITE
                    kept[column] = False
                for _ in range(min(n, end - group)):
                    best = -1
                    for column in range(group, end):
                        if not kept[column] and (best < 0 or costs[column] > costs[best]):
                            best = column
                    kept[best] = True
                for column in range(group, end):
                    if kept[column]:
                        own[column - start] = np.float32(0.0)
                        continue
                    error = values[column] / factor[column, column]
                    own[column - start] = error
                    values[column] = np.float32(0.0)
                    for later in range(column + 1, stop):
                        values[later] -= error * factor[column, later]
        return 1 + flags

    return kernel(sweep_rows)
