"""One pass each: magnitudes, a certificate's gap, the score kept, thresholds, optimal groups, pruning, broken groups.

Plain torch takes a pass over memory per operation, 10 to 50 ns per weight in all; these take 1 to 2. Every function returns
None where its kernel does not apply: another device or dtype, sides that M does not divide, M above 64, prices beyond 2**40, or
so few weights that compiling the kernel would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Real, Shaped
from torch import Tensor

__all__ = [
    "add_digits",
    "all_optimal",
    "broken_groups",
    "keep_above",
    "keep_largest_of_all",
    "kept_and_total",
    "magnitudes",
    "priced_figures",
    "prune_in_place",
]

MIN_WEIGHTS = 1 << 19
"""Fewer are left to torch."""
LANES = 16
WIDTH = 512
"""Columns that are processed at a time."""
LARGEST_PRICE = 1 << 40
"""All sums of prices in a tile of at most 64 x 64 are then exact in float64."""
INFINITE = 0x7F800000
"""The bits of the infinite float32; those of NaN are larger."""
LARGEST_M = 64
"""Larger groups are left to torch: sums of prices might not be exact, and the kernels count in 8 bits."""
MAX_EXPONENT = 1000
"""Powers of two up to this one have an inverse in float64."""


def kept_and_total(scores: Real[Tensor, "..."], mask: Bool[Tensor, "..."]) -> tuple[float, float] | None:
    """Sum of the kept scores and of all, added up in float64."""
    if not (_fits(scores) and scores.is_contiguous() and mask.is_contiguous()):
        return None
    kept, total = _sums_kernel()(scores.numpy().reshape(-1), _bytes(mask).reshape(-1))
    return float(kept), float(total)


def priced_figures(
    scores: Real[Tensor, "B O I"],
    mask: Bool[Tensor, "B O I"],
    u: Int[Tensor, "T M"],
    v: Int[Tensor, "T M"],
    exponent: Int[Tensor, " T"],
    n: int,
    exactly: bool,
) -> tuple[float, float, float] | None:
    """What `bisparse.gap.tiles_gap` and `kept_and_total` compute, in one pass: gap, sum of the kept scores, sum of all."""
    m = u.shape[1]
    if not _fits(scores, m) or scores.shape[1] % m or not mask.is_contiguous() or any(side.is_cuda for side in (u, v, exponent)):
        return None
    dtype = torch.int32 if all(one.dtype == torch.int32 for one in (u, v, exponent)) else torch.int64
    prices = (one.to(dtype).contiguous().numpy() for one in (u, v, exponent))
    gap, kept, total = _figures_kernel()(_matrix(scores.numpy()), _matrix(_bytes(mask)), *prices, n, exactly, m)
    return None if gap < 0 else (float(gap), float(kept), float(total))


def magnitudes(weight: Shaped[Tensor, "..."]) -> tuple[Tensor, bool] | None:
    """Magnitudes of a bfloat16 or float32 weight as float32, and whether all are finite."""
    bits = _bits(weight) if weight.dtype in (torch.bfloat16, torch.float32) else None
    if bits is None or weight.numel() < MIN_WEIGHTS:
        return None
    scores = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    largest = _magnitudes_kernel()(bits, scores.view(-1).numpy().view(np.uint32), _sign(bits), 32 - 8 * bits.itemsize)
    return scores, int(largest) < INFINITE


def add_digits(scores: Real[Tensor, " S"], shift: int, prefix: int, histogram: Int[Tensor, " D"]) -> bool | None:
    """Count, by the byte above the lowest `shift` bits, the float32 scores >= 0 whose bits above that byte are `prefix`."""
    if not _fits(scores) or histogram.dtype != torch.int64 or not histogram.is_contiguous():
        return None
    _digits_kernel()(scores.numpy().view(np.uint32), np.uint32(shift), np.uint32(prefix), histogram.numpy())
    return True


def keep_above(scores: Real[Tensor, " S"], price: float, ties: int) -> tuple[Bool[Tensor, " S"], int, float] | None:
    """Which scores exceed a price or are among the first `ties` that equal it; how many of these are left, and the excess."""
    if not _fits(scores) or not math.isfinite(price):
        return None
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    left, excess = _above_kernel()(scores.numpy(), np.float32(price), ties, _bytes(mask))
    return mask, int(left), float(excess)


def keep_largest_of_all(scores: Real[Tensor, " S"], kept: int) -> Bool[Tensor, " S"] | None:
    """The largest of all float32 scores >= 0, of equal ones the first, by a threshold that is found byte by byte."""
    if not _fits(scores) or not 0 < kept <= len(scores):
        return None
    prefix, wanted = 0, kept
    for shift in (24, 16, 8, 0):
        histogram = torch.zeros(256, dtype=torch.int64, device="cpu")
        add_digits(scores, shift, prefix, histogram)
        at_least = histogram.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1
        wanted -= int(at_least[digit] - histogram[digit])
        prefix = prefix << 8 | digit
    found = keep_above(scores, float(np.uint32(prefix).view(np.float32)), wanted)
    return None if found is None else found[0]


def all_optimal(scores: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], n: int, m: int) -> bool | None:
    """Whether every group of a plain N:M mask keeps the largest scores, as many as it may, of float32 scores."""
    if not _fits(scores, m) or not mask.is_contiguous():
        return None
    return bool(_groups_kernel()(_matrix(scores.numpy()), _matrix(_bytes(mask)), n, (0,) * m))


def prune_in_place(weight: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> int | None:
    """Set the weights outside the mask to zero; returns how many of the rest are not zero."""
    bits = _bits(weight)
    if bits is None or weight.numel() < MIN_WEIGHTS or not (weight.is_contiguous() and mask.is_contiguous()):
        return None
    return int(_prune_kernel()(bits, _bytes(mask).reshape(-1), _sign(bits)))


def broken_groups(matrices: Shaped[Tensor, "B R C"], n: int, m: int) -> tuple[int, int, int] | None:
    """How many groups of rows, and of columns, hold more than N entries that are not zero; and how many such entries there are.

    Matrices of bool, float16, bfloat16, float32 or float64. A NaN is not zero, -0.0 is.
    """
    bits = _bits(matrices)
    if bits is None or matrices.numel() < MIN_WEIGHTS or not matrices.is_contiguous() or m > LARGEST_M:
        return None
    if matrices.shape[1] % m or matrices.shape[2] % m:
        return None
    rows, columns, kept = _broken_kernel()(bits.reshape(-1, matrices.shape[-1]), n, _sign(bits), (0,) * m)
    return int(rows), int(columns), int(kept)


def _fits(scores: Tensor, m: int = 1) -> bool:
    return (
        type(scores) is Tensor  # subclasses need not hold plain memory
        and scores.device.type == "cpu"
        and scores.dtype == torch.float32
        and scores.numel() >= MIN_WEIGHTS
        and scores.is_contiguous()
        and m <= LARGEST_M
        and scores.shape[-1] % m == 0
    )


def _matrix(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.reshape(-1, array.shape[-1])


def _bytes(mask: Tensor) -> np.ndarray[Any, Any]:
    return mask.view(torch.uint8).numpy()


def _bits(weight: Tensor) -> np.ndarray[Any, Any] | None:
    """The entries as unsigned integers, in one dimension."""
    sizes = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
    size = sizes.get(weight.dtype)
    if size is None or type(weight) is not Tensor or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    return weight.reshape(-1).view(torch.uint8).numpy().view(f"u{size}")


def _sign(bits: np.ndarray[Any, Any]) -> Any:
    """The largest number without the sign bit; of a bool, all bits."""
    size = 8 * bits.itemsize
    return bits.dtype.type((1 << size) - 1 if size == 8 else (1 << (size - 1)) - 1)


def _njit(function: Callable[..., Any]) -> Callable[..., Any]:
    from bisparse.kernels.numba_runtime.cache import cached_njit

    return cached_njit()(function)  # type: ignore[no-any-return]


@cache
def _sums_kernel() -> Callable[..., Any]:
    def sums(scores, mask):  # type: ignore[no-untyped-def]
        kept, total = np.zeros(LANES), np.zeros(LANES)
        whole = len(scores) - len(scores) % LANES
        for start in range(0, whole, LANES):
            for k in range(LANES):
                score = np.float64(scores[start + k])
                total[k] += score
                kept[k] += score if mask[start + k] else 0.0
        for k in range(whole, len(scores)):
            total[0] += scores[k]
            kept[0] += scores[k] if mask[k] else 0.0
        return kept.sum(), total.sum()

    return _njit(sums)


@cache
def _figures_kernel() -> Callable[..., Any]:
    def figures(scores, mask, u, v, exponent, n, exactly, m):  # type: ignore[no-untyped-def]
        # Prices and their sums are whole numbers below 2**53, so float64 is exact, and one loop over columns serves all M.
        # Compiled for each M, a pattern's first figures took a second longer, and all of them as long or longer from M = 8 on.
        columns = scores.shape[1]
        across, width = columns // m, WIDTH // m * m
        row_price, column_price, scale = np.empty(width), np.empty(width), np.empty(width)
        lines, entries = np.empty(width), np.empty(width)
        kept, total, gap = np.zeros(width), np.zeros(width), 0.0
        bits = np.empty(1, np.int64)
        as_float = bits.view(np.float64)
        for first in range(0, columns, width):
            count = min(width, columns - first)
            for band in range(scores.shape[0] // m):
                tile = band * across + first // m
                for t in range(count // m):
                    if not 0 <= exponent[tile + t] < MAX_EXPONENT:
                        return -1.0, 0.0, 0.0
                    bits[0] = np.int64(1023 + exponent[tile + t]) << 52
                    for j in range(m):
                        price = v[tile + t, j]
                        if not -LARGEST_PRICE <= price <= LARGEST_PRICE:
                            return -1.0, 0.0, 0.0
                        scale[t * m + j] = as_float[0]
                        column_price[t * m + j] = price if exactly or price > 0 else 0
                for c in range(count):
                    lines[c], entries[c] = 0.0, 0.0
                for i in range(m):
                    for t in range(count // m):
                        price = u[tile + t, i]
                        if not -LARGEST_PRICE <= price <= LARGEST_PRICE:
                            return -1.0, 0.0, 0.0
                        for j in range(m):
                            row_price[t * m + j] = price if exactly or price > 0 else 0
                    row, chosen = scores[band * m + i, first : first + count], mask[band * m + i, first : first + count]
                    for c in range(count):
                        score, price = np.float64(row[c]), row_price[c] + column_price[c]
                        slack = score * scale[c] - price
                        term = -slack if chosen[c] != 0 else slack
                        entries[c] += 0.0 if term <= 0 else term  # NaN is added, and found below
                        lines[c] += price if chosen[c] != 0 else 0.0
                        total[c] += score
                        kept[c] += score if chosen[c] != 0 else 0.0
                for t in range(count // m):
                    prices, paid, excess = 0.0, 0.0, 0.0
                    for j in range(m):
                        price = u[tile + t, j]
                        prices += column_price[t * m + j] + (price if exactly or price > 0 else 0)
                        paid += lines[t * m + j]
                        excess += entries[t * m + j]
                    whole = n * prices - paid + excess
                    if whole != whole:
                        return -1.0, 0.0, 0.0
                    if whole > 0:
                        gap += whole / scale[t * m]
        return gap, kept.sum(), total.sum()

    return _njit(figures)


@cache
def _magnitudes_kernel() -> Callable[..., Any]:
    def magnitudes(bits, scores, magnitude, shift):  # type: ignore[no-untyped-def]
        largest = np.uint32(0)
        for k in range(len(bits)):
            score = np.uint32(np.uint32(bits[k] & magnitude) << shift)
            scores[k] = score
            largest = max(largest, score)
        return largest

    return _njit(magnitudes)


@cache
def _digits_kernel() -> Callable[..., Any]:
    def digits(bits, shift, prefix, histogram):  # type: ignore[no-untyped-def]
        # In turn, since one count cannot be raised again at once; what is not counted has a place too, instead of a branch. Two
        # shifts, as one by all 32 bits is undefined.
        apart = np.zeros((4, 257), np.int64)
        for k in range(len(bits)):
            high = (bits[k] & np.uint32(0x7FFFFFFF)) >> shift
            apart[k & 3, high & np.uint32(255) if high >> np.uint32(8) == prefix else np.uint32(256)] += 1
        for digit in range(256):
            for turn in range(4):
                histogram[digit] += apart[turn, digit]

    return _njit(digits)


@cache
def _above_kernel() -> Callable[..., Any]:
    def above(scores, price, ties, mask):  # type: ignore[no-untyped-def]
        excess, whole = np.zeros(LANES), len(scores) - len(scores) % LANES
        for start in range(0, whole, LANES):
            equal = 0
            for k in range(LANES):
                score = scores[start + k]
                mask[start + k] = score > price
                equal += score == price
                excess[k] += np.float64(max(score, price)) - np.float64(price)
            if equal and ties > 0:
                for k in range(start, start + LANES):
                    if scores[k] == price and ties > 0:
                        mask[k], ties = 1, ties - 1
        for k in range(whole, len(scores)):
            kept = scores[k] > price
            if scores[k] == price and ties > 0:
                kept, ties = True, ties - 1
            mask[k] = kept
            excess[0] += np.float64(max(scores[k], price)) - np.float64(price)
        return ties, excess.sum()

    return _njit(above)


@cache
def _groups_kernel() -> Callable[..., Any]:
    def groups(scores, mask, n, side):  # type: ignore[no-untyped-def]
        m = len(side)
        poor = 0
        for row in range(scores.shape[0]):
            for start in range(0, scores.shape[1], m):
                least, most, kept = np.inf, 0.0, 0
                for k in range(m):
                    score = scores[row, start + k]
                    if mask[row, start + k]:
                        kept += 1
                        least = score if score < least else least
                    else:
                        most = score if score > most else most
                poor += most > 0 if kept < n else least < most
        return poor == 0

    return _njit(groups)


@cache
def _prune_kernel() -> Callable[..., Any]:
    def prune(bits, mask, magnitude):  # type: ignore[no-untyped-def]
        kept = 0
        for k in range(len(bits)):
            number = bits[k] if mask[k] else bits[k] ^ bits[k]
            bits[k] = number
            kept += (number & magnitude) != 0
        return kept

    return _njit(prune)


@cache
def _broken_kernel() -> Callable[..., Any]:
    def broken(bits, n, magnitude, side):  # type: ignore[no-untyped-def]
        m = len(side)
        columns = bits.shape[1]
        heights = np.empty(columns, np.uint8)
        by_row, by_column, kept = 0, 0, 0
        for band in range(0, bits.shape[0], m):
            heights[:] = 0
            for row in range(band, band + m):
                for start in range(0, columns, m):
                    count = 0
                    for k in range(m):
                        count += (bits[row, start + k] & magnitude) != 0
                    by_row += count > n
                    kept += count
                for k in range(columns):
                    heights[k] += (bits[row, k] & magnitude) != 0
            for k in range(columns):
                by_column += heights[k] > n
        return by_row, by_column, kept

    return _njit(broken)
