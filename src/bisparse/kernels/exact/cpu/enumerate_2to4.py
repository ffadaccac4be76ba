"""Exact 2:4-T masks by meeting in the middle, without branches, one tile per vector lane.

A 4 x 4 tile splits into an upper and a lower pair of rows. A column profile c in {0, 1, 2}^4 with sum 4 gives the number of
entries that the upper pair may keep per column; the lower pair may keep 2 - c. Any mask that keeps at most 2 everywhere fits one
of the 19 profiles, so the optimum is the best over c of (best upper pair within c) + (best lower pair within 2 - c).

Scores are 24-bit integers, shifted left by 5: sums of eight stay below 2**32. The low bits identify the candidate of each half at
no cost: each score carries an entry of `TAGS` there, and within a combination of profiles no two pairs of candidates have equal
tag sums (of equal values the higher sum wins). Profile (1, 1, 1, 1) has six candidates, too many, and is split in two: column 0
kept in the half's first row, or in its second.

Source: the enumeration of the 90 patterns in Hu et al. (ICML 2024, arXiv 2404.01847) is the peer; the split is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic

from bisparse.kernels.exact.cpu.vectors import SMALL
from bisparse.kernels.numba_runtime.llvm import F32, I8, I32, I64, at, call_llvm, data_of, load, number, row_of, smaller, store

__all__ = [
    "FEW",
    "LANES_I32",
    "LANE_OF_TILE",
    "TAGS",
    "TAG_BITS",
    "WIDTH",
    "best_at_most_2",
    "best_exactly_2",
    "fence",
    "fetch_ahead",
    "in_order",
    "mask_bits",
    "quantiser",
    "spans_too_far",
    "store_masks",
    "store_masks_past_caches",
    "transposed",
]

WIDTH = 16 if get_host_cpu_features().get("avx512vl") else 8
"""Tiles per intrinsic: the number of 32-bit lanes in a register of this processor."""
FLOATS_A_LINE = 16
"""A line of the cache has 64 bytes."""
QUARTERS = WIDTH // 4
"""Groups of four lanes in a register."""
LANE_OF_TILE = [4 * (tile % QUARTERS) + tile // QUARTERS for tile in range(WIDTH)]
"""Transposition leaves tiles within their group of four lanes, which is cheaper; they are reordered at the end."""
LANES_I32 = ir.VectorType(I32, WIDTH)
Profile = tuple[int, int, int, int] | str
FIRST_HOLDS_0, SECOND_HOLDS_0 = "first", "second"
TAG_BITS = 5
TAGS = ((0, 0, 0, 0), (0, 1, 4, 5), (0, 0, 0, 0), (0, 2, 10, 12))
"""Low bits of the scores by row and column. Found by search with the smallest possible sums, at most 31."""
FEW = 2 * SMALL << TAG_BITS
PAIRS = tuple(itertools.combinations(range(4), 2))
FIRST_ONCE = 2
"""From this candidate on the doubled column of a profile such as (2, 1, 1, 0) is held once."""


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
    """The two rows of a profile's candidates, in the order of `_half_values`."""
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


def _candidates(profile: Profile, exactly: bool) -> range:
    """A profile's candidates by number."""
    if isinstance(profile, str):
        return range(3)
    if 1 not in profile:
        return range(1)
    return range(2) if exactly else range(4)


def _tag_sum(half: int, profile: Profile, candidate: int) -> int:
    """The low bits of a candidate's value; a score of a doubled column that is kept once has no tag."""
    kept = _half_mask(profile, candidate)
    if not isinstance(profile, str) and candidate >= FIRST_ONCE:
        kept[1][profile.index(2)] = 0
    return sum(tag for row in (0, 1) for tag, held in zip(TAGS[2 * half + row], kept[row], strict=True) if held)


@cache
def mask_bits() -> np.ndarray[Any, np.dtype[np.int32]]:
    """The mask of each code, 2**TAG_BITS * combination + sum of tags: bit 4 * row + column."""
    table = np.zeros((len(COMBINATIONS) << TAG_BITS, 16), np.int32)
    for index, (upper, lower) in enumerate(COMBINATIONS):
        for up, low in itertools.product(_candidates(upper, exactly=False), _candidates(lower, exactly=False)):
            code = (index << TAG_BITS) + _tag_sum(0, upper, up) + _tag_sum(1, lower, low)
            table[code] = np.ravel(_half_mask(upper, up) + _half_mask(lower, low))
    masks: np.ndarray[Any, np.dtype[np.int32]] = (table << np.arange(16)).sum(1, dtype=np.int32)
    return masks


