"""The operators: schema, shapes, and a plain-torch kernel for every device, which is their specification.

Faster kernels register themselves for "cpu" (numba) and "cuda" (Triton); torch dispatches by device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from bisparse.kernels.exact import reference
from bisparse.tiles import from_tiles, to_tiles

__all__ = [
    "COARSE",
    "BadScoreError",
    "any_coarse",
    "check_scores",
    "exact_mask",
    "exact_mask_of_magnitudes",
    "exact_solve",
    "exact_solve_integers",
    "exact_with_prices",
    "keep_largest",
    "quantise",
    "quantise_finely",
]

FAST_BITS = 24
COARSE = -(1 << 30)
"""In place of an exponent: the fast mode would ruin this tile; solve it with `FINE_BITS` instead."""
FINE_BITS = 52
LARGEST_INTEGER = 1 << 55
"""What `exact_solve_integers` takes is below this, so that no shortest path overflows 64 bits."""
LARGEST_START = 1 << 25
"""Start prices of 24-bit scores are cut to this: no optimal price needs to be larger, and no sum of them overflows."""
LARGEST_PRICE = 1 << 30
"""A tile whose prices reach this is coarse: they would not fit 32 bits."""
TINY = 2.0**-103
"""A tile whose largest score is below this counts as coarse too: its scale would overflow float32."""
COARSE_BELOW = 1 << 12
"""A quantised score below this has lost precision; a tile where that holds for over half of its non-zero scores is coarse."""


class BadScoreError(ValueError):
    """A score is NaN, infinite or negative."""


def check_scores(scores: Tensor) -> None:
    """Raise `BadScoreError` at the first score that is NaN, infinite or negative, with its index and a remedy."""
    if scores.numel() == 0:
        return
    least, largest = torch.aminmax(scores)  # one pass; NaN comes out of it
    if bool(least >= 0) and bool(largest < math.inf):
        return
    bad = scores < 0
    if scores.is_floating_point():
        bad = bad | ~torch.isfinite(scores)
    index = tuple(bad.nonzero()[0].tolist())
    number = scores[index].item()
    remedy = "scores are magnitudes: pass weight.abs()" if number < 0 else "repair or exclude that weight first"
    raise BadScoreError(
        f"scores of shape {tuple(scores.shape)} hold {number} at index {index}; they must be finite and >= 0: {remedy}"
    )


def quantise(tiles: Float[Tensor, "B M M"]) -> tuple[Int[Tensor, "B M M"], Int[Tensor, " B"]]:
    """Scores as integers: times 2**exponent, half to even, the tile's largest in [2**23, 2**24). Exponent 0 for a zero tile.

    A tile with few large outliers over many small scores gets the exponent `COARSE`.
    """
    if tiles.shape[0] == 0:
        return tiles.long(), tiles.new_zeros(0, dtype=torch.int64)
    tiles = tiles.double()
    largest = tiles.flatten(1).amax(1)
    exponent = torch.where(largest > 0, FAST_BITS - torch.frexp(largest).exponent.long(), 0)
    q = torch.ldexp(tiles, exponent[:, None, None]).round().long()
    small = ((q < COARSE_BELOW) & (tiles > 0)).sum((1, 2))
    return q, torch.where((2 * small > (tiles > 0).sum((1, 2))) | ((largest > 0) & (largest < TINY)), COARSE, exponent)


def quantise_finely(tiles: Real[Tensor, "B M M"]) -> tuple[Int[Tensor, "B M M"], Int[Tensor, " B"]]:
    """Scores as integers: times 2**exponent, half to even, the tile's largest in [2**51, 2**52).

    Integers below 2**52 are taken as they are, with exponent 0, which is also the exponent of a zero tile.
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


def stack(x: Tensor, y: Tensor) -> Tensor:
    """`torch.stack`, on CPU without torch's threads: they spin for a while after their work and take the cores from ours."""
    return torch.from_numpy(np.stack([x.numpy(), y.numpy()])) if x.device.type == "cpu" else torch.stack([x, y])


def any_coarse(coarse: Bool[Tensor, " B"]) -> bool:
    """Whether any tile is; on CPU without torch's threads."""
    return bool(np.count_nonzero(coarse.numpy()) if type(coarse) is Tensor and coarse.is_cpu else coarse.any())


