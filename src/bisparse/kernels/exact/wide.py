"""Exact masks of scores as they are given: float64, integers, and tiles whose scores span too wide a range for 24 bits.

Scores are scaled by a power of two to whole numbers. Where those fit 52 bits the 64-bit kernel solves them. Where they do
not, it solves them rounded to 52 bits, and the result is finished in Python's own integers: Bellman-Ford on the constraints
that optimal prices obey either finds exact prices, which prove the mask, or a cycle along which the mask improves (cycle
cancelling; Ahuja, Magnanti, Orlin, Network Flows, 1993, section 9.6).
"""

from __future__ import annotations

from fractions import Fraction

import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

from bisparse.kernels.exact import ops

__all__ = ["solve_wide_tiles"]

BITS = 52
WidePrices = tuple[tuple[int, ...], tuple[int, ...]]


def solve_wide_tiles(
    tiles: Real[Tensor, "B M M"], n: int, exactly: bool
) -> tuple[Bool[Tensor, "B M M"], Int[Tensor, "B M"], Int[Tensor, "B M"], Int[Tensor, " B"], dict[int, WidePrices]]:
    """Masks, prices u and v, exponents, and the prices of tiles that need more than 64 bits; n < M."""
    device, numbers = tiles.device, tiles.detach()
    if numbers.is_floating_point():
        numbers = numbers.double()
        power, whole = _powers(numbers)
        fits = power + whole <= BITS
        exponent = torch.where(fits, whole, BITS - power)
        q = _scaled(numbers, exponent)
    else:
        numbers = numbers.long()
        fits = numbers.flatten(1).amax(1) < 1 << BITS if numbers.numel() else numbers.new_zeros(0, dtype=torch.bool)
        whole = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        exponent = torch.where(fits, 0, BITS - 63)
        q = torch.where(fits[:, None, None], numbers, numbers >> (63 - BITS))
    mask, u, v = ops.exact_solve_integers(q, n, exactly)
    wide: dict[int, WidePrices] = {}
    for tile in (~fits).nonzero()[:, 0].tolist():
        scale = Fraction(2) ** int(whole[tile])
        scores = [[int(Fraction(score) * scale) for score in row] for row in numbers[tile].tolist()]
        finer = int(whole[tile] - exponent[tile])
        prices = [[price << finer for price in side[tile].tolist()] for side in (u, v)]
        kept = mask[tile].tolist()
        wide[tile] = _finish(scores, kept, prices[0], prices[1], n, exactly)
        mask[tile] = torch.tensor(kept, device=device)
        u[tile], v[tile], exponent[tile] = 0, 0, whole[tile]
    return mask, u, v, exponent, wide


def _scaled(numbers: Tensor, exponent: Tensor) -> Tensor:
    # In two steps, since 2**exponent alone may leave the range of float64; by its bits, since pow on a GPU need not be exact.
    half = exponent // 2
    first, second = (((1023 + power) << 52).view(torch.float64)[:, None, None] for power in (half, exponent - half))
    return (numbers * first * second).round().long()


def _powers(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile: the power of two above its largest score, and the exponent that makes all its scores whole."""
    mantissa, power = torch.frexp(numbers)
    digits = (mantissa * 2.0**53).long()
    trailing = torch.frexp((digits & -digits).double()).exponent - 1
    last = torch.where(digits > 0, power - 53 + trailing, 10_000).flatten(1).amin(1).long()
    top = torch.where(digits > 0, power, -10_000).flatten(1).amax(1).long()
    empty = last == 10_000
    whole = torch.maximum(-last, ops.FAST_BITS - top)  # never coarser than the fast mode
    return torch.where(empty, 0, top), torch.where(empty, 0, whole)


def _finish(w: list[list[int]], x: list[list[bool]], u: list[int], v: list[int], n: int, exactly: bool) -> WidePrices:
    """Improve the mask x in place until prices prove it; returns them."""
    while (cycle := _settle_prices(w, x, u, v, n, exactly)) is not None:
        for i, j in cycle:
            x[i][j] = not x[i][j]
    return tuple(u), tuple(v)


def _settle_prices(
    w: list[list[int]], x: list[list[bool]], u: list[int], v: list[int], n: int, exactly: bool
) -> list[tuple[int, int]] | None:
    """Make u, v optimal for the mask x, in place; None if that succeeds, or the entries of a cycle to flip.

    Nodes 0..M-1 are rows with potential u, M..2M-1 columns with potential -v, 2M the ground with potential 0. An arc
    (a, b, c) says potential b <= potential a + c: a kept entry demands u + v <= w, a pruned one u + v >= w; at most N
    demands u, v >= 0, and zero where a line is not full.
    """
    m = len(w)
    arcs: list[tuple[int, int, int]] = []
    for i in range(m):
        for j in range(m):
            arcs.append((m + j, i, w[i][j]) if x[i][j] else (i, m + j, -w[i][j]))
    ground = 2 * m
    if not exactly:
        for k in range(m):
            arcs += [(k, ground, 0), (ground, m + k, 0)]
            if sum(x[k]) < n:
                arcs.append((ground, k, 0))
            if sum(row[k] for row in x) < n:
                arcs.append((m + k, ground, 0))
    potential = [*u, *(-price for price in v), 0]
    origin = [-1] * (2 * m + 1)
    changed = -1
    for _ in range(2 * m + 2):
        changed = -1
        for a, b, cost in arcs:
            if potential[b] > potential[a] + cost:
                potential[b] = potential[a] + cost
                origin[b] = a
                changed = b
        if changed < 0:
            u[:] = [price - potential[ground] for price in potential[:m]]
            v[:] = [potential[ground] - price for price in potential[m:ground]]
            return None
    node = changed
    for _ in range(2 * m + 1):
        node = origin[node]
    start, entries = node, []
    while True:
        previous = origin[node]
        if ground not in (node, previous):
            entries.append((min(node, previous), max(node, previous) - m))
        node = previous
        if node == start:
            return entries
