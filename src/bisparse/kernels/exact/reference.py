"""The exact solver in plain torch, for every device: the specification that the fast kernels are tested against.

Min-cost flow, solved primal-dual. Prices u (rows) and v (columns) are first set by block coordinate descent on the dual. The mask
keeps entries above u + v; rows and columns that then keep too few or too many are repaired along shortest augmenting paths
(Ahuja, Magnanti, Orlin, Network Flows, 1993, section 9.7), which keeps complementary slackness at each step.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from bisparse.kernels.exact.schema import (
    FAST_BITS,
    FINE_BITS,
    LARGEST_PRICE,
    LARGEST_START,
    MIN_FINE_INTEGER,
    NEEDS_EXACT,
    TINY,
    check_integers,
    check_matrix,
    check_scores,
    check_start,
)
from bisparse.kernels.registration import ANY_DEVICE, register_kernel
from bisparse.tiles import from_tiles, to_tiles

ALTERNATIONS = 4
UNREACHED = 1 << 62


def exact_tiles(
    q: Int[Tensor, "B M M"], n: int, exactly: bool, start: tuple[Int[Tensor, "B M"], Int[Tensor, "B M"]] | None = None
) -> tuple[Bool[Tensor, "B M M"], Int[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Optimal masks and prices of integer scores (int64, non-negative, below 2**55); n < M."""
    tiles, m, _ = q.shape
    if tiles == 0:
        return torch.zeros_like(q, dtype=torch.bool), q.new_zeros(0, m), q.new_zeros(0, m)
    u, v = start if start is not None else (q.new_zeros(tiles, m), q.new_zeros(tiles, m))
    for _ in range(ALTERNATIONS):
        u = threshold(q - v[:, None, :], n, exactly)
        v = threshold((q - u[:, :, None]).transpose(1, 2), n, exactly)
    x = fill_ties(q > u[:, :, None] + v[:, None, :], q == u[:, :, None] + v[:, None, :], n)
    x, u, v = repair(q, x, u, v, n, exactly)
    if not exactly:
        xt, v, u = repair(q.transpose(1, 2), x.transpose(1, 2), v, u, n, exactly)
        x = xt.transpose(1, 2)
    return x, u, v


def threshold(lines: Int[Tensor, "B M M"], n: int, exactly: bool) -> Int[Tensor, "B M"]:
    """The price midway between the n-th and the next largest of each line, which minimises the dual over this side."""
    top = lines.topk(n + 1, dim=-1).values
    price = (top[..., n - 1] + top[..., n]) >> 1
    return price if exactly else price.clamp(min=0)


def fill_ties(x: Bool[Tensor, "B M M"], tied: Bool[Tensor, "B M M"], n: int) -> Bool[Tensor, "B M M"]:
    """Keep entries at reduced cost zero while their row and column have room, lowest row first, then lowest column."""
    x = x.clone()
    for row in range(x.shape[1]):
        candidates = tied[:, row] & (x.sum(1) < n)
        room = n - x[:, row].sum(1, keepdim=True)
        x[:, row] |= candidates & (candidates.cumsum(1) <= room)
    return x


