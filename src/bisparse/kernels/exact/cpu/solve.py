"""The exact solver on CPU: numba kernels over bands of tiles.

torch's own threads are not used: they spin after their work and occupy cores that our threads need.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch

from bisparse.kernels.exact import reference
from bisparse.kernels.exact.cpu.bands import (
    BAD,
    MIDDLE_CHUNK,
    coarse_tiles,
    middle_kernel,
    solve_kernel,
)  # fmt: skip
from bisparse.kernels.exact.cpu.enumerate_2to4 import WIDTH
from bisparse.kernels.exact.cpu.integers import integers_kernel
from bisparse.kernels.exact.cpu.vectors import LANES
from bisparse.kernels.exact.schema import NEEDS_EXACT, check_integers, check_matrix, check_scores, check_start
from bisparse.kernels.exact.sorting_network import sorting_network
from bisparse.kernels.numba_runtime.memory import empty
from bisparse.kernels.numba_runtime.thread_pool import over_bands

VECTOR_SIDES = (4, 8, 16, 32, 64)
PAST_CACHES = 1 << 24
"""Bytes from which a mask exceeds the caches and is written by non-temporal stores."""


def _refuse(scores: torch.Tensor, n: int, m: int) -> NoReturn:
    """Raise the error for bad arguments. Callers test for them inline, because a call is slow on cold caches."""
    check_matrix(scores, n, m)
    raise ValueError(f"scores of dtype {scores.dtype}: this kernel reads float32")


def _usable(flags: int, scores: torch.Tensor) -> bool:
    """Whether the kernels can use the scores unchanged; raises for scores that no solver takes."""
    if flags & BAD:
        check_scores(scores)
        return False  # only -0.0
    return True


def exact_mask(scores: torch.Tensor, n: int, m: int, exactly: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.exact_mask` on CPU."""
    if (n, m) != (2, 4):
        solved, _, exponent = exact_solve(scores, n, m, exactly, None, None)
        return solved, torch.from_numpy(exponent.numpy() == NEEDS_EXACT)
    rows, columns = scores.shape if scores.ndim == 2 else (1, 1)
    if rows & 3 or columns & 3 or scores.dtype is not torch.float32:
        _refuse(scores, n, m)
    # Bands of narrow matrices are placed next to each other in four rows, so that all lanes are used.
    beside = columns < 4 * MIDDLE_CHUNK
    wide = _side_by_side(scores) if beside else scores.contiguous()
    height, width = wide.shape if beside else (rows, columns)
    mask = empty((height, width), torch.bool)
    past_caches = height * width >= PAST_CACHES and width % (4 * WIDTH) == 0 and mask.data_ptr() % (4 * WIDTH) == 0
    arguments = wide, mask, height, width, past_caches, exactly
    count, granule, worth = (width // 4, MIDDLE_CHUNK, 4096) if height == 4 else (height // 4, 1, max(1, 16384 // width))
    flags = over_bands(middle_kernel(), arguments, count, granule, worth)
    found = np.zeros(height * width // 16, np.bool_)
    if flags:
        if not _usable(flags, scores):
            return exact_mask(scores.abs(), n, m, exactly)
        coarse_tiles(wide.numpy(), found)
    coarse = torch.from_numpy(found[: scores.numel() // 16])
    if beside:
        apart = mask.numpy()[:, : rows // 4 * columns].reshape(4, rows // 4, columns).swapaxes(0, 1).reshape(rows, columns)
        mask = torch.from_numpy(np.ascontiguousarray(apart))
    return mask, coarse


def _side_by_side(scores: torch.Tensor) -> torch.Tensor:
    rows, columns = scores.shape
    wide = scores.numpy().reshape(rows // 4, 4, columns).swapaxes(0, 1).reshape(4, -1)
    lacking = max(0, 4 * WIDTH - wide.shape[1])
    return torch.from_numpy(np.ascontiguousarray(np.pad(wide, ((0, 0), (0, lacking))) if lacking else wide))


def exact_solve(
    scores: torch.Tensor, n: int, m: int, exactly: bool, start: torch.Tensor | None, start_exponent: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.exact_solve` on CPU."""
    if m not in VECTOR_SIDES:
        return reference.exact_solve(scores, n, m, exactly, start, start_exponent)
    rows, columns = scores.shape if scores.ndim == 2 else (1, 1)
    if rows % m or columns % m or not 1 <= n < m or scores.dtype is not torch.float32:
        _refuse(scores, n, m)
    scores = scores.contiguous()
    tiles = (rows // m) * (columns // m)
    entries = tiles * m
    mask, numbers = empty((rows, columns), torch.bool), empty((2 * entries + tiles,), torch.int32)
    warm = start is not None and start_exponent is not None
    if start is not None and start_exponent is not None:
        check_start(tiles, m, start, start_exponent)
        np.concatenate([start.numpy().reshape(-1), start_exponent.numpy()], out=numbers.numpy())
    median = 2 * n == m and m in (4, 8, 16, 32)
    network = () if median else sorting_network(m)
    where = np.array(network, dtype=np.int64) if network else 0
    arguments = scores, mask, numbers, where, tiles, columns, len(network), n, exactly
    flags = over_bands(solve_kernel(m, median, warm), arguments, tiles, LANES, max(LANES, 16384 // (m * m)))
    if not _usable(flags, scores):
        return exact_solve(scores.abs(), n, m, exactly, start, start_exponent)

    # An operator's results may not share memory.
    return mask, numbers[: 2 * entries].view(2, tiles, m), numbers[2 * entries :].clone()


def exact_solve_integers(
    q: torch.Tensor, n: int, exactly: bool, u: torch.Tensor | None, v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.exact_solve_integers` on CPU."""
    start = check_integers(q, n, u, v)
    tiles, m, _ = q.shape
    warm = start is not None
    u, v = start or (
        torch.zeros(tiles, m, dtype=torch.int64, device="cpu"),
        torch.zeros(tiles, m, dtype=torch.int64, device="cpu"),
    )
    u, v = u.contiguous(), v.contiguous()
    mask = torch.zeros(tiles, m * m, dtype=torch.bool, device="cpu")
    arguments = q.contiguous(), mask, u, v, tiles, m, n, exactly, warm
    over_bands(integers_kernel(), arguments, tiles, 1, max(1, 4096 // (m * m)))
    return mask.view(tiles, m, m), u, v