def _higher(b: Any, x: Any, y: Any) -> Any:
    """Entry by entry, unsigned."""
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def _half_values(b: Any, first: list[Any], second: list[Any], untagged: list[Any], exactly: bool) -> dict[Profile, Any]:
    """Best value of a pair of rows within each profile; `untagged` are the scores of the second row without tags."""
    best = partial(reduce, partial(_higher, b))
    pair_sums = [{pair: b.add(row[pair[0]], row[pair[1]]) for pair in PAIRS} for row in (first, second)]
    columns = [b.add(first[column], second[column]) for column in range(4)]
    crossing = {(i, j): best([b.add(first[i], second[j]), b.add(first[j], second[i])]) for i, j in PAIRS}
    values: dict[Profile, Any] = {}
    for upper, _ in COMBINATIONS:
        if isinstance(upper, str):
            holder, other = pair_sums if upper == FIRST_HOLDS_0 else reversed(pair_sums)
            rest = {1: (2, 3), 2: (1, 3), 3: (1, 2)}
            values[upper] = best([b.add(holder[0, k], other[rest[k]]) for k in (1, 2, 3)])
        elif 1 not in upper:
            i, j = (column for column in range(4) if upper[column] == 2)
            values[upper] = b.add(columns[i], columns[j])
        else:
            double, i, j = _single_columns(upper)
            candidates = [b.add(columns[double], crossing[i, j])]
            if not exactly:  # a row may keep one only: then the doubled column is kept once
                candidates.append(b.add(pair_sums[0][i, j], untagged[double]))
                candidates.append(b.add(pair_sums[1][i, j], first[double]))
            values[upper] = best(candidates)
    return values


def transposed(b: Any, parts: list[Any]) -> list[Any]:
    """Four vectors of tiles of four entries as the vectors of their first to fourth entries, and back.

    The entries of a tile are in the lane of `LANE_OF_TILE`; tiles are in order.
    """

    def interleaved(x: Any, y: Any, high: bool, wide: bool) -> Any:
        """The lower or the higher half of each group of four lanes of x and of y, in turn by one lane or, `wide`, by two."""
        half = (0, 1, WIDTH, WIDTH + 1) if wide else (0, WIDTH, 1, WIDTH + 1)
        place = [4 * group + 2 * high + lane for group in range(QUARTERS) for lane in half]
        return b.shuffle_vector(x, y, ir.Constant(LANES_I32, place))

    (low, high), (low_after, high_after) = (
        [interleaved(x, y, high, wide=False) for high in (False, True)] for x, y in (parts[:2], parts[2:])
    )
    pairs = ((low, low_after), (high, high_after))
    return [interleaved(x, y, second, wide=True) for x, y in pairs for second in (False, True)]


def _columns(b: Any, scores: Any, offset: Any) -> list[Any]:
    """The four columns of one row of `WIDTH` tiles, lanes in the order of `LANE_OF_TILE`."""
    return transposed(b, [load(b, scores, at(b, offset, WIDTH * k), F32, WIDTH) for k in range(4)])


def quantiser(b: Any, scores: Any, offset: Any, stride: Any) -> tuple[list[Any], Any, Any]:
    """The 16 scores of `WIDTH` tiles as floats, the bit pattern of each tile's largest, and the scale that makes it 24 bits."""
    floats = [column for row in range(4) for column in _columns(b, scores, row_of(b, offset, stride, row))]
    bits = [b.bitcast(x, LANES_I32) for x in floats]
    largest = reduce(partial(_higher, b), bits)
    biased = b.lshr(largest, number(I32, WIDTH, 23))
    scale = b.shl(b.sub(number(I32, WIDTH, 277), biased), number(I32, WIDTH, 23))
    # Below 2**-103 a tile counts as coarse, and its scale might overflow: with scale 0 its scores are detected as small.
    scale = b.select(b.icmp_signed(">", biased, number(I32, WIDTH, 23)), scale, number(I32, WIDTH, 0))
    return floats, largest, b.bitcast(scale, ir.VectorType(F32, WIDTH))


