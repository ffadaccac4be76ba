"""The score that each division of eight columns into two groups of four keeps, on CPU, for many pairs of groups at once.

Eight columns have 35 such divisions. Each group of four consists of two of the 28 sorted column pairs, and its best n entries are
sums and maxima of at most three numbers: 16 rows take some 450 vector instructions.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bisparse.kernels.numba_runtime.cache import cached_njit
from bisparse.kernels.numba_runtime.llvm import F32, I64, at, data_of, load, store
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands

__all__ = ["DIVISIONS", "LANES", "best_divisions"]

LANES = 16
"""Rows per vector; the number of rows must be a multiple."""
PAIRS = tuple(combinations(range(8), 2))
DIVISIONS = tuple((0, *rest, *(k for k in range(1, 8) if k not in rest)) for rest in combinations(range(1, 8), 3))
"""The columns of the first group of four, then those of the second; the identity is first."""
MIN_WORK_PER_THREAD = 1 << 16


@intrinsic
def _add_kept(typing: Any, columns: Any, places: Any, row: Any, kept: Any, n: Any) -> Any:
    """Add to kept[division, lane] what each division of columns at eight places keeps of 16 rows; n is a tuple's length."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, place, target = (data_of(context, b, signature, args, k) for k in (0, 1, 3))
        vectors = [load(b, source, b.add(b.load(b.gep(place, [ir.Constant(I64, k)])), args[2]), F32, LANES) for k in range(8)]

        def most(x: Any, y: Any) -> Any:
            return b.select(b.fcmp_ordered(">", x, y), x, y)

        def least(x: Any, y: Any) -> Any:
            return b.select(b.fcmp_ordered("<", x, y), x, y)

        high = {(i, j): most(vectors[i], vectors[j]) for i, j in PAIRS}
        low = {(i, j): least(vectors[i], vectors[j]) for i, j in PAIRS} if n.count == 3 else {}
        both = {(i, j): b.fadd(vectors[i], vectors[j]) for i, j in PAIRS}

        def of_four(one: tuple[int, int], other: tuple[int, int]) -> Any:
            if n.count == 1:
                return most(high[one], high[other])
            if n.count == 2:
                return most(most(both[one], both[other]), b.fadd(high[one], high[other]))
            return b.fsub(b.fadd(both[one], both[other]), least(low[one], low[other]))

        zero = ir.Constant(I64, 0)
        for index, d in enumerate(DIVISIONS):
            value = b.fadd(of_four((d[0], d[1]), (d[2], d[3])), of_four((d[4], d[5]), (d[6], d[7])))
            offset = at(b, zero, index * LANES)
            store(b, b.fadd(load(b, target, offset, F32, LANES), value), target, offset)
        return context.get_dummy_value()

    return types.void(columns, places, types.intp, kept, n), codegen


@cached_njit(from_python=False)
def divide_band(columns, rows, members, pairs, gains, choices, least, n, first, last):  # type: ignore[no-untyped-def]
    """The gain of the best division over the current one, and that division, for the pairs from first to last."""
    places = np.empty(8, np.int64)
    kept = np.empty(35 * LANES, np.float32)
    for p in range(first, last):
        for k in range(8):
            places[k] = members[pairs[p, k // 4], k % 4] * rows
        kept[:] = 0
        for row in range(0, rows, LANES):
            _add_kept(columns, places, row, kept, n)
        best, now, most = 0, np.float64(0), np.float64(0)
        for division in range(35):
            value = np.float64(0)
            for lane in range(LANES):
                value += kept[division * LANES + lane]
            if division == 0:
                now = value
            if value > most:
                best, most = division, value
        gains[p] = most - now if most - now > least * now else 0.0
        choices[p] = best


@cache
def divide_kernel(n: int) -> Kernel:
    """`divide_band` for n kept of four.

    Arguments: columns, members, pairs, gains, choices, least; columns, rows, stripes, pairs.
    """
    kept = (0,) * n

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        columns, members, pairs, gains, choices, least, count, rows, stripes, number = array_at(arguments, (10,), np.int64)
        divide_band(
            array_at(columns, (count * rows,), np.float32),
            rows,
            array_at(members, (stripes, 4), np.int64),
            array_at(pairs, (number, 2), np.int64),
            array_at(gains, (number,), np.float64),
            array_at(choices, (number,), np.int64),
            array_at(least, (1,), np.float64)[0],
            kept,
            first,
            last,
        )
        return 1

    return kernel(entry)


def best_divisions(
    columns: Float[Tensor, "C R"], members: Int[Tensor, "S 4"], pairs: Int[Tensor, "P 2"], n: int, least: float
) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
    """The gain of the best of `DIVISIONS` over the current one, and its index, per pair of stripes.

    Args:
        columns: the scores' transpose, float32; `LANES` divides R.
        members: the columns of each stripe. pairs: of stripes. Both int64.
        n: kept of four, 1 to 3.
        least: a gain below this fraction of a pair's kept score counts as zero.
    """
    columns, members, pairs = columns.contiguous(), members.contiguous(), pairs.contiguous()
    gains = torch.zeros(len(pairs), dtype=torch.float64, device="cpu")
    choices = torch.zeros(len(pairs), dtype=torch.int64, device="cpu")
    smallest = torch.tensor([least], dtype=torch.float64, device="cpu")
    (count, rows), stripes, number = columns.shape, len(members), len(pairs)
    arguments = columns, members, pairs, gains, choices, smallest, count, rows, stripes, number
    over_bands(divide_kernel(n), arguments, number, 1, max(1, MIN_WORK_PER_THREAD // max(rows, 1)))
    return gains, choices
