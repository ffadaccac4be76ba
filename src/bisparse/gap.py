"""How far a mask is from the best one: the arithmetic of `Solution`, in bands of bounded memory. Nothing here calls a solver.

For any prices u (rows) and v (columns) of a tile with scores w, LP duality bounds the value of every feasible mask, ::

    bound(u, v) = N sum(u) + N sum(v) + sum_ij max(0, w_ij - u_i - v_j)

(u, v >= 0 for "at most N", free for "exactly N"). The difference between the bound and the value of a mask x is a sum of terms ::

    gap = sum_i u_i (N - row_i(x)) + sum_j v_j (N - column_j(x))
        + sum_kept max(0, u_i + v_j - w_ij) + sum_pruned max(0, w_ij - u_i - v_j)

none of them negative where x is feasible. Summed in this form nothing cancels: each term and so the sum has a relative error of
about 1e-15 of the gap itself, and it is zero only where every term is.

Tensors of tiles have the tile as the last dimension: (M, M, T).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor

from bisparse.tiles import pad_to_multiple

__all__ = ["Failure", "Prices", "bands_of_tiles", "first_true", "flat_bands", "kept_total", "tile_failure", "tiles_gap"]

BAND = 1 << 16
"""Weights that are processed at a time."""
FAST_BITS, FINE_BITS = 24, 52
"""Bits of a quantised score: at least as many are needed for a proof, and at most as many fit its arithmetic."""
EXPONENTS = 1200
LARGEST_PRICE = 1 << 61
LOW_BITS = 30
HUGE = 2.0**960
"""Sums of float64 scores from here on might overflow."""


class Prices(NamedTuple):
    """Of rows and columns, (B, M) each, and the exponents (B,): units of ``2**-exponent``."""

    u: Int[Tensor, "B M"]
    v: Int[Tensor, "B M"]
    exponent: Int[Tensor, " B"]


class Failure(NamedTuple):
    """The tile where a proof fails, and the reason."""

    tile: int
    reason: str


def kept_total(scores: Real[Tensor, "..."], mask: Bool[Tensor, "..."] | None) -> tuple[float, int]:
    """Sum of the kept scores, or of all, as (s, k): s * 2**k. In float64; k is 0 unless that would overflow."""
    for power in (0, 100):
        total = 0.0
        for band, kept in flat_bands(scores, mask):
            numbers = band.double() if kept is None else torch.where(kept, band, 0).double()
            total += float((numbers * 2.0**-power if power else numbers).sum())
        if math.isfinite(total):
            break
    return total, power


def flat_bands(scores: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scores, and their mask, in parts of about `BAND` entries."""
    if scores.numel() <= BAND or scores.ndim == 0:
        yield scores, mask
    elif scores.shape[0] == 1:
        yield from flat_bands(scores[0], None if mask is None else mask[0])
    else:
        step = max(1, BAND * scores.shape[0] // scores.numel())
        for start in range(0, scores.shape[0], step):
            part = slice(start, start + step)
            yield from flat_bands(scores[part], None if mask is None else mask[part])


def bands_of_tiles(shape: torch.Size, m: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """Matrices, rows and tiles of one band after the other, for matrices (B, O, I) that are cut into tiles of m rows."""
    matrices, rows, columns = shape
    across, down = -(-columns // width), -(-rows // m)
    if matrices * rows * columns == 0:
        return
    high = max(1, BAND // (across * width * m))  # bands of tiles at a time
    if high >= down:
        step = max(1, high // down)
        for start in range(0, matrices, step):
            end = min(start + step, matrices)
            yield slice(start, end), slice(0, rows), slice(start * down * across, end * down * across)
        return
    for matrix in range(matrices):
        for start in range(0, down, high):
            end = min(start + high, down)
            first = matrix * down
            yield slice(matrix, matrix + 1), slice(start * m, end * m), slice((first + start) * across, (first + end) * across)


def _tiles_last(matrices: Shaped[Tensor, "B O I"], m: int) -> Shaped[Tensor, "M M T"]:
    batch, rows, columns = matrices.shape
    if rows % m or columns % m:
        matrices = pad_to_multiple(matrices, m)
        rows, columns = matrices.shape[1:]
    return matrices.reshape(batch, rows // m, m, columns // m, m).permute(2, 4, 0, 1, 3).reshape(m, m, -1)


class _Band(NamedTuple):
    """Tiles side by side."""

    first: int
    scores: Real[Tensor, "M M T"]
    mask: Bool[Tensor, "M M T"]
    inside: Bool[Tensor, "M M T"] | None
    """Where there are scores; None: everywhere."""
    prices: Prices
    """u and v int64, (M, T)."""


def _priced_bands(scores: Tensor, mask: Tensor, prices: Prices, m: int) -> Iterator[_Band]:
    ragged = bool(scores.shape[-1] % m or scores.shape[-2] % m)
    for matrices, rows, tiles in bands_of_tiles(scores.shape, m, m):
        part = scores[matrices, rows]
        u, v, exponent = (side[tiles].to(scores.device).long() for side in prices)
        inside = _tiles_last(torch.ones_like(part, dtype=torch.bool), m) if ragged else None
        yield _Band(
            tiles.start,
            _tiles_last(part, m),
            _tiles_last(mask[matrices, rows], m),
            inside,
            Prices(u.t().contiguous(), v.t().contiguous(), exponent),
        )


def _power_of_two(exponent: Int[Tensor, " T"]) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Two factors of 2**exponent: it may leave the range of float64. By their bits, since pow on a GPU need not be exact."""
    half = exponent // 2
    first, second = (((1023 + power) << 52).view(torch.float64) for power in (half, exponent - half))
    return first, second


def _times_power(numbers: Float[Tensor, "M M T"], exponent: Int[Tensor, " T"]) -> Float[Tensor, "M M T"]:
    if not bool((exponent != 0).any()):
        return numbers
    first, second = _power_of_two(exponent)
    if bool((exponent.abs() < 1000).all()):
        return numbers * (first * second)
    return numbers * first * second


def _slack(band: _Band, rounded: bool) -> Float[Tensor, "M M T"]:
    """Score less prices of every entry, correctly rounded, so that its sign is exact.

    In units of 2**-exponent, of scores rounded to whole numbers; or, of scores as they are, of ``_unit``.
    """
    scores, (u, v, exponent) = band.scores, band.prices
    priced = u[:, None] + v[None]
    if scores.is_floating_point():
        numbers = scores.double()
        if rounded:
            return _times_power(numbers, exponent).round() - priced  # not in place: these may be the caller's numbers
        return _times_power(numbers, exponent.clamp(min=0)) - _times_power(priced.double(), (-exponent).clamp(min=0))
    shift = (-exponent).clamp(min=0)
    if not bool(shift.any()):
        return (scores.long() - priced).double()
    whole = scores.long() >> shift
    rest = scores.long() - (whole << shift)
    if rounded:
        half = (1 << shift) >> 1
        whole += (rest > half) | ((rest == half) & (whole & 1 == 1) & (shift > 0))
        return (whole - priced).double()
    return (whole - priced).double() * (1 << shift).double() + rest.double()


def _exact_sum(prices: Int[Tensor, "M T"], lacking: Int[Tensor, "M T"]) -> Float[Tensor, " T"]:
    """Sum of price * lacking over lines, correctly rounded: zero only where it is."""
    high = ((prices >> LOW_BITS) * lacking).sum(0)
    low = ((prices & ((1 << LOW_BITS) - 1)) * lacking).sum(0)
    high, low = high + (low >> LOW_BITS), low & ((1 << LOW_BITS) - 1)
    return high.double() * 2.0**LOW_BITS + low.double()


def _terms(band: _Band, n: int, exactly: bool, rounded: bool) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Per tile, the terms of its entries, and the terms of its rows and columns in units of 2**-exponent."""
    u, v, exponent = band.prices
    if not exactly:
        u, v = u.clamp(min=0), v.clamp(min=0)
        band = band._replace(prices=Prices(u, v, exponent))
    slack, mask = _slack(band, rounded), band.mask
    if exactly and band.inside is not None:
        # A tile over the edge keeps the rest of its N in the padding, where scores are zero: where prices ask for it, and where
        # u + v = 0, which adds nothing to the sum over lines.
        mask = mask | (~band.inside & (slack > 0))
    lines = _exact_sum(u, n - mask.sum(1)) + _exact_sum(v, n - mask.sum(0))
    return torch.where(mask, slack.neg(), slack).clamp_(min=0).sum((0, 1)), lines


def tiles_gap(scores: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], prices: Prices, n: int, m: int, exactly: bool) -> float:
    """The difference between the prices' bound and the mask's value, for the scores as given, in score units.

    Negative prices count as zero for "at most N", where they prove nothing.

    Raises:
        ValueError: prices or exponents out of range, or scores that are no numbers.
    """
    total = 0.0
    for band in _priced_bands(scores, mask, prices, m):
        if failure := _out_of_range(band):
            raise ValueError(f"tile {failure.tile}: {failure.reason}")
        exponent = band.prices.exponent
        entries, lines = _terms(band, n, exactly, rounded=False)
        lines = _times_power(lines, (-exponent).clamp(min=0))
        total += float(_times_power((entries + lines).clamp(min=0), -exponent.clamp(min=0)).sum())
    if math.isnan(total):
        raise ValueError("the scores or prices hold NaN or numbers beyond float64: there is no gap to speak of")
    return total


def tile_failure(
    scores: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], prices: Prices, n: int, m: int, exactly: bool
) -> Failure | None:
    """The first tile whose mask the prices do not prove optimal for its rounded scores; None where all are proved.

    Every term is a whole number and its sign is exact.
    """
    for band in _priced_bands(scores, mask, prices, m):
        failure = _out_of_range(band) or _unfit_exponent(band)
        if failure:
            return failure
        if exactly:
            sums_hold = (band.mask.sum(1) == n).all(0) & (band.mask.sum(0) == n).all(0)
            if band.inside is not None:
                sums_hold |= ~band.inside.flatten(0, 1).all(0)
            if (tile := first_true(~sums_hold)) is not None:
                return Failure(band.first + tile, f"a row or column does not keep exactly {n}")
        entries, lines = _terms(band, n, exactly, rounded=True)
        fails = (entries != 0) | (lines != 0)
        if not exactly:
            fails |= (band.prices.u < 0).any(0) | (band.prices.v < 0).any(0)
        if (tile := first_true(fails)) is not None:
            return Failure(band.first + tile, _story(band, tile, n))
    return None


def first_true(fails: Bool[Tensor, " T"]) -> int | None:
    """The index of the first True; None without one."""
    return int(fails.nonzero()[0]) if bool(fails.any()) else None


def _out_of_range(band: _Band) -> Failure | None:
    u, v, exponent = band.prices
    far = ((u < -LARGEST_PRICE) | (u > LARGEST_PRICE) | (v < -LARGEST_PRICE) | (v > LARGEST_PRICE)).any(0)
    if (tile := first_true(far)) is not None:
        return Failure(band.first + tile, "prices beyond 2**61 overflow: not proved optimal")
    low, high = (-EXPONENTS, EXPONENTS) if band.scores.is_floating_point() else (-62, 0)
    if (tile := first_true((exponent < low) | (exponent > high))) is not None:
        return Failure(band.first + tile, f"exponent {int(exponent[tile])} fits no score: not proved optimal")
    return None


def _unfit_exponent(band: _Band) -> Failure | None:
    """Invalid scores, and exponents that round them more coarsely than a proof allows or so finely that sums overflow."""
    scores, exponent = band.scores, band.prices.exponent
    least, largest = scores.flatten(0, 1).amin(0), scores.flatten(0, 1).amax(0)
    if (tile := first_true(~((least >= 0) & (largest < math.inf)))) is not None:
        return Failure(band.first + tile, "its scores are not all finite and >= 0: nothing is proved about them")
    if scores.is_floating_point():
        # frexp writes a number as f * 2**k, 1/2 <= f < 1.
        bits = torch.frexp(largest.double()).exponent.long() + exponent
        coarse, least_bits = bits < FAST_BITS, FAST_BITS
    else:
        bits = torch.frexp((largest.long() >> 12).double()).exponent.long() + 12
        coarse, least_bits = (exponent < 0) & (bits + exponent < FINE_BITS), FINE_BITS
        bits = torch.where(largest.long() >> FINE_BITS > 0, bits + exponent, 0)
    if (tile := first_true(coarse & (largest > 0))) is not None:
        return Failure(
            band.first + tile, f"exponent {int(exponent[tile])} rounds the scores more coarsely than {least_bits} bits"
        )
    if (tile := first_true((bits > FINE_BITS) & (largest > 0))) is not None:
        return Failure(
            band.first + tile, f"exponent {int(exponent[tile])} makes scores of more than {FINE_BITS} bits: not proved optimal"
        )
    return None


def _story(band: _Band, tile: int, n: int) -> str:
    """The value of the mask and the bound by the prices, in Python integers."""
    one = _Band(
        0, band.scores[..., tile : tile + 1], band.mask, None, Prices(*(side[..., tile : tile + 1] for side in band.prices))
    )
    u, v = one.prices.u[:, 0].tolist(), one.prices.v[:, 0].tolist()
    free = one._replace(prices=Prices(torch.zeros_like(one.prices.u), torch.zeros_like(one.prices.v), one.prices.exponent))
    q = [[int(number) for number in row] for row in _slack(free, rounded=True)[..., 0].tolist()]
    side = range(len(u))
    kept = sum(q[i][j] for i in side for j in side if band.mask[i, j, tile])
    bound = n * (sum(u) + sum(v)) + sum(max(0, q[i][j] - u[i] - v[j]) for i in side for j in side)
    negative = " with negative prices" if min(*u, *v) < 0 else ""
    return (
        f"the mask keeps {kept}, the prices bound the optimum by {bound}{negative} "
        f"(units of 2**-{int(one.prices.exponent[0])}): not proved optimal"
    )
