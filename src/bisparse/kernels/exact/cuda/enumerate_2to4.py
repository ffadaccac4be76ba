"""Exact 2:4-T masks on a GPU, by meeting in the middle, alone or fused with the packing of W and W^T; one thread per tile.

It uses the same integers, profiles and candidates as `enumerate_2to4` on the CPU, in the same order, and gives the same masks,
ties included. All work is in registers; a table maps the winning code to its mask. See `pack` for the packed layout.
"""

# Triton reads the source of these functions and types them itself; its tuples grow by addition only.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

import triton
import triton.language as tl

from bisparse.kernels.exact.cpu.enumerate_2to4 import COMBINATIONS, FIRST_HOLDS_0, PAIRS, TAG_BITS, TAGS, Profile
from bisparse.kernels.exact.cuda.prices import MIN_FINE_INTEGER, SMALLEST, UNBOUNDED, to_integers

__all__ = ["middle_masks", "packed_tiles"]

DOUBLED, PAIRED, FIRST, SECOND = range(4)


def _profile(profile: Profile) -> tuple[int, int, int]:
    """A profile as its kind and up to two numbers: the doubled column and the pair of single ones, or both doubled columns."""
    if isinstance(profile, str):
        return (FIRST if profile == FIRST_HOLDS_0 else SECOND, 0, 0)
    if 1 not in profile:
        first, second = (column for column in range(4) if profile[column] == 2)
        return PAIRED, first, second
    single = tuple(column for column in range(4) if profile[column] == 1)
    return DOUBLED, profile.index(2), PAIRS.index((single[0], single[1]))


_UPPER = tuple(dict.fromkeys(upper for upper, _ in COMBINATIONS))
PAIR = tl.constexpr(PAIRS)
PROFILE = tl.constexpr(tuple(_profile(profile) for profile in _UPPER))
PROFILES = tl.constexpr(len(_UPPER))
COMBINATION = tl.constexpr(tuple((_UPPER.index(upper), _UPPER.index(lower)) for upper, lower in COMBINATIONS))
MEETINGS = tl.constexpr(len(COMBINATIONS))
TAG = tl.constexpr(TAGS)
TAG_ROOM = tl.constexpr(1 << TAG_BITS)
"""Scores are multiples of this, plus a tag below it."""


@triton.jit
def half_values(first, second, untagged, EXACTLY: tl.constexpr):
    """Best value of a pair of rows within each profile; `untagged` are the scores of the second row without tags."""
    first_pairs = ()
    second_pairs = ()
    crossing = ()
    columns = ()
    for k in tl.static_range(4):
        columns = columns + (first[k] + second[k],)
    for k in tl.static_range(6):
        first_pairs = first_pairs + (first[PAIR[k][0]] + first[PAIR[k][1]],)
        second_pairs = second_pairs + (second[PAIR[k][0]] + second[PAIR[k][1]],)
        swapped = first[PAIR[k][1]] + second[PAIR[k][0]]
        crossing = crossing + (tl.maximum(first[PAIR[k][0]] + second[PAIR[k][1]], swapped),)
    values = ()
    for k in tl.static_range(PROFILES):
        if PROFILE[k][0] == 0:
            value = columns[PROFILE[k][1]] + crossing[PROFILE[k][2]]
            if not EXACTLY:  # a row may keep one only: then the doubled column is kept once
                value = tl.maximum(value, first_pairs[PROFILE[k][2]] + untagged[PROFILE[k][1]])
                value = tl.maximum(value, second_pairs[PROFILE[k][2]] + first[PROFILE[k][1]])
        elif PROFILE[k][0] == 1:
            value = columns[PROFILE[k][1]] + columns[PROFILE[k][2]]
        elif PROFILE[k][0] == 2:
            value = first_pairs[0] + second_pairs[5]
            value = tl.maximum(value, first_pairs[1] + second_pairs[4])
            value = tl.maximum(value, first_pairs[2] + second_pairs[3])
        else:
            value = second_pairs[0] + first_pairs[5]
            value = tl.maximum(value, second_pairs[1] + first_pairs[4])
            value = tl.maximum(value, second_pairs[2] + first_pairs[3])
        values = values + (value,)
    return values


