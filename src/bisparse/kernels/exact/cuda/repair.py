"""From prices to the best mask on a GPU: rounding, ties, and shortest augmenting paths, one warp for 32 / M tiles.

Lane (tile, k) holds row k and column k of its tile: their prices, kept counts, and kept entries as the bits of a word. State of a
whole tile (the current node of a search, its distance) is replicated in all lanes of the tile, so that no shared memory is
needed: neighbours are read by shuffles, minima found by butterfly reductions. A node's arcs are read again from the scores,
which are in the L1 cache. Finished tiles of a warp wait for the slowest.

Source: Dijkstra with potentials (Ahuja, Magnanti, Orlin, Network Flows, 1993, section 9.7), as in `repair` on the CPU.
"""

# Triton reads the source of these functions and types them itself.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from bisparse.kernels.exact.cuda.prices import NEEDS_EXACT, to_integers

__all__ = ["balanced_masks"]

UNROLLED = tl.constexpr(8)
"""Loop unrolling: this many loads are in flight at once; fully unrolled, M = 32 would compile for a minute."""


@triton.jit
def integers_at(scores, place, where, scale, WIDE: tl.constexpr):
    """The integer scores at these places; zero elsewhere, and in tiles whose scale is zero."""
    score = tl.load(scores + place, mask=where, other=0)
    if not WIDE:
        score = to_integers(tl.where(scale > 0, score.to(tl.float32), 0.0), scale)
    return score


@triton.jit
def transposed_words(words, lane, M: tl.constexpr):
    """Transpose the bits of every tile: bit i of word j becomes bit j of word i; and the popcount of each new word."""
    zero = tl.zeros_like(words)
    result = zero
    count = zero.to(tl.int32)
    for k in tl.range(0, M, loop_unroll_factor=UNROLLED):
        bit = (tl.gather(words, count * 0 + k, 1) >> lane) & 1
        result |= bit << k
        count += bit.to(tl.int32)
    return result, count


@triton.jit
def filled_ties(columns, kept_column, kept_row, tied, lane, N: tl.constexpr, M: tl.constexpr):
    """Keep entries at reduced cost zero, row by row, in the columns with the most room left, of those the lowest first.

    On a constant tile this is the Gale-Ryser construction and leaves nothing to repair.
    """
    zero = tl.zeros_like(kept_column)
    for i in range(M):
        room = N - kept_column
        need = N - tl.gather(kept_row, zero + i, 1)
        candidate = (((tied >> i) & 1) != 0) & (room > 0)
        key = tl.where(candidate, room * M + (M - 1 - lane), 0)
        better = zero
        for k in tl.range(0, M, loop_unroll_factor=UNROLLED):
            better += (tl.gather(key, zero + k, 1) > key).to(tl.int32)
        taken = candidate & (better < need)
        columns |= taken.to(columns.dtype) << i
        kept_column += taken.to(tl.int32)
    return columns, kept_column