def _tagged(b: Any, scores: Any, tag: int) -> Any:
    """Scores with room for tags, and their tag in it: one instruction where there is a shift that fills up."""
    fill, places = number(I32, WIDTH, tag << (32 - TAG_BITS)), number(I32, WIDTH, TAG_BITS)
    return call_llvm(b, f"llvm.fshl.v{WIDTH}i32", LANES_I32, [scores, fill, places]) if tag else b.shl(scores, places)


def _best_of(b: Any, values: list[Any]) -> tuple[Any, Any]:
    """The largest of an even number of values, and 2**TAG_BITS times the index of its first occurrence."""
    best, first, where = None, None, number(I32, WIDTH, 0)
    for index in range(0, len(values), 2):
        value = _higher(b, *values[index : index + 2])
        if best is None:
            best, first = value, values[index]
            continue
        better = b.icmp_unsigned(">", value, best)
        best = _higher(b, value, best)
        first = b.select(better, values[index], first)
        where = b.select(better, number(I32, WIDTH, index << TAG_BITS), where)
    second = b.select(b.icmp_unsigned("!=", first, best), number(I32, WIDTH, 1 << TAG_BITS), number(I32, WIDTH, 0))
    return best, b.or_(where, second)


def _best_mask(exactly: bool) -> Callable[..., Any]:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        scores, codes, extremes = (data_of(context, b, signature, args, k) for k in (0, 3, 5))
        floats, largest, scale = quantiser(b, scores, args[1], args[2])
        integers = [call_llvm(b, f"llvm.lrint.v{WIDTH}i32.v{WIDTH}f32", LANES_I32, [b.fmul(x, scale)]) for x in floats]
        q = [_tagged(b, x, tag) for x, tag in zip(integers, itertools.chain(*TAGS), strict=True)]
        untagged = [_tagged(b, x, 0) for x in integers]
        zero, width = ir.Constant(I64, 0), ir.Constant(I64, WIDTH)
        pairs = [b.add(q[row + column], q[row + 4 + column]) for row in (0, 8) for column in range(4)]
        store(b, reduce(partial(smaller, b), pairs, load(b, extremes, zero, I32, WIDTH)), extremes, zero)
        store(b, _higher(b, largest, load(b, extremes, width, I32, WIDTH)), extremes, width)
        upper = _half_values(b, q[0:4], q[4:8], untagged[4:8], exactly)
        lower = _half_values(b, q[8:12], q[12:16], untagged[12:16], exactly)
        values = [b.add(upper[up], lower[low]) for up, low in COMBINATIONS]
        best, where = _best_of(b, values)
        code = b.or_(where, b.and_(best, number(I32, WIDTH, (1 << TAG_BITS) - 1)))
        store(b, in_order(b, code), codes, args[4])
        return context.get_dummy_value()

    def typing(context: Any, scores: Any, offset: Any, stride: Any, codes: Any, place: Any, extremes: Any) -> tuple[Any, Any]:
        return types.void(scores, types.intp, types.intp, codes, types.intp, extremes), codegen

    return typing


def in_order(b: Any, lanes: Any) -> Any:
    """Lanes in the order of `LANE_OF_TILE` as tiles in order."""
    return b.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), ir.Constant(LANES_I32, LANE_OF_TILE))


@intrinsic
def best_at_most_2(typing: Any, scores: Any, offset: Any, stride: Any, codes: Any, place: Any, extremes: Any) -> Any:
    """Write the codes of the best masks of `WIDTH` tiles to `codes`, and update `extremes` (int32, 2 * `WIDTH`).

    `extremes` holds per lane, over all calls, the least sum of two scores in one column of a pair of rows, and the largest bit
    pattern. Where no such sum is below `FEW`, at least half of each tile's scores are `SMALL` or more.
    """
    return _best_mask(exactly=False)(typing, scores, offset, stride, codes, place, extremes)


@intrinsic
def best_exactly_2(typing: Any, scores: Any, offset: Any, stride: Any, codes: Any, place: Any, extremes: Any) -> Any:
    """`best_at_most_2`, with every row and column keeping exactly 2."""
    return _best_mask(exactly=True)(typing, scores, offset, stride, codes, place, extremes)


