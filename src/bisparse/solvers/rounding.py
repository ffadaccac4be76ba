"""From an order of entries to a mask: keep or prune in order, then fill what is left. All tiles advance together.

Tensors here have the tile as their last dimension, so that every step is elementwise over tiles: no result depends on the
other tiles of the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Real, Shaped
from torch import Tensor

__all__ = ["chunks", "fill", "fill_chunks", "heavy_to_light", "keep_in_order", "prune_in_order"]

SWEEP_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}
FILL_ENTRIES = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Entries processed at a time: enough for long vector operations, few enough to stay in the cache."""


def _pieces(tiles: Shaped[Tensor, "B M M"], entries: dict[str, int]) -> tuple[Shaped[Tensor, "b M M"], ...]:
    limit = entries.get(tiles.device.type, entries["cuda"])
    return torch.split(tiles, max(1, limit // (tiles.shape[1] * tiles.shape[2])))


def chunks(tiles: Shaped[Tensor, "B M M"]) -> tuple[Shaped[Tensor, "b M M"], ...]:
    """The batch in pieces that bound the working memory; one empty piece where B is 0."""
    return _pieces(tiles, SWEEP_ENTRIES)


def fill_chunks(tiles: Shaped[Tensor, "B M M"]) -> tuple[Shaped[Tensor, "b M M"], ...]:
    """Smaller pieces, for loops that read all entries many times."""
    return _pieces(tiles, FILL_ENTRIES)


def heavy_to_light(scores: Real[Tensor, "B M M"]) -> Int[Tensor, "K B"]:
    """Entries of each tile, as ``row * M + column``, from the largest score down; of equal scores the lower entry first."""
    return scores.flatten(1).sort(dim=1, descending=True, stable=True).indices.t().contiguous()


def keep_in_order(order: Int[Tensor, "K B"], n: int, m: int) -> Bool[Tensor, "B M M"]:
    """Keep each entry in turn while its row AND its column keep fewer than n. No entry can then be added to the mask."""
    return _sweep(order, n, m, both=True)


def prune_in_order(order: Int[Tensor, "K B"], zeros: int, m: int) -> Bool[Tensor, "B M M"]:
    """Prune each entry in turn while its row OR its column has fewer than `zeros` pruned; the rest is kept."""
    return ~_sweep(order, zeros, m, both=False)


def _sweep(order: Int[Tensor, "K B"], capacity: int, m: int, both: bool) -> Bool[Tensor, "B M M"]:
    entries, tiles = order.shape
    row = order >> (m.bit_length() - 1) if m & (m - 1) == 0 else order.div(m, rounding_mode="floor")
    ends = torch.stack([row, order - row * m + m], dim=1)
    room = torch.full((2 * m, tiles), capacity, dtype=torch.int16, device=order.device)
    taken = torch.empty(entries, tiles, dtype=torch.bool, device=order.device)
    for end, take in zip(ends.unbind(0), taken.unbind(0), strict=True):
        now = room.gather(0, end)
        torch.gt(torch.minimum(now[0], now[1]) if both else torch.maximum(now[0], now[1]), 0, out=take)
        # A row that lacks nothing more may go below zero: only the sign is read.
        room.scatter_(0, end, now.sub_(take.to(torch.int16)))
    return torch.zeros_like(taken).scatter_(0, order, taken).t().reshape(tiles, m, m)


def fill(scores: Real[Tensor, "B M M"], mask: Bool[Tensor, "B M M"], n: int, exactly: bool = False) -> Bool[Tensor, "B M M"]:
    """Add to masks to which no single entry can be added, each time by the best swap of one kept entry for two.

    A row r and a column c that keep fewer than n already keep (r, c). Dropping a kept (i, j) makes room for (r, j) and (i, c):
    the augmenting path r -> j -> i -> c, which gains ``w_rj + w_ic - w_ij``. Such a path always exists: at least M - N + 1 rows
    keep no entry of c, and all are full, so not all their kept entries avoid the M - N + 1 or more columns that r does not keep.

    "At most N" stops at a tile whose best path gains nothing, so the value never falls; ``exactly=True`` continues until every
    row and column keeps n. Of equal gains the lowest entry (i, j) is dropped.
    """
    pieces = zip(fill_chunks(scores), fill_chunks(mask), strict=True)
    return torch.cat([_fill_piece(w, x, n, exactly) for w, x in pieces])


def _fill_piece(scores: Real[Tensor, "B M M"], mask: Bool[Tensor, "B M M"], n: int, exactly: bool) -> Bool[Tensor, "B M M"]:
    m = mask.shape[-1]
    missing = n * m - mask.sum((1, 2))
    tiles = missing.nonzero()[:, 0]
    if tiles.numel() == 0:
        return mask
    mask, missing = mask.clone(), missing[tiles]
    # float32 holds the smaller types exactly, int64 all integer types; gains of integers are ranked in float64.
    exact_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32 if scores.is_floating_point() else torch.int64
    rank_dtype = exact_dtype if exact_dtype.is_floating_point else torch.float64
    w = scores[tiles].to(exact_dtype).permute(1, 2, 0).contiguous()
    x = mask[tiles].permute(1, 2, 0).contiguous()
    row_room, column_room = (n - x.sum(side, dtype=torch.int16) for side in (1, 0))
    while True:
        rank = w.to(rank_dtype)
        into_column = torch.where(x | (row_room == 0)[:, None], -torch.inf, rank)
        into_row = torch.where(x | (column_room == 0)[None, :], -torch.inf, rank)
        gain = (into_column.amax(0)[None, :] + into_row.amax(1)[:, None]).sub_(rank).masked_fill_(~x, -torch.inf)
        dropped = _first_largest(gain.flatten(0, 1))
        i, j = dropped.div(m, rounding_mode="floor"), dropped % m
        tile = torch.arange(tiles.numel(), device=w.device)
        r = _first_largest(into_column[:, j, tile])
        c = _first_largest(into_row[i, :, tile].t())
        # Written so that integers cannot overflow and rounding cannot turn a loss into a gain.
        better = torch.ones_like(missing, dtype=torch.bool) if exactly else w[r, j, tile] > w[i, j, tile] - w[i, c, tile]
        r, c, i, j, tile = (index[better] for index in (r, c, i, j, tile))
        x[i, j, tile] = False
        x[r, j, tile] = True
        x[i, c, tile] = True
        row_room[r, tile] -= 1
        column_room[c, tile] -= 1
        missing -= better.long()
        done = (missing == 0) | ~better
        mask[tiles[done]] = x[..., done].permute(2, 0, 1)
        if bool(done.all()):
            return mask
        if bool(done.any()):
            tiles, missing = tiles[~done], missing[~done]
            w, x, row_room, column_room = (tensor[..., ~done] for tensor in (w, x, row_room, column_room))


def _first_largest(values: Real[Tensor, "K B"]) -> Int[Tensor, " B"]:
    """Index of the largest of each column, the first of equals (which `argmax` does not promise)."""
    place = torch.arange(values.shape[0], device=values.device)[:, None]
    return torch.where(values == values.amax(0), place, values.shape[0]).amin(0)