_LIBRARY = torch.library.Library("bisparse", "DEF")
_LIBRARY.define("keep_largest(Tensor groups, int n) -> Tensor")
_LIBRARY.define("exact_mask(Tensor scores, int n, int m, bool exactly) -> (Tensor mask, Tensor coarse)")
_LIBRARY.define("exact_mask_of_magnitudes(Tensor weight, bool exactly) -> (Tensor mask, Tensor coarse)")
_LIBRARY.define(
    "exact_solve(Tensor scores, int n, int m, bool exactly, Tensor? prices, Tensor? exponent)"
    " -> (Tensor mask, Tensor prices, Tensor exponent)"
)
_LIBRARY.define("exact_solve_integers(Tensor q, int n, bool exactly, Tensor? u, Tensor? v) -> (Tensor mask, Tensor u, Tensor v)")


def _directly_on_cpu(scores: Tensor) -> bool:
    """Without torch's dispatch, which on cold caches takes as long as the masks of a small layer."""
    if torch._C._len_torch_dispatch_stack():  # somebody watches or fakes what torch does
        return False
    return type(scores) is Tensor and scores.is_cpu and not (scores.is_neg() or torch.compiler.is_compiling())


@cache
def _cpu_kernels() -> ModuleType:
    # numba takes a second to import, so it waits for the first solve.
    from bisparse.kernels.exact.cpu import solve as cpu

    return cpu


def keep_largest(groups: Real[Tensor, "G M"], n: int) -> Bool[Tensor, "G M"]:
    """The n largest of every group; of equal scores the one with the lower index."""
    mask: Tensor = torch.ops.bisparse.keep_largest(groups, n)
    return mask


def exact_mask(
    scores: Float[Tensor, "R C"], n: int, m: int, exactly: bool
) -> tuple[Bool[Tensor, "R C"], Bool[Tensor, " B"] | None]:
    """Optimal mask of the tiles of a float32 matrix whose sides m divides, and which tiles were too `COARSE` to trust, if any.

    On a GPU float16 and bfloat16 are read as they are, and a tile with a bad score is coarse: nothing waits for the device.

    Raises:
        BadScoreError: a score is NaN, infinite or negative; not on a GPU.
    """
    operator = _cpu_kernels().exact_mask if _directly_on_cpu(scores) else torch.ops.bisparse.exact_mask
    mask, coarse = operator(scores, n, m, exactly)
    return mask, coarse


def exact_mask_of_magnitudes(weight: Float[Tensor, "R C"], exactly: bool) -> tuple[Bool[Tensor, "R C"], Bool[Tensor, " B"]]:
    """`exact_mask` at 2:4 of a weight's magnitudes; on a GPU the weight is read as it lies, and nothing waits for the device."""
    mask, coarse = torch.ops.bisparse.exact_mask_of_magnitudes(weight, exactly)
    return mask, coarse


Prices = tuple[Int[Tensor, "B M"], Int[Tensor, "B M"], Int[Tensor, " B"]]
"""Of rows and of columns, u and v, and the exponent of each tile; all int32."""


def exact_with_prices(
    scores: Float[Tensor, "R C"], n: int, m: int, exactly: bool, start: Prices | None = None
) -> tuple[Bool[Tensor, "R C"], Callable[[], Prices], Bool[Tensor, " B"] | None]:
    """Like `exact_mask`; between its results, what gives the prices, whose tensors are not made for nothing.

    `start` holds the prices of an earlier solve of nearly the same scores.
    """
    before = (None, None) if start is None else (stack(start[0], start[1]), start[2])
    if _directly_on_cpu(scores):
        mask, make_prices, some = _cpu_kernels().exact_solve(scores, n, m, exactly, *before)
        return mask, make_prices, make_prices()[2] == COARSE if some else None
    mask, prices, exponent = torch.ops.bisparse.exact_solve(scores, n, m, exactly, *before)
    return mask, lambda: (*prices.unbind(), exponent), exponent == COARSE