@intrinsic
def fetch_ahead(typing: Any, scores: Any, offset: Any, stride: Any) -> Any:
    """Prefetch `WIDTH` tiles; addresses outside the array are harmless."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source = data_of(context, b, signature, args, 0)
        read, keep, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        for row in range(4):
            for line in range(4 * WIDTH // FLOATS_A_LINE):
                place = b.gep(source, [at(b, row_of(b, args[1], args[2], row), line * FLOATS_A_LINE)])
                address = b.bitcast(place, I8.as_pointer())
                call_llvm(b, "llvm.prefetch.p0i8", ir.VoidType(), [address, read, keep, data])
        return context.get_dummy_value()

    return types.void(scores, types.intp, types.intp), codegen


@intrinsic
def fetch_to_write(typing: Any, mask: Any, offset: Any, stride: Any) -> Any:
    """Prefetch the cache lines of `WIDTH` tiles' masks for writing."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        target = b.bitcast(data_of(context, b, signature, args, 0), I8.as_pointer())
        write, keep, data = (ir.Constant(I32, number) for number in (1, 3, 1))
        for row in range(4):
            place = b.gep(target, [row_of(b, args[1], args[2], row)])
            call_llvm(b, "llvm.prefetch.p0i8", ir.VoidType(), [place, write, keep, data])
        return context.get_dummy_value()

    return types.void(mask, types.intp, types.intp), codegen


@intrinsic
def spans_too_far(typing: Any, scores: Any, offset: Any, stride: Any, flags: Any, place: Any) -> Any:
    """Whether over half of a tile's non-zero quantised scores are below `SMALL`, or all below 2**-103; per tile, as int32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (data_of(context, b, signature, args, k) for k in (0, 3))
        floats, largest, scale = quantiser(b, source, args[1], args[2])
        zero, one, minus = (number(I32, WIDTH, k) for k in (0, 1, -1))
        limit = ir.Constant(ir.VectorType(F32, WIDTH), [SMALL - 0.5] * WIDTH)
        few = zero
        for x in floats:
            vote = b.select(b.fcmp_ordered("<", b.fmul(x, scale), limit), one, minus)
            few = b.add(few, b.select(b.icmp_signed("==", b.bitcast(x, LANES_I32), zero), zero, vote))
        tiny = b.icmp_unsigned("<", largest, number(I32, WIDTH, 24 << 23))
        coarse = b.and_(b.icmp_signed("!=", largest, zero), b.or_(tiny, b.icmp_signed(">", few, zero)))
        store(b, in_order(b, b.zext(coarse, LANES_I32)), target, args[4])
        return context.get_dummy_value()

    return types.void(scores, types.intp, types.intp, flags, types.intp), codegen


def _store_masks(past_caches: bool) -> Callable[..., Any]:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (data_of(context, b, signature, args, k) for k in (0, 2))
        count = 4 * WIDTH
        octets = b.bitcast(load(b, source, args[1], I32, WIDTH), ir.VectorType(I8, count))
        for row in range(4):
            place = [lane // 4 * 4 + row // 2 for lane in range(count)]
            repeated = b.shuffle_vector(octets, octets, ir.Constant(ir.VectorType(I32, count), place))
            bit = ir.Constant(ir.VectorType(I8, count), [1 << (row % 2 * 4 + lane % 4) for lane in range(count)])
            kept = b.zext(b.icmp_unsigned("!=", b.and_(repeated, bit), number(I8, count, 0)), ir.VectorType(I8, count))
            written = store(b, b.bitcast(kept, LANES_I32), target, row_of(b, args[3], args[4], row))
            if past_caches:
                written.align = count
                written.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    def typing(context: Any, bits: Any, place: Any, mask: Any, offset: Any, stride: Any) -> tuple[Any, Any]:
        return types.void(bits, types.intp, mask, types.intp, types.intp), codegen

    return typing


@intrinsic
def store_masks(typing: Any, bits: Any, place: Any, mask: Any, offset: Any, stride: Any) -> Any:
    """Write `WIDTH` adjacent masks of 16 bits each as one byte per entry."""
    return _store_masks(past_caches=False)(typing, bits, place, mask, offset, stride)


@intrinsic
def store_masks_past_caches(typing: Any, bits: Any, place: Any, mask: Any, offset: Any, stride: Any) -> Any:
    """`store_masks` by non-temporal stores, to addresses that 4 * `WIDTH` divides; see `fence`."""
    return _store_masks(past_caches=True)(typing, bits, place, mask, offset, stride)


@intrinsic
def fence(typing: Any) -> Any:
    """Make all previous stores visible to other threads."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
