"""Prices of all tiles on a GPU: block coordinate descent on the dual, one thread per row and column, without shared memory.

A warp holds 32 / M tiles. Lane (tile, k) keeps row k and column k of its tile in registers, as 24-bit integers. A half-sweep
takes the other side's prices from the neighbouring lanes by shuffles and selects the n-th and the next largest of its line by a
sorting network, of which the compiler removes comparators that do not affect these two. Larger tiles and 64-bit integers do not
fit a thread's registers: their prices are found by bisection, counting entries above the price.

Source: see `reference` for the algorithm. "At most N" is swept as "exactly N", then prices move between rows and columns until
none is negative, as on the CPU (docs/decisions/0003).
"""

# Triton reads the source of these functions and types them itself; its tuples grow by addition only.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from bisparse.kernels.exact import schema

__all__ = ["FAR_PRICE", "NEEDS_EXACT", "UNBOUNDED", "bisected_prices", "swept_prices", "to_integers"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NEEDS_EXACT = tl.constexpr(schema.NEEDS_EXACT)
MIN_FINE_INTEGER = tl.constexpr(schema.MIN_FINE_INTEGER)
UNBOUNDED = tl.constexpr(0x7F800000)
"""The bit pattern of infinity: NaN and, read as unsigned, every negative number are larger."""
SMALLEST = tl.constexpr(24 << 23)
"""A tile whose largest score has a smaller bit pattern, below 2**-103, is coarse."""
NO_FLOOR = tl.constexpr(1 << 30)
FAR_PRICE = tl.constexpr(1 << 25)
"""Start prices are clamped to this: no optimal price of 24-bit scores is larger."""


@triton.jit
def to_integers(scores, scale):
    """Scores times a power of two, rounded half to even; the product is below 2**24."""
    product = scores * scale
    if INTERPRETED:
        # Adding 2**23 leaves no room for a fraction; from there on a float32 has none.
        integers = tl.where(product < 8388608.0, (product + 8388608.0) - 8388608.0, product).to(tl.int32)
    else:
        integers = libdevice.float2int_rn(product)
    return integers


@triton.jit
def line_prices(entries, NETWORK: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Midway between the n-th and the next largest of M tensors, entry by entry."""
    for k in tl.static_range(len(NETWORK)):
        low = tl.minimum(entries[NETWORK[k][0]], entries[NETWORK[k][1]])
        high = tl.maximum(entries[NETWORK[k][0]], entries[NETWORK[k][1]])
        entries = (
            entries[: NETWORK[k][0]]
            + (low,)
            + entries[NETWORK[k][0] + 1 : NETWORK[k][1]]
            + (high,)
            + entries[NETWORK[k][1] + 1 :]
        )
    return (entries[M - N] + entries[M - N - 1]) >> 1


@triton.jit
def swept_prices(
    scores,
    start,
    start_exponents,
    prices,
    exponents,
    tiles,
    across,
    row_stride,
    ALTERNATIONS: tl.constexpr,
    CLAMPED_ALTERNATIONS: tl.constexpr,
    NETWORK: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    FREE: tl.constexpr,
    WARM: tl.constexpr,
):
    """Prices (2, tiles, M) and exponents of T tiles per program. FREE: prices may be negative ("exactly N")."""
    tile = tl.program_id(0) * T + tl.arange(0, T)[:, None]
    tile64 = tile.to(tl.int64)  # a large model has 2**31 prices
    lane = tl.arange(0, M)[None, :]
    inside = (tile < tiles) & (lane >= 0)
    corner = (tile // across).to(tl.int64) * (M * row_stride) + (tile % across) * M
    zero = tl.zeros([T, M], tl.int32)

    columns = ()
    largest = zero.to(tl.uint32)
    for k in tl.static_range(M):
        # Adding zero turns -0.0, whose bit pattern is large, into 0.0.
        score = tl.load(scores + corner + k * row_stride + lane, mask=inside, other=0).to(tl.float32) + 0.0
        largest = tl.maximum(largest, score.to(tl.uint32, bitcast=True))
        columns = columns + (score,)
    largest = tl.max(largest, axis=1, keep_dims=True) + zero.to(tl.uint32)
    fine = largest < UNBOUNDED
    biased = tl.minimum(tl.maximum((largest >> 23).to(tl.int32), 23), 254)
    exponent = tl.where(largest > 0, 150 - biased, 0)
    scale = ((277 - biased) << 23).to(tl.float32, bitcast=True)

    balance = zero  # scores that lose precision, less the others that are not zero
    whole = ()
    for k in tl.static_range(M):
        score = tl.where(fine, columns[k], 0.0)
        integers = to_integers(score, scale)
        balance += tl.where(score > 0, tl.where(integers < MIN_FINE_INTEGER, 1, -1), 0)
        whole = whole + (integers,)
    balance = tl.sum(balance, axis=1, keep_dims=True) + zero
    coarse = (balance > 0) | ((largest > 0) & (largest < SMALLEST)) | (largest >= UNBOUNDED)
    exponent = tl.where(coarse, NEEDS_EXACT, exponent)
    scale = tl.where(coarse, 0.0, scale)
    columns = ()
    rows = ()
    for k in tl.static_range(M):
        columns = columns + (tl.where(coarse, 0, whole[k]),)
        score = tl.load(scores + corner + lane * row_stride + k, mask=inside, other=0).to(tl.float32)
        rows = rows + (to_integers(tl.where(coarse, 0.0, score), scale),)

    u = zero
    v = zero
    astray = (tile < tiles) & (lane >= 0)
    if WARM:
        before = tl.load(start_exponents + tile, mask=tile < tiles, other=NEEDS_EXACT) + zero
        usable = (before != NEEDS_EXACT) & (exponent != NEEDS_EXACT)
        change = exponent - before
        u = tl.load(start + tile64 * M + lane, mask=inside, other=0)
        v = tl.load(start + (tiles + tile64) * M + lane, mask=inside, other=0)
        u = rescaled_price(u, change, usable, FREE)
        v = rescaled_price(v, change, usable, FREE)
        kept_row = zero
        reach_row = zero
        kept_column = zero
        reach_column = zero
        for k in tl.static_range(M):
            slack = rows[k] - u - tl.gather(v, zero + k, 1)
            kept_row += (slack > 0).to(tl.int32)
            reach_row += (slack >= 0).to(tl.int32)
            slack = columns[k] - v - tl.gather(u, zero + k, 1)
            kept_column += (slack > 0).to(tl.int32)
            reach_column += (slack >= 0).to(tl.int32)
        if FREE:
            off = (kept_row > N) | (reach_row < N) | (kept_column > N) | (reach_column < N)
        else:
            off = (kept_row > N) | ((reach_row < N) & (u > 0)) | (kept_column > N) | ((reach_column < N) & (v > 0))
        astray = astray & (tl.max(off.to(tl.int32), axis=1, keep_dims=True) + zero > 0)

    # Each tile for itself: only what is astray moves, so that its neighbours' needs do not change its mask.
    floor = zero - NO_FLOOR
    step = 0
    steps = tl.where(tl.max(astray.to(tl.int32)) > 0, ALTERNATIONS, 0)
    while step < steps:
        u = tl.where(astray, tl.maximum(half_sweep(rows, v, zero, NETWORK, N, M), floor), u)
        v = tl.where(astray, tl.maximum(half_sweep(columns, u, zero, NETWORK, N, M), floor), v)
        step += 1
        if not FREE:  # noqa: SIM102 - decided when the kernel is compiled
            if step == ALTERNATIONS:
                low_u = tl.min(u, axis=1, keep_dims=True) + zero
                low_v = tl.min(v, axis=1, keep_dims=True) + zero
                shift = tl.where(astray, (low_u - low_v) >> 1, 0)
                u = tl.maximum(u - shift, 0)
                v = tl.maximum(v + shift, 0)
                astray = astray & (low_u + low_v < -1)
                floor = zero
                if tl.max(astray.to(tl.int32)) > 0:
                    steps = ALTERNATIONS + CLAMPED_ALTERNATIONS
    tl.store(prices + tile64 * M + lane, u, mask=inside)
    tl.store(prices + (tiles + tile64) * M + lane, v, mask=inside)
    tl.store(exponents + tile + zero, exponent, mask=inside & (lane == 0))


@triton.jit
def half_sweep(lines, other, zero, NETWORK: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """The best prices of one side, for given prices of the other."""
    entries = ()
    for k in tl.static_range(M):
        entries = entries + (lines[k] - tl.gather(other, zero + k, 1),)
    return line_prices(entries, NETWORK, N, M)


@triton.jit
def rescaled_price(price, change, usable, FREE: tl.constexpr):
    """A price of an earlier solve in units of this one; zero where that solve has none."""
    price = tl.where(usable, price, 0).to(tl.int64)
    price = tl.where(change >= 0, price << tl.minimum(tl.maximum(change, 0), 8), price >> tl.minimum(tl.maximum(-change, 0), 31))
    lowest = -FAR_PRICE if FREE else 0
    return tl.minimum(tl.maximum(price, lowest), FAR_PRICE).to(tl.int32)


@triton.jit
def bisected_prices(
    scores,
    start,
    start_exponents,
    prices,
    exponents,
    tiles,
    across,
    row_stride,
    ALTERNATIONS: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    FREE: tl.constexpr,
    WARM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Prices (2, tiles, M) of one tile per program, by bisection. WIDE: scores are int64 and used unchanged."""
    tile = tl.program_id(0)
    tile64 = tile.to(tl.int64)  # a large model has 2**31 prices
    row = tl.arange(0, M)[:, None]
    column = tl.arange(0, M)[None, :]
    lane = tl.arange(0, M)
    corner = (tile // across).to(tl.int64) * (M * row_stride) + (tile % across) * M
    score = tl.load(scores + corner + row * row_stride + column)
    if WIDE:
        q = score
    else:
        score = score.to(tl.float32) + 0.0
        largest = tl.max(score.to(tl.uint32, bitcast=True))
        biased = tl.minimum(tl.maximum((largest >> 23).to(tl.int32), 23), 254)
        scale = ((277 - biased) << 23).to(tl.float32, bitcast=True)
        score = tl.where(largest < UNBOUNDED, score, 0.0)
        q = to_integers(score, scale)
        balance = tl.sum(tl.where(score > 0, tl.where(q < MIN_FINE_INTEGER, 1, -1), 0))
        coarse = (balance > 0) | ((largest > 0) & (largest < SMALLEST)) | (largest >= UNBOUNDED)
        q = tl.where(coarse, 0, q)
        exponent = tl.where(coarse, NEEDS_EXACT, tl.where(largest > 0, 150 - biased, 0))
        tl.store(exponents + tile, exponent)
    u = tl.zeros([M], q.dtype)
    v = tl.zeros([M], q.dtype)
    if WARM:
        u = tl.load(start + tile64 * M + lane)
        v = tl.load(start + (tiles + tile64) * M + lane)
        if not WIDE:
            before = tl.load(start_exponents + tile)
            usable = (before != NEEDS_EXACT) & (exponent != NEEDS_EXACT)
            u = rescaled_price(u, exponent - before, usable, FREE)
            v = rescaled_price(v, exponent - before, usable, FREE)
    for _ in range(ALTERNATIONS):
        u = counted_prices(q - v[None, :], 1, STEPS, N, M)
        v = counted_prices(q - u[:, None], 0, STEPS, N, M)
    if not FREE:
        shift = (tl.min(u) - tl.min(v)) >> 1
        u = tl.maximum(u - shift, 0)
        v = tl.maximum(v + shift, 0)
    tl.store(prices + tile64 * M + lane, u)
    tl.store(prices + (tiles + tile64) * M + lane, v)


@triton.jit
def counted_prices(entries, AXIS: tl.constexpr, STEPS: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """A price per line: midway between the n-th and the next largest entry, or the n-th largest itself if they are equal."""
    low = tl.min(entries, axis=AXIS)
    high = tl.max(entries, axis=AXIS)
    top = high
    bottom = low
    for _ in range(STEPS):
        middle = low + ((high - low) >> 1)
        above = tl.sum((entries > tl.expand_dims(middle, AXIS)).to(tl.int32), axis=AXIS)
        low = tl.where(above > N, middle + 1, tl.where(above == N, middle, low))
        high = tl.where(above > N, high, middle)
    price = tl.expand_dims(high, AXIS)
    above = tl.sum((entries > price).to(tl.int32), axis=AXIS)
    least_above = tl.min(tl.where(entries > price, entries, tl.expand_dims(top, AXIS)), axis=AXIS)
    most_below = tl.max(tl.where(entries > price, tl.expand_dims(bottom, AXIS), entries), axis=AXIS)
    return tl.where(above == N, (least_above + most_below) >> 1, high)