def exact_solve(
    scores: Float[Tensor, "R C"], n: int, m: int, exactly: bool, start: Prices | None = None
) -> tuple[Bool[Tensor, "R C"], Int[Tensor, "B M"], Int[Tensor, "B M"], Int[Tensor, " B"]]:
    """Mask, u, v and exponent; where the latter is `COARSE`, the others are not to be trusted."""
    mask, prices, _ = exact_with_prices(scores, n, m, exactly, start)
    return mask, *prices()


def exact_solve_integers(
    q: Int[Tensor, "B M M"], n: int, exactly: bool, start: tuple[Int[Tensor, "B M"], Int[Tensor, "B M"]] | None = None
) -> tuple[Bool[Tensor, "B M M"], Int[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Optimal masks and prices (int64) of tiles of integer scores, int64, non-negative, below 2**55; n < M.

    Raises:
        ValueError: scores or start prices of another shape or dtype, scores out of range, N not between 1 and M - 1.
    """
    u, v = start if start is not None else (None, None)
    result = torch.ops.bisparse.exact_solve_integers(q, n, exactly, u, v)
    return result[0], result[1], result[2]


def check_matrix(scores: Tensor, n: int, m: int) -> None:
    """Raise ValueError unless a kernel may read and write by these shapes: a matrix whose sides M divides, 1 <= N < M."""
    if scores.ndim != 2 or m < 1 or scores.shape[0] % m or scores.shape[1] % m:
        raise ValueError(f"scores of shape {tuple(scores.shape)} are no matrix whose sides {m} divides; pad them first")
    if not 1 <= n < m:
        raise ValueError(f"N = {n} is not between 1 and M - 1 = {m - 1}; N = M keeps everything and needs no solver")


def check_start(tiles: int, m: int, prices: Tensor, exponent: Tensor) -> None:
    """Raise ValueError unless the prices of an earlier solve have this one's shapes and hold integers."""
    if prices.shape != (2, tiles, m) or exponent.shape != (tiles,):
        given = tuple(prices.shape), tuple(exponent.shape)
        raise ValueError(f"a start of shapes {given[0]} and {given[1]}: expected {(2, tiles, m)} and {(tiles,)}")
    for part in (prices, exponent):
        if part.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"a start of dtype {part.dtype}: expected int32")


def check_integers(q: Tensor, n: int, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What every kernel of `exact_solve_integers` checks first; returns the start prices cut to the range of the scores.

    Optimal prices exist within the range of a tile's scores, and larger ones would let sums overflow.
    """
    if q.ndim != 3 or q.shape[1] != q.shape[2] or q.dtype != torch.int64:
        raise ValueError(f"integer scores of shape {tuple(q.shape)}, {q.dtype}: expected tiles (B, M, M) of int64")
    tiles, m, _ = q.shape
    if not 1 <= n < m:
        raise ValueError(f"N = {n} is not between 1 and M - 1 = {m - 1}; N = M keeps everything and needs no solver")
    if tiles:
        low, high = (int(bound) for bound in torch.aminmax(q))
        if low < 0 or high >= LARGEST_INTEGER:
            raise ValueError(f"integer scores from {low} to {high}: expected 0 to 2**55 - 1")
    if u is None and v is None:
        return None
    for side in (u, v):
        if side is None or side.shape != (tiles, m) or side.dtype != torch.int64 or side.device != q.device:
            given = "None" if side is None else f"shape {tuple(side.shape)}, {side.dtype}, on {side.device}"
            raise ValueError(f"start prices: {given}; expected u and v of shape ({tiles}, {m}), int64, on {q.device}")
    assert u is not None and v is not None
    limit = q.flatten(1).amax(1, keepdim=True) if tiles else q.new_zeros(0, 1)
    return torch.minimum(torch.maximum(u, -limit), limit), torch.minimum(torch.maximum(v, -limit), limit)


def reference_exact_solve(
    scores: Tensor, n: int, m: int, exactly: bool, prices: Tensor | None, exponent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `exact_solve`."""
    check_matrix(scores, n, m)
    check_scores(scores)
    q, now = quantise(to_tiles(scores, m))
    u, v = None, None
    if prices is not None and exponent is not None:
        check_start(len(q), m, prices, exponent)
        usable = (now != COARSE) & (exponent != COARSE)
        shift = torch.where(usable, now - exponent.long(), 0).clamp(-40, 30)[:, None]
        start = torch.ldexp(prices.double(), shift).round().clamp(-LARGEST_START, LARGEST_START)
        u, v = start.long() * usable[:, None]
    q = q * (now != COARSE)[:, None, None]
    mask, u, v = torch.ops.bisparse.exact_solve_integers(q, n, exactly, u, v)
    found = torch.stack([u, v])
    fits = (found.abs() < LARGEST_PRICE).all(-1).all(0)
    now = torch.where(fits, now, COARSE)
    return from_tiles(mask, scores.shape[0], scores.shape[1]), torch.where(fits[:, None], found, 0).int(), now.int()


def reference_exact_mask(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
    """The specification of `exact_mask`."""
    mask, _, exponent = reference_exact_solve(scores, n, m, exactly, None, None)
    return mask, exponent == COARSE


def reference_exact_mask_of_magnitudes(weight: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
    """The specification of `exact_mask_of_magnitudes`."""
    mask, coarse = torch.ops.bisparse.exact_mask(weight.abs().float(), 2, 4, exactly)
    return mask, coarse


def reference_exact_solve_integers(
    q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `exact_solve_integers`."""
    return reference.exact_tiles(q, n, exactly, check_integers(q, n, u, v))


def reference_keep_largest(groups: Tensor, n: int) -> Tensor:
    """The specification of `keep_largest`."""
    best = groups.sort(stable=True, dim=-1, descending=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)


@torch.library.register_fake("bisparse::keep_largest")
def _(groups: Tensor, n: int) -> Tensor:
    return groups.new_empty(groups.shape, dtype=torch.bool)


@torch.library.register_fake("bisparse::exact_mask")
def _(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
    tiles = scores.shape[0] // m * (scores.shape[1] // m)
    return scores.new_empty(scores.shape, dtype=torch.bool), scores.new_empty(tiles, dtype=torch.bool)


@torch.library.register_fake("bisparse::exact_mask_of_magnitudes")
def _(weight: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.bool), weight.new_empty(weight.numel() // 16, dtype=torch.bool)


@torch.library.register_fake("bisparse::exact_solve")
def _(
    scores: Tensor, n: int, m: int, exactly: bool, prices: Tensor | None, exponent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = scores.shape[0] // m * (scores.shape[1] // m)
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    return mask, scores.new_empty((2, tiles, m), dtype=torch.int32), scores.new_empty(tiles, dtype=torch.int32)


@torch.library.register_fake("bisparse::exact_solve_integers")
def _(q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.bool), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])


for _name, _kernel in {
    "keep_largest": reference_keep_largest,
    "exact_mask": reference_exact_mask,
    "exact_mask_of_magnitudes": reference_exact_mask_of_magnitudes,
    "exact_solve": reference_exact_solve,
    "exact_solve_integers": reference_exact_solve_integers,
}.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


def _numba_kernel(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        result = getattr(_cpu_kernels(), name)(*args)
        if name == "exact_mask" and result[1] is None:
            tiles = result[0].numel() // args[2] ** 2
            return result[0], torch.zeros(tiles, dtype=torch.bool)
        if name == "exact_solve":
            u, v, exponent = result[1]()
            return result[0], stack(u, v), exponent.clone()  # an operator's results may not share memory
        return result

    return kernel


def triton_kernel(name: str) -> Callable[..., Any]:
    """The kernel of that name in `cuda`, imported when it is first called, and launched on its tensors' device."""

    def kernel(*args: Any) -> Any:
        from bisparse.kernels.exact.cuda import solve as cuda

        with torch.cuda.device_of(args[0]):
            return getattr(cuda, name)(*args)

    return kernel


for _name in ("keep_largest", "exact_mask", "exact_solve", "exact_solve_integers"):
    _LIBRARY.impl(_name, _numba_kernel(_name), "CPU")
if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    for _name in ("keep_largest", "exact_mask", "exact_mask_of_magnitudes", "exact_solve", "exact_solve_integers"):
        _LIBRARY.impl(_name, triton_kernel(_name), "CUDA")
