"""Exact 2:4-T masks by meeting in the middle, without branches: one tile a lane.

A 4 x 4 tile splits into an upper and a lower pair of rows. A column profile c in {0, 1, 2}^4 with sum 4 says how much of
each column's room of 2 the upper pair may take; the lower pair gets 2 - c. Any mask that keeps at most 2 everywhere fits
one of the 19 profiles, so the optimum is the best over c of (best upper pair within c) + (best lower pair within 2 - c).

Scores are 24-bit integers, shifted left by 4: sums of eight stay below 2**31, and the low bits record which of up to four
candidates won in each half (of equal values the higher code wins). Profile (1, 1, 1, 1) has six candidates and is split in
two: the half's first row holds column 0, or its second does.

Source: the enumeration of the 90 patterns in Hu et al. (ICML 2024, arXiv 2404.01847) is the peer; the split is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bisparse.kernels.vectors import SMALL

__all__ = ["best_at_most_2", "best_exactly_2", "larger_unsigned", "mask_rows"]

I32 = ir.IntType(32)
Profile = tuple[int, int, int, int] | str
FIRST_HOLDS_0, SECOND_HOLDS_0 = "first", "second"
PAIRS = tuple(itertools.combinations(range(4), 2))


def _combinations() -> tuple[tuple[Profile, Profile], ...]:
    doubled = [
        ((a, b, c, d), (2 - a, 2 - b, 2 - c, 2 - d))
        for a, b, c, d in itertools.product(range(3), repeat=4)
        if a + b + c + d == 4 and (a, b, c, d) != (1, 1, 1, 1)
    ]
    halves = (FIRST_HOLDS_0, SECOND_HOLDS_0)
    return (*doubled, *((upper, lower) for upper in halves for lower in halves))


COMBINATIONS = _combinations()
"""Profile of the upper pair and of the lower pair: 18, and 2 x 2 for (1, 1, 1, 1)."""


def _single_columns(profile: Profile) -> tuple[int, int, int]:
    """The doubled column and the two single ones of a profile such as (2, 1, 1, 0)."""
    first, second = (column for column in range(4) if profile[column] == 1)
    return next(column for column in range(4) if profile[column] == 2), first, second


def _half_mask(profile: Profile, candidate: int) -> list[list[int]]:
    """The two rows that a candidate of a profile keeps; the same order as in `_half_values`."""
    rows = [[0] * 4, [0] * 4]
    if isinstance(profile, str):
        partner = candidate + 1
        holder = 0 if profile == FIRST_HOLDS_0 else 1
        for column in range(4):
            rows[holder if column in (0, partner) else 1 - holder][column] = 1
    elif 1 not in profile:
        rows = [[count // 2 for count in profile] for _ in range(2)]
    else:
        double, b, c = _single_columns(profile)
        kept = (
            ((double, b), (double, c)),
            ((double, c), (double, b)),
            ((b, c), (double,)),
            ((double,), (b, c)),
        )[candidate]
        rows = [[int(column in row) for column in range(4)] for row in kept]
    return rows


@cache
def mask_rows() -> np.ndarray[Any, np.dtype[np.uint32]]:
    """The four rows, as 4 mask bytes each, of each code 16 * combination + 4 * lower + upper candidate: (4, codes)."""
    table = np.zeros((len(COMBINATIONS) * 16, 4, 4), np.uint8)
    for index, (upper, lower) in enumerate(COMBINATIONS):
        for low, up in itertools.product(range(4), repeat=2):
            if 3 in (low, up) and (isinstance(upper, str)):
                continue  # six candidates make two profiles of three
            table[16 * index + 4 * low + up] = _half_mask(upper, up) + _half_mask(lower, low)
    return np.ascontiguousarray(table.reshape(-1, 16).view(np.uint32).T)


def _half_values(b: Any, first: list[Any], second: list[Any], code: int, exactly: bool) -> dict[Profile, Any]:
    """Best value of a pair of rows within each profile; the winning candidate times `code` is in the low bits."""

    def tag(value: Any, candidate: int) -> Any:
        return b.add(value, ir.Constant(I32, candidate * code))

    def best(*values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            result = b.select(b.icmp_signed(">", value, result), value, result)
        return result

    pair_sums = [{pair: b.add(row[pair[0]], row[pair[1]]) for pair in PAIRS} for row in (first, second)]
    columns = [b.add(first[column], second[column]) for column in range(4)]
    swapped = [tag(second[column], 1) for column in range(4)]
    lone_second, lone_first = [tag(x, 2) for x in second], [tag(x, 3) for x in first]
    crossing = {(i, j): best(b.add(first[i], second[j]), b.add(first[j], swapped[i])) for i, j in PAIRS}
    values: dict[Profile, Any] = {}
    for upper, _ in COMBINATIONS:
        if isinstance(upper, str):
            holder, other = pair_sums if upper == FIRST_HOLDS_0 else reversed(pair_sums)
            rest = {1: (2, 3), 2: (1, 3), 3: (1, 2)}
            values[upper] = best(*(tag(b.add(holder[0, k], other[rest[k]]), k - 1) for k in (1, 2, 3)))
        elif 1 not in upper:
            i, j = (column for column in range(4) if upper[column] == 2)
            values[upper] = b.add(columns[i], columns[j])
        else:
            double, i, j = _single_columns(upper)
            candidates = [b.add(columns[double], crossing[i, j])]
            if not exactly:  # a row may keep one only: then the doubled column is held once
                candidates.append(b.add(pair_sums[0][i, j], lone_second[double]))
                candidates.append(b.add(pair_sums[1][i, j], lone_first[double]))
            values[upper] = best(*candidates)
    return values


def _best_mask(exactly: bool) -> Callable[..., Any]:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        floats = [b.extract_value(args[0], k) for k in range(16)]
        bits = [b.bitcast(x, I32) for x in floats]
        largest = bits[0]
        for other in bits[1:]:
            largest = b.select(b.icmp_unsigned(">", largest, other), largest, other)
        biased = b.lshr(largest, ir.Constant(I32, 23))
        floor = ir.Constant(I32, 23)  # below 2**-104 the scale would overflow; such a tile counts as coarse
        biased = b.select(b.icmp_signed(">", biased, floor), biased, floor)
        scale = b.bitcast(b.shl(b.sub(ir.Constant(I32, 277), biased), ir.Constant(I32, 23)), ir.FloatType())
        rint = b.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        limit = ir.Constant(I32, SMALL)
        small, q = ir.Constant(I32, 0), []
        for x in floats:
            integer = b.fptosi(b.call(rint, [b.fmul(x, scale)]), I32)
            small = b.add(small, b.select(b.icmp_signed("<", integer, limit), integer, limit))
            q.append(b.shl(integer, ir.Constant(I32, 4)))
        upper = _half_values(b, q[0:4], q[4:8], 1, exactly)
        lower = _half_values(b, q[8:12], q[12:16], 4, exactly)
        best, where = None, ir.Constant(I32, 0)
        for index, (up, low) in enumerate(COMBINATIONS):
            value = b.add(upper[up], lower[low])
            if best is None:
                best = value
                continue
            better = b.icmp_signed(">", value, best)
            best = b.select(better, value, best)
            where = b.select(better, ir.Constant(I32, 16 * index), where)
        code = b.or_(where, b.and_(best, ir.Constant(I32, 15)))
        return context.make_tuple(b, signature.return_type, [code, small, largest])

    def typing(context: Any, scores: Any) -> tuple[Any, Any]:
        return types.UniTuple(types.int32, 3)(types.UniTuple(types.float32, 16)), codegen

    return typing


@intrinsic
def larger_unsigned(typing: Any, x: Any, y: Any) -> Any:
    """The larger of two bit patterns, read as unsigned."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.select(b.icmp_unsigned(">", args[0], args[1]), args[0], args[1])

    return types.int32(types.int32, types.int32), codegen


@intrinsic
def best_at_most_2(typing: Any, scores: Any) -> Any:
    """(code of the best mask, sum of min(q, SMALL), largest bit pattern) of a tile's 16 scores."""
    return _best_mask(exactly=False)(typing, scores)


@intrinsic
def best_exactly_2(typing: Any, scores: Any) -> Any:
    """`best_at_most_2`, with every row and column keeping exactly 2."""
    return _best_mask(exactly=True)(typing, scores)