@triton.jit
def augmented(
    scores,
    corner,
    row_stride,
    column_stride,
    scale,
    inside,
    lane,
    rows,
    columns,
    kept_row,
    kept_column,
    u,
    v,
    FAR: tl.constexpr,
    LIMIT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    FREE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Dijkstra from rows that keep too few and columns that keep too many, path after path, until there are none.

    Called a second time with rows and columns exchanged. The last return value marks tiles whose prices might leave their range.
    """
    zero = tl.zeros_like(kept_row)
    one = (zero + 1).to(rows.dtype)
    far = tl.zeros_like(u) + FAR
    failed = zero
    spent = tl.zeros_like(u)  # no price has moved further than this
    short = (kept_row < N) & inside
    if not FREE:
        short = short & (u > 0)
    over = (kept_column > N) & inside
    active = tl.max((short | over).to(tl.int32), axis=1, keep_dims=True) + zero
    while tl.max(active) > 0:
        distance_row = tl.where(short, 0, far)
        distance_column = tl.where(over, 0, far)
        from_row = zero - 1
        from_column = zero - 1
        done_row = zero
        done_column = zero
        ground = far
        ground_row = zero
        total = far
        node = zero
        searching = active
        while tl.max(searching) > 0:
            open_row = tl.where(done_row > 0, far, distance_row)
            open_column = tl.where(done_column > 0, far, distance_column)
            distance = tl.min(tl.minimum(open_row, open_column), axis=1, keep_dims=True) + tl.zeros_like(u)
            name = tl.where(open_row == distance, lane, tl.where(open_column == distance, M + lane, 2 * M))
            nearest = tl.min(name, axis=1, keep_dims=True) + zero
            is_row = nearest < M
            index = tl.where(is_row, nearest, nearest - M)
            grounded = distance >= ground
            kept = tl.where(is_row, tl.gather(kept_row, index, 1), tl.gather(kept_column, index, 1))
            ended = grounded | (distance + spent >= LIMIT) | tl.where(is_row, kept > N, kept < N)
            ending = (searching > 0) & ended
            total = tl.where(ending, tl.minimum(distance, ground), total)
            node = tl.where(ending, tl.where(grounded, ground_row, nearest), node)
            going = (searching > 0) & (ended == 0)
            row_price = tl.gather(u, index, 1)
            column_price = tl.gather(v, index, 1)
            if not FREE:  # a row may keep fewer once its price has fallen to zero
                stops = going & is_row & (distance + row_price < ground)
                ground = tl.where(stops, distance + row_price, ground)
                ground_row = tl.where(stops, nearest, ground_row)
            at_row = going & is_row
            at_column = going & (is_row == 0)
            done_row = tl.where(at_row & (lane == index), 1, done_row)
            done_column = tl.where(at_column & (lane == index), 1, done_column)
            place = tl.where(is_row, index * row_stride + lane * column_stride, lane * row_stride + index * column_stride)
            q = integers_at(scores, corner + place, going, scale, WIDE)
            entry = (tl.where(is_row, columns, rows) >> index) & 1
            cost = distance + row_price + v - q
            closer = at_row & (entry == 0) & (done_column == 0) & (cost < distance_column)
            distance_column = tl.where(closer, cost, distance_column)
            from_column = tl.where(closer, index, from_column)
            cost = distance + q - u - column_price
            closer = at_column & (entry != 0) & (done_row == 0) & (cost < distance_row)
            distance_row = tl.where(closer, cost, distance_row)
            from_row = tl.where(closer, index, from_row)
            searching = going.to(tl.int32)

        found = (active > 0) & (total + spent < LIMIT)
        failed = tl.where((active > 0) & (total + spent >= LIMIT), 1, failed)
        spent = tl.where(found, total + spent, spent)
        u -= tl.where(found & (done_row > 0), total - distance_row, 0)
        v += tl.where(found & (done_column > 0), total - distance_column, 0)
        is_row = node < M
        index = tl.where(is_row, node, node - M)
        at_end = found & (lane == index)
        kept_row -= (at_end & is_row).to(tl.int32)
        kept_column += (at_end & (is_row == 0)).to(tl.int32)
        moving = found
        while tl.max(moving.to(tl.int32)) > 0:
            is_row = node < M
            index = tl.where(is_row, node, node - M)
            previous = tl.where(is_row, tl.gather(from_row, index, 1), tl.gather(from_column, index, 1))
            moving = moving & (previous >= 0)
            i = tl.where(is_row, index, previous)
            j = tl.where(is_row, previous, index)
            rows ^= tl.where(moving & (lane == i), one << tl.maximum(j, 0), 0).to(rows.dtype)
            columns ^= tl.where(moving & (lane == j), one << tl.maximum(i, 0), 0).to(rows.dtype)
            node = tl.where(moving, tl.where(is_row, previous + M, previous), node)
        is_row = node < M
        index = tl.where(is_row, node, node - M)
        at_source = found & (lane == index)
        kept_row += (at_source & is_row).to(tl.int32)
        kept_column -= (at_source & (is_row == 0)).to(tl.int32)

        short = (kept_row < N) & inside & (failed == 0)
        if not FREE:
            short = short & (u > 0)
        over = (kept_column > N) & inside & (failed == 0)
        active = tl.max((short | over).to(tl.int32), axis=1, keep_dims=True) + zero
    return rows, columns, kept_row, kept_column, u, v, failed


@triton.jit
def balanced_masks(
    scores,
    prices,
    exponents,
    mask,
    tiles,
    across,
    row_stride,
    FAR: tl.constexpr,
    LIMIT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    FREE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The mask of T tiles per program; prices (2, tiles, M) become optimal in place. WIDE: int64 scores, no exponents."""
    tile = tl.program_id(0) * T + tl.arange(0, T)[:, None]
    tile64 = tile.to(tl.int64)  # a large model has 2**31 prices
    lane = tl.arange(0, M)[None, :] + tl.zeros([T, M], tl.int32)
    zero = tl.zeros([T, M], tl.int32)
    inside = tile + zero < tiles
    corner = (tile // across).to(tl.int64) * (M * row_stride) + (tile % across) * M
    u = tl.load(prices + tile64 * M + lane, mask=inside, other=0)
    v = tl.load(prices + (tiles + tile64) * M + lane, mask=inside, other=0)
    scale = zero.to(tl.float32)
    if not WIDE:
        exponent = tl.load(exponents + tile, mask=tile < tiles, other=NEEDS_EXACT) + zero
        bits = (tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23
        scale = tl.where(exponent == NEEDS_EXACT, 0.0, bits.to(tl.float32, bitcast=True))

    columns = zero.to(tl.int64) if M > 32 else zero
    tied = columns
    kept_column = zero
    for k in tl.range(0, M, loop_unroll_factor=UNROLLED):
        q = integers_at(scores, corner + k * row_stride + lane, inside, scale, WIDE)
        slack = q - v - tl.gather(u, zero + k, 1)
        columns |= (slack > 0).to(columns.dtype) << k
        tied |= ((slack == 0) & inside).to(columns.dtype) << k
        kept_column += (slack > 0).to(tl.int32)
    rows, kept_row = transposed_words(columns, lane, M)
    if tl.max((tied != 0).to(tl.int32)) > 0:
        columns, kept_column = filled_ties(columns, kept_column, kept_row, tied, lane, N, M)
        rows, kept_row = transposed_words(columns, lane, M)

    rows, columns, kept_row, kept_column, u, v, failed = augmented(
        scores, corner, row_stride, 1, scale, inside, lane,
        rows, columns, kept_row, kept_column, u, v, FAR, LIMIT, N, M, FREE, WIDE,
    )  # fmt: skip
    if not FREE:
        columns, rows, kept_column, kept_row, v, u, also_failed = augmented(
            scores, corner, 1, row_stride, scale, inside & (failed == 0), lane,
            columns, rows, kept_column, kept_row, v, u, FAR, LIMIT, N, M, FREE, WIDE,
        )  # fmt: skip
        failed |= also_failed

    for k in tl.range(0, M, loop_unroll_factor=UNROLLED):
        tl.store(mask + corner + k * row_stride + lane, ((columns >> k) & 1).to(tl.int8), mask=inside)
    tl.store(prices + tile64 * M + lane, u, mask=inside)
    tl.store(prices + (tiles + tile64) * M + lane, v, mask=inside)
    if not WIDE:
        tl.store(exponents + tile + zero, zero + NEEDS_EXACT, mask=inside & (lane == 0) & (failed > 0))
