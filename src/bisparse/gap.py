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

from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured
from bisparse.tiles import pad_to_multiple

__all__ = ["Failure", "Prices", "kept_total", "selection_failure", "selection_gap", "tile_failure", "tiles_gap"]

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


# The value


def kept_total(scores: Real[Tensor, "..."], mask: Bool[Tensor, "..."] | None) -> tuple[float, int]:
    """Sum of the kept scores, or of all, as (s, k): s * 2**k. In float64; k is 0 unless that would overflow."""
    for power in (0, 100):
        total = 0.0
        for band, kept in _flat_bands(scores, mask):
            numbers = band.double() if kept is None else torch.where(kept, band, 0).double()
            total += float((numbers * 2.0**-power if power else numbers).sum())
        if math.isfinite(total):
            break
    return total, power


def _flat_bands(scores: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    if scores.numel() <= BAND or scores.ndim == 0:
        yield scores, mask
    elif scores.shape[0] == 1:
        yield from _flat_bands(scores[0], None if mask is None else mask[0])
    else:
        step = max(1, BAND * scores.shape[0] // scores.numel())
        for start in range(0, scores.shape[0], step):
            part = slice(start, start + step)
            yield from _flat_bands(scores[part], None if mask is None else mask[part])


# Tiles with prices


def _bands(shape: torch.Size, m: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
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
    for matrices, rows, tiles in _bands(scores.shape, m, m):
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
            return _times_power(numbers, exponent).round_().sub_(priced)
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
            if (tile := _first(~sums_hold)) is not None:
                return Failure(band.first + tile, f"a row or column does not keep exactly {n}")
        entries, lines = _terms(band, n, exactly, rounded=True)
        fails = (entries != 0) | (lines != 0)
        if not exactly:
            fails |= (band.prices.u < 0).any(0) | (band.prices.v < 0).any(0)
        if (tile := _first(fails)) is not None:
            return Failure(band.first + tile, _story(band, tile, n))
    return None


def _first(fails: Bool[Tensor, " T"]) -> int | None:
    return int(fails.nonzero()[0]) if bool(fails.any()) else None


def _out_of_range(band: _Band) -> Failure | None:
    u, v, exponent = band.prices
    far = ((u < -LARGEST_PRICE) | (u > LARGEST_PRICE) | (v < -LARGEST_PRICE) | (v > LARGEST_PRICE)).any(0)
    if (tile := _first(far)) is not None:
        return Failure(band.first + tile, "prices beyond 2**61 overflow: not proved optimal")
    low, high = (-EXPONENTS, EXPONENTS) if band.scores.is_floating_point() else (-62, 0)
    if (tile := _first((exponent < low) | (exponent > high))) is not None:
        return Failure(band.first + tile, f"exponent {int(exponent[tile])} fits no score: not proved optimal")
    return None


def _unfit_exponent(band: _Band) -> Failure | None:
    """Invalid scores, and exponents that round them more coarsely than a proof allows or so finely that sums overflow."""
    scores, exponent = band.scores, band.prices.exponent
    least, largest = scores.flatten(0, 1).amin(0), scores.flatten(0, 1).amax(0)
    if (tile := _first(~((least >= 0) & (largest < math.inf)))) is not None:
        return Failure(band.first + tile, "its scores are not all finite and >= 0: nothing is proved about them")
    if scores.is_floating_point():
        # frexp writes a number as f * 2**k, 1/2 <= f < 1.
        bits = torch.frexp(largest.double()).exponent.long() + exponent
        coarse, least_bits = bits < FAST_BITS, FAST_BITS
    else:
        bits = torch.frexp((largest.long() >> 12).double()).exponent.long() + 12
        coarse, least_bits = (exponent < 0) & (bits + exponent < FINE_BITS), FINE_BITS
        bits = torch.where(largest.long() >> FINE_BITS > 0, bits + exponent, 0)
    if (tile := _first(coarse & (largest > 0))) is not None:
        return Failure(
            band.first + tile, f"exponent {int(exponent[tile])} rounds the scores more coarsely than {least_bits} bits"
        )
    if (tile := _first((bits > FINE_BITS) & (largest > 0))) is not None:
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


# Plain selections


class _Poor(NamedTuple):
    """Groups of a band that keep less than the best selection."""

    place: str
    best: float
    kept: float
    """Of the first one."""
    more: float
    """The total that all of them could keep in addition."""


def selection_failure(matrices: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], pattern: Structure) -> str | None:
    """A sentence about the first group whose mask keeps less than it could; None if all are optimal.

    N:M and unstructured masks are judged by comparing scores, exactly. Sums of pairs and windows are exact for integers below
    2**57; those of other scores have a relative error of up to M * 2**-52 of their group's sum, and no less is called a failure.
    """
    for poor in _poor_groups(matrices, mask, pattern, proof=True):
        return f"{poor.place}: the mask keeps {poor.kept!r}, but {poor.best!r} can be kept at {pattern}"
    return None


def selection_gap(matrices: Real[Tensor, "B O I"], mask: Bool[Tensor, "B O I"], pattern: Structure) -> float:
    """How much more can be kept than the mask keeps, in score units; as exact as `selection_failure` says."""
    return sum(poor.more for poor in _poor_groups(matrices, mask, pattern, proof=False))


def _poor_groups(matrices: Tensor, mask: Tensor, pattern: Structure, proof: bool) -> Iterator[_Poor]:
    if isinstance(pattern, Unstructured):
        for index, (scores, kept) in enumerate(zip(matrices, mask, strict=True)):
            n = pattern.kept(scores.numel())
            if scores.numel() and _matrix_is_poor(scores, kept, n):
                yield _poor(f"matrix {index}", *_best_and_own(scores.reshape(-1, 1), kept.reshape(-1, 1), n))
        return
    assert isinstance(pattern, Pattern | Sequential | Paired)
    m, n = pattern.m, pattern.n
    for batch, rows, _ in _bands(matrices.shape, 1, m):
        scores, kept = (_groups_first(part[batch, rows], m) for part in (matrices, mask))
        if isinstance(pattern, Pattern):
            scores = _comparable(scores)
            poor = _is_poor(scores, kept, n)
            if (first := _first(poor)) is None:
                continue
            best, own = _best_and_own(scores[:, poor], kept[:, poor], n)
        else:
            best, own, bar = _sums(scores, kept, pattern)
            poor = best - own > (bar if proof else 0)
            if (first := _first(poor)) is None:
                continue
            best, own = best[None, poor], own[None, poor]
        groups = -(-matrices.shape[-1] // m)
        height = matrices[batch, rows].shape[1]
        matrix, row, group = batch.start + first // (groups * height), rows.start + first // groups % height, first % groups
        yield _poor(f"matrix {matrix}, row {row}, group {group}" if len(matrices) > 1 else f"row {row}, group {group}", best, own)


def _poor(place: str, best: Real[Tensor, "N G"], own: Real[Tensor, "N G"]) -> _Poor:
    more = (best - own).double().sum()
    return _Poor(place, float(best[:, 0].double().sum()), float(own[:, 0].double().sum()), float(more))


def _comparable(scores: Real[Tensor, "*S"]) -> Real[Tensor, "*S"]:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _groups_first(matrices: Shaped[Tensor, "B O I"], m: int) -> Shaped[Tensor, "M G"]:
    groups = torch.nn.functional.pad(matrices, (0, -matrices.shape[-1] % m)) if matrices.shape[-1] % m else matrices
    return groups.unflatten(-1, (-1, m)).permute(3, 0, 1, 2).reshape(m, -1)


def _is_poor(scores: Real[Tensor, "M G"], mask: Bool[Tensor, "M G"], n: int) -> Bool[Tensor, " G"]:
    """Whether something pruned is larger than something kept or, where fewer than n are kept, than zero."""
    largest = math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max
    least_kept = torch.where(mask, scores, largest).amin(0)
    most_pruned = torch.where(mask, 0, scores).amax(0)
    return torch.where(mask.sum(0) < n, most_pruned > 0, least_kept < most_pruned)


def _matrix_is_poor(scores: Real[Tensor, "O I"], mask: Bool[Tensor, "O I"], n: int) -> bool:
    """`_is_poor` of a whole matrix, in bands."""
    least, most = [], []
    for band, kept in _flat_bands(scores, mask):
        assert kept is not None
        numbers = _comparable(band)
        largest = math.inf if numbers.is_floating_point() else torch.iinfo(numbers.dtype).max
        least.append(torch.where(kept, numbers, largest).amin())
        most.append(torch.where(kept, 0, numbers).amax())
    most_pruned = torch.stack(most).amax()
    return bool(most_pruned > 0 if int(mask.sum()) < n else torch.stack(least).amin() < most_pruned)


def _best_and_own(scores: Real[Tensor, "M G"], mask: Bool[Tensor, "M G"], n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each group and what its mask keeps, both from the largest down: line by line, the first is no less."""
    scores = scores.double() if scores.is_floating_point() else scores.long()
    best, own = (part.sort(0, descending=True).values[:n] for part in (scores, torch.where(mask, scores, 0)))
    return best, own


def _sums(
    scores: Real[Tensor, "M G"], mask: Bool[Tensor, "M G"], pattern: Sequential | Paired
) -> tuple[Real[Tensor, " G"], Real[Tensor, " G"], Real[Tensor, " G"]]:
    """Per group: the largest sum that can be kept, the sum that is kept, and the bound on their rounding errors."""
    m, n = pattern.m, pattern.n
    if scores.is_floating_point() or int(scores.amax()) >= 1 << 57:
        scores = scores.double()
        bar = scores.sum(0) * (m * 2.0**-52)
    else:
        scores = scores.long()
        bar = torch.zeros_like(scores[0])
    own = torch.where(mask, scores, 0).sum(0)
    if isinstance(pattern, Paired):
        pairs = scores.unflatten(0, (-1, 2)).sum(1)
        return pairs.sort(0, descending=True).values[: n // 2].sum(0), own, bar
    zeros = m - n
    if zeros == 0:
        return scores.sum(0), own, bar
    kept = [torch.cat([scores[:start], scores[start + zeros :]]).sum(0) for start in range(n + 1)]
    return torch.stack(kept).amax(0), own, bar