def repair(
    q: Int[Tensor, "B M M"],
    x: Bool[Tensor, "B M M"],
    u: Int[Tensor, "B M"],
    v: Int[Tensor, "B M"],
    n: int,
    exactly: bool,
) -> tuple[Bool[Tensor, "B M M"], Int[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Augment from rows that keep too few and columns that keep too many until there are none.

    At most N: a row may also keep fewer once its price is zero, and a column more while it has room. The caller then repeats this
    on the transpose.
    """
    x, u, v = x.clone(), u.clone(), v.clone()
    while True:
        row_sums, column_sums = x.sum(2), x.sum(1)
        row_source = (row_sums < n) if exactly else (row_sums < n) & (u > 0)
        column_source = column_sums > n
        active = (row_source.any(1) | column_source.any(1)).nonzero()[:, 0]
        if active.numel() == 0:
            return x, u, v
        xa, ua, va = x[active], u[active], v[active]
        reduced = q[active] - ua[:, :, None] - va[:, None, :]
        enter = torch.where(xa, UNREACHED, -reduced)  # row -> column, x becomes 1
        leave = torch.where(xa, reduced, UNREACHED)  # column -> row, x becomes 0
        far = torch.full_like(ua, UNREACHED)
        row_distance = torch.where(row_source[active], 0, far)
        column_distance = torch.where(column_source[active], 0, far)
        row_from, column_from = torch.full_like(ua, -1), torch.full_like(va, -1)
        while True:
            best, origin = _add(row_distance[:, :, None], enter).min(1)
            closer = best < column_distance
            column_distance, column_from = (
                torch.where(closer, best, column_distance),
                torch.where(closer, origin, column_from),
            )
            best, origin = _add(column_distance[:, None, :], leave).min(2)
            closer_row = best < row_distance
            row_distance, row_from = (
                torch.where(closer_row, best, row_distance),
                torch.where(closer_row, origin, row_from),
            )
            if not bool(closer.any() | closer_row.any()):
                break
        column_end = torch.where(column_sums[active] < n, column_distance, UNREACHED)
        row_end = torch.where(row_sums[active] > n, row_distance, UNREACHED)
        if not exactly:
            row_end = torch.minimum(row_end, _add(row_distance, ua))
        distance, end = torch.cat([column_end, row_end], 1).min(1)
        m = x.shape[1]
        _flip_path(xa, row_from, column_from, end, m)
        x[active] = xa
        u[active] = ua - (distance[:, None] - row_distance).clamp(min=0)
        v[active] = va + (distance[:, None] - column_distance).clamp(min=0)


def _add(distance: Tensor, cost: Tensor) -> Tensor:
    return torch.where((distance >= UNREACHED) | (cost >= UNREACHED), UNREACHED, distance + cost)


def _flip_path(x: Tensor, row_from: Tensor, column_from: Tensor, end: Tensor, m: int) -> None:
    """Walk each tile's path back from its end to its source, toggling the entries it crosses."""
    tile = torch.arange(x.shape[0], device=x.device)
    at_row = end >= m
    node = torch.where(at_row, end - m, end)
    while True:
        previous = torch.where(at_row, row_from[tile, node], column_from[tile, node])
        moving = previous >= 0
        if not bool(moving.any()):
            return
        tile, node, previous, at_row = tile[moving], node[moving], previous[moving], at_row[moving]
        row, column = torch.where(at_row, node, previous), torch.where(at_row, previous, node)
        x[tile, row, column] = ~x[tile, row, column]
        node, at_row = previous, ~at_row


def quantise(tiles: Float[Tensor, "B M M"]) -> tuple[Int[Tensor, "B M M"], Int[Tensor, " B"]]:
    """Scores as integers: times 2**exponent, half to even, the tile's largest in [2**23, 2**24). Exponent 0 for a zero tile.

    A tile with few large outliers over many small scores gets the exponent `NEEDS_EXACT`.
    """
    if tiles.shape[0] == 0:
        return tiles.long(), tiles.new_zeros(0, dtype=torch.int64)
    tiles = tiles.double()
    largest = tiles.flatten(1).amax(1)
    exponent = torch.where(largest > 0, FAST_BITS - torch.frexp(largest).exponent.long(), 0)
    q = torch.ldexp(tiles, exponent[:, None, None]).round().long()
    small = ((q < MIN_FINE_INTEGER) & (tiles > 0)).sum((1, 2))
    return q, torch.where((2 * small > (tiles > 0).sum((1, 2))) | ((largest > 0) & (largest < TINY)), NEEDS_EXACT, exponent)


def quantise_finely(tiles: Real[Tensor, "B M M"]) -> tuple[Int[Tensor, "B M M"], Int[Tensor, " B"]]:
    """Scores as integers: times 2**exponent, half to even, the tile's largest in [2**51, 2**52).

    Integers below 2**52 are unchanged, with exponent 0, which is also the exponent of a zero tile.
    """
    if tiles.shape[0] == 0:
        return tiles.long(), tiles.new_zeros(0, dtype=torch.int64)
    largest = tiles.flatten(1).amax(1)
    if tiles.is_floating_point():
        exponent = torch.where(largest > 0, FINE_BITS - torch.frexp(largest.double()).exponent.long(), 0)
        # Two factors, since 2**exponent may leave the range of float64; by their bits, since pow on a GPU need not be exact.
        half = exponent // 2
        first, second = (((1023 + power) << 52).view(torch.float64)[:, None, None] for power in (half, exponent - half))
        return (tiles.double() * first * second).round().long(), exponent
    bits = torch.frexp((largest.long() >> 12).double()).exponent.long() + 12  # of those from 2**52 on
    shift = torch.where(largest >= 1 << FINE_BITS, bits - FINE_BITS, 0)[:, None, None] if tiles.dtype == torch.int64 else None
    if shift is None or not bool(shift.any()):
        return tiles.long(), torch.zeros_like(largest, dtype=torch.int64)
    whole = tiles >> shift
    rest, half_unit = tiles - (whole << shift), (1 << shift) >> 1
    up = (rest > half_unit) | ((rest == half_unit) & (whole & 1 == 1) & (shift > 0))
    return whole + up, -shift[:, 0, 0]


@register_kernel("exact_solve", ANY_DEVICE)
def exact_solve(
    scores: Tensor, n: int, m: int, exactly: bool, prices: Tensor | None, exponent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.exact_solve` in plain torch."""
    check_matrix(scores, n, m)
    check_scores(scores)
    q, now = quantise(to_tiles(scores, m))
    u, v = None, None
    if prices is not None and exponent is not None:
        check_start(len(q), m, prices, exponent)
        usable = (now != NEEDS_EXACT) & (exponent != NEEDS_EXACT)
        shift = torch.where(usable, now - exponent.long(), 0).clamp(-40, 30)[:, None]
        start = torch.ldexp(prices.double(), shift).round().clamp(-LARGEST_START, LARGEST_START)
        u, v = start.long() * usable[:, None]
    q = q * (now != NEEDS_EXACT)[:, None, None]
    mask, u, v = torch.ops.bisparse.exact_solve_integers(q, n, exactly, u, v)
    found = torch.stack([u, v])
    fits = (found.abs() < LARGEST_PRICE).all(-1).all(0)
    now = torch.where(fits, now, NEEDS_EXACT)
    return from_tiles(mask, scores.shape[0], scores.shape[1]), torch.where(fits[:, None], found, 0).int(), now.int()


@register_kernel("exact_mask", ANY_DEVICE)
def exact_mask(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
    """`ops.exact_mask` in plain torch."""
    mask, _, exponent = exact_solve(scores, n, m, exactly, None, None)
    return mask, exponent == NEEDS_EXACT


@register_kernel("exact_mask_of_magnitudes", ANY_DEVICE)
def exact_mask_of_magnitudes(weight: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
    """`ops.exact_mask_of_magnitudes` in plain torch."""
    mask, coarse = torch.ops.bisparse.exact_mask(weight.abs().float(), 2, 4, exactly)
    return mask, coarse


@register_kernel("exact_solve_integers", ANY_DEVICE)
def exact_solve_integers(q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.exact_solve_integers` in plain torch."""
    return exact_tiles(q, n, exactly, check_integers(q, n, u, v))


@register_kernel("keep_largest", ANY_DEVICE)
def keep_largest(groups: Tensor, n: int) -> Tensor:
    """`ops.keep_largest` in plain torch."""
    best = groups.sort(stable=True, dim=-1, descending=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
