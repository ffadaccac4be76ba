"""One pass each: the score kept, the gap of a certificate, optimal groups, pruning in place, groups that break a pattern.

Plain torch takes a pass over memory per operation, 10 to 50 ns per weight in all; these take 1 to 2. Every function returns
None where its kernel does not apply: another device or dtype, sides that M does not divide, prices beyond 2**48, or so few
weights that compiling the kernel would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Real, Shaped
from torch import Tensor

__all__ = ["all_optimal", "broken_groups", "kept_and_total", "priced_gap", "prune_in_place"]

MIN_WEIGHTS = 1 << 19
"""Fewer are left to torch."""
LANES = 16
LARGEST_PRICE = 1 << 48
"""The sum of two prices is then exact in float64, and the sum of 128 of them, each times up to 64, in int64."""
MAX_EXPONENT = 1000
"""Powers of two up to this one have an inverse in float64."""


def kept_and_total(scores: Real[Tensor, "..."], mask: Bool[Tensor, "..."]) -> tuple[float, float] | None:
    """Sum of the kept scores and of all, added up in float64."""
    if not (_fits(scores) and scores.is_contiguous() and mask.is_contiguous()):
        return None
    kept, total = _sums_kernel()(scores.numpy().reshape(-1), _bytes(mask).reshape(-1))
    return float(kept), float(total)


def priced_gap(
    scores: Real[Tensor, "B O I"],
    mask: Bool[Tensor, "B O I"],
    u: Int[Tensor, "T M"],
    v: Int[Tensor, "T M"],
    exponent: Int[Tensor, " T"],
    n: int,
    exactly: bool,
) -> float | None:
    """What `bisparse.gap.tiles_gap` computes, from float32 scores."""
    m = u.shape[1]
    if not _fits(scores, m) or scores.shape[1] % m or not mask.is_contiguous() or any(side.is_cuda for side in (u, v, exponent)):
        return None
    prices = (side.long().contiguous().numpy() for side in (u, v, exponent))
    gap = _gap_kernel()(_matrix(scores.numpy()), _matrix(_bytes(mask)), *prices, n, exactly, (0,) * m)
    return None if gap < 0 else float(gap)


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
    if bits is None or matrices.numel() < MIN_WEIGHTS or not matrices.is_contiguous() or matrices.shape[1] % m:
        return None
    if matrices.shape[2] % m:
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
def _gap_kernel() -> Callable[..., Any]:
    def gap(scores, mask, u, v, exponent, n, exactly, side):  # type: ignore[no-untyped-def]
        m = len(side)
        across = scores.shape[1] // m
        entries, lacking, columns = np.empty(m), np.empty(m, np.int64), np.empty(m)
        bits = np.empty(1, np.int64)
        as_float = bits.view(np.float64)
        total = 0.0
        for tile in range(len(exponent)):
            row, column = tile // across * m, tile % across * m
            if not 0 <= exponent[tile] < MAX_EXPONENT:
                return -1.0
            bits[0] = (1023 + exponent[tile]) << 52
            scale = as_float[0]
            lines = np.int64(0)
            for j in range(m):
                price = v[tile, j]
                if not -LARGEST_PRICE <= price <= LARGEST_PRICE:
                    return -1.0
                columns[j] = price if exactly or price > 0 else 0
                entries[j], lacking[j] = 0.0, n
            for i in range(m):
                price = u[tile, i]
                if not -LARGEST_PRICE <= price <= LARGEST_PRICE:
                    return -1.0
                if not exactly and price < 0:
                    price = np.int64(0)
                left = np.int64(n)
                for j in range(m):
                    kept = mask[row + i, column + j] != 0
                    slack = np.float64(scores[row + i, column + j]) * scale - (np.float64(price) + columns[j])
                    term = -slack if kept else slack
                    entries[j] += 0.0 if term <= 0 else term  # NaN is added, and found below
                    lacking[j] -= kept
                    left -= kept
                lines += price * left
            for j in range(m):
                lines += np.int64(columns[j]) * lacking[j]
            whole = np.float64(lines) + entries.sum()
            if whole != whole:
                return -1.0
            if whole > 0:
                total += whole / scale
        return total

    return _njit(gap)


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