@triton.jit
def best_words(scores, words, EXACTLY: tl.constexpr):
    """The best mask of 16 float32 scores as 16 bits, bit 4 * row + column, by the table of codes; and which tiles are coarse."""
    largest = scores[0].to(tl.uint32, bitcast=True)
    for k in tl.static_range(1, 16):
        largest = tl.maximum(largest, scores[k].to(tl.uint32, bitcast=True))
    bad = largest >= UNBOUNDED
    biased = tl.minimum(tl.maximum((largest >> 23).to(tl.int32), 23), 254)
    scale = ((277 - biased) << 23).to(tl.float32, bitcast=True)
    coarse = bad | ((largest > 0) & (largest < SMALLEST))
    # If more than half of sixteen scores are small, some pair has two small ones.
    least = tl.maximum(scores[0], scores[1])
    for k in tl.static_range(1, 8):
        least = tl.minimum(least, tl.maximum(scores[2 * k], scores[2 * k + 1]))
    untagged = ()
    integers = ()
    for k in tl.static_range(16):
        integer = to_integers(tl.where(bad, 0.0, scores[k]), scale).to(tl.uint32) * TAG_ROOM
        untagged = untagged + (integer,)
        integers = integers + (integer | TAG[k // 4][k % 4],)
    if tl.max((least * scale < MIN_FINE_INTEGER).to(tl.int32)) > 0:
        balance = tl.zeros_like(biased)
        for k in tl.static_range(16):
            balance += tl.where(scores[k] > 0, tl.where(untagged[k] < MIN_FINE_INTEGER * TAG_ROOM, 1, -1), 0)
        coarse = coarse | (balance > 0)
    upper = half_values(integers[0:4], integers[4:8], untagged[4:8], EXACTLY)
    lower = half_values(integers[8:12], integers[12:16], untagged[12:16], EXACTLY)
    best = upper[COMBINATION[0][0]] + lower[COMBINATION[0][1]]
    met = tl.zeros_like(biased)
    for k in tl.static_range(1, MEETINGS):
        value = upper[COMBINATION[k][0]] + lower[COMBINATION[k][1]]
        met = tl.where(value > best, k * TAG_ROOM, met)
        best = tl.maximum(value, best)
    return tl.load(words + (met | (best % TAG_ROOM).to(tl.int32))), coarse


@triton.jit
def spread_bits(bits):
    """The lowest four bits of a word as its four bytes."""
    return ((bits & 15) * 0x204081) & 0x1010101


@triton.jit
def middle_masks(
    scores, words, mask, coarse, columns, across, BLOCK: tl.constexpr, EXACTLY: tl.constexpr, MAGNITUDES: tl.constexpr
):
    """2:4-T masks of BLOCK tiles of a band of four rows; `mask` is seen as one int32 for four entries."""
    band = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    place = start * 4 + tl.arange(0, 4 * BLOCK)
    tile = start + tl.arange(0, BLOCK)
    entries = ()
    for k in tl.static_range(4):
        row = tl.load(scores + (band * 4 + k) * columns + place, mask=place < columns, other=0)
        if MAGNITUDES:
            row = tl.abs(row)
        even, odd = tl.split(tl.reshape(row, [BLOCK, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        # Adding zero turns -0.0, whose bit pattern is large, into 0.0.
        entries = entries + (first.to(tl.float32) + 0.0, second.to(tl.float32) + 0.0)
        entries = entries + (third.to(tl.float32) + 0.0, fourth.to(tl.float32) + 0.0)
    word, is_coarse = best_words(entries, words, EXACTLY)
    for k in tl.static_range(4):
        tl.store(mask + (band * 4 + k) * across + tile, spread_bits(word >> (4 * k)), mask=tile < across)
    tl.store(coarse + band * across + tile, is_coarse.to(tl.int8), mask=tile < across)


@triton.jit
def packed_group(code, a, b, c, d):
    """The two values of a group as one int32, in the slots of its positions; a slot that is not in use holds zero."""
    low = code & 3
    high = code >> 2 & 3
    first = tl.where(low < 2, tl.where(low == 0, a, b), tl.where(low == 2, c, d))
    second = tl.where(high < 2, tl.where(high == 0, a, b), tl.where(high == 2, c, d))
    first = tl.where((code & 16) != 0, first, 0)
    second = tl.where((code & 32) != 0, second, 0)
    return first | (second << 16)


@triton.jit
def packed_tiles(
    weight,
    words,
    given,
    mask,
    codes,
    codes_t,
    values,
    positions,
    values_t,
    positions_t,
    rows,
    columns,
    BLOCK: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Mask, values and positions of 8 x BLOCK tiles: 32 rows, so that values of W^T are written 32 bytes at a time.

    `given`, `mask`, `values` and `values_t` are seen as one int32 for four entries or two values. GIVEN: the mask is read.
    """
    band = tl.program_id(0) * 8 + tl.arange(0, 8)[:, None]
    start = tl.program_id(1) * BLOCK
    across = columns // 4
    tile = start + tl.arange(0, BLOCK)[None, :]
    inside = (tile < across) & (band >= 0)
    place = start * 4 + tl.arange(0, 4 * BLOCK)[None, :]
    bits = ()
    scores = ()
    kept = tl.zeros([8, BLOCK], tl.int32)
    for k in tl.static_range(4):
        row = tl.load(weight + (band * 4 + k).to(tl.int64) * columns + place, mask=place < columns, other=0)
        even, odd = tl.split(tl.reshape(row, [8, BLOCK, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        quad = (first, second, third, fourth)
        for j in tl.static_range(4):
            scores = scores + (tl.abs(quad[j].to(tl.float32)),)
            bits = bits + (quad[j].to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF,)
    if GIVEN:
        for k in tl.static_range(4):
            four = tl.load(given + (band * 4 + k).to(tl.int64) * across + tile, mask=inside, other=0)
            for j in tl.static_range(4):
                kept |= ((four >> (8 * j)) & 1) << (4 * k + j)
    else:
        kept, _ = best_words(scores, words, False)
        for k in tl.static_range(4):
            here = mask + (band * 4 + k).to(tl.int64) * across + tile
            tl.store(here, spread_bits(kept >> (4 * k)), mask=inside)
    for k in tl.static_range(16):
        kept &= tl.where(scores[k] == 0, ~(1 << k), -1)

    for k in tl.static_range(4):
        code = tl.load(codes + (kept >> (4 * k) & 15))
        pair = packed_group(code.to(tl.int32), bits[4 * k], bits[4 * k + 1], bits[4 * k + 2], bits[4 * k + 3])
        here = (band * 4 + k).to(tl.int64) * across + tile
        tl.store(values + here, pair, mask=inside)
        tl.store(positions + here, code, mask=inside)
    for j in tl.static_range(4):
        group = (kept >> j) & 1 | ((kept >> (j + 4)) & 1) << 1 | ((kept >> (j + 8)) & 1) << 2 | ((kept >> (j + 12)) & 1) << 3
        code = tl.load(codes_t + group)
        pair = packed_group(code.to(tl.int32), bits[j], bits[j + 4], bits[j + 8], bits[j + 12])
        here = (tile * 4 + j).to(tl.int64) * (rows // 4) + band
        tl.store(values_t + here, pair, mask=inside)
        tl.store(positions_t + here, code, mask=inside)
