"""The exact solver on CPU: numba kernels over bands of tiles, registered for torch's "cpu" device.

Nothing is left to torch's own threads: they spin for a while after their work and take the cores from ours.
"""

from __future__ import annotations

import numpy as np
import torch

from bisparse.kernels import ops
from bisparse.kernels.cpu_bands import (
    FOUND_COARSE,
    MIDDLE_CHUNK,
    UNBOUNDED,
    coarse_tiles,
    largest_kernel,
    middle_kernel,
    solve_kernel,
)  # fmt: skip
from bisparse.kernels.general import integers_kernel
from bisparse.kernels.memory import empty
from bisparse.kernels.middle import WIDTH
from bisparse.kernels.networks import sorting_network
from bisparse.kernels.threads import over_bands
from bisparse.kernels.vectors import LANES

VECTOR_SIDES = (4, 8, 16, 32, 64)
PAST_CACHES = 1 << 24
"""Bytes of a mask that is larger than the caches, where it would be read only to be overwritten."""
NOTHING = np.zeros((0, 2), np.int64)


def _usable(worst: list[int], scores: torch.Tensor) -> bool:
    """Whether the kernels could use the scores as they are; raises for scores that no solver takes."""
    if max(worst, default=0) < UNBOUNDED:
        return True
    ops.check_scores(scores)
    return False  # only -0.0


def keep_largest(groups: torch.Tensor, n: int) -> torch.Tensor:
    """`ops.keep_largest` on CPU."""
    if groups.dtype in (torch.float16, torch.bfloat16):
        groups = groups.float()
    groups = groups.contiguous()
    count, entries = groups.shape
    mask = empty((count, entries), torch.bool)
    over_bands(largest_kernel(groups.dtype), (groups, mask, count, entries, n), count, 1, max(1, 65536 // max(entries, 1)))
    return mask


def exact_mask(scores: torch.Tensor, n: int, m: int, exactly: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ops.exact_mask` on CPU."""
    if (n, m) != (2, 4):
        solved, _, exponent = exact_solve(scores, n, m, exactly, None, None)
        return solved, exponent == ops.COARSE
    rows, columns = scores.shape
    # Narrow matrices are laid side by side, four rows in all, so that the lanes are full.
    beside = columns < 4 * MIDDLE_CHUNK
    wide = _side_by_side(scores) if beside else scores.contiguous()
    height, width = wide.shape
    mask = empty((height, width), torch.bool)
    past_caches = height * width >= PAST_CACHES and width % (4 * WIDTH) == 0 and mask.data_ptr() % (4 * WIDTH) == 0
    arguments = wide, mask, height, width, past_caches, exactly
    if height == 4:
        seen = over_bands(middle_kernel(), arguments, width // 4, MIDDLE_CHUNK, 4096)
    else:
        seen = over_bands(middle_kernel(), arguments, height // 4, 1, max(1, 16384 // width))
    worst = max(seen, default=0)
    coarse = None
    if worst >= UNBOUNDED:
        if not _usable([one % FOUND_COARSE for one in seen], scores):
            return exact_mask(scores.abs(), n, m, exactly)
        flags = np.zeros(height * width // 16, np.bool_)
        coarse_tiles(wide.numpy(), flags)
        coarse = torch.from_numpy(flags[: scores.numel() // 16])
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
        return ops.reference_exact_solve(scores, n, m, exactly, start, start_exponent)
    rows, columns = scores.shape
    scores = scores.contiguous()
    tiles = (rows // m) * (columns // m)
    mask, prices = empty((rows, columns), torch.bool), empty((2, tiles, m), torch.int32)
    exponents = empty((tiles,), torch.int32)
    warm = start is not None and start_exponent is not None
    if start is not None and start_exponent is not None:
        np.copyto(prices.numpy(), start.numpy())
        np.copyto(exponents.numpy(), start_exponent.numpy())
    median = 2 * n == m and m in (4, 8, 16, 32)
    network = NOTHING if median else np.array(sorting_network(m), dtype=np.int64).reshape(-1, 2)
    arguments = scores, mask, prices, exponents, network, tiles, columns, len(network), n, exactly, warm
    worst = over_bands(solve_kernel(m), arguments, tiles, LANES, max(LANES, 16384 // (m * m)))
    if not _usable(worst, scores):
        return exact_solve(scores.abs(), n, m, exactly, start, start_exponent)
    return mask, prices, exponents


def exact_solve_integers(
    q: torch.Tensor, n: int, exactly: bool, u: torch.Tensor | None, v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.exact_solve_integers` on CPU."""
    tiles, m, _ = q.shape
    warm = u is not None and v is not None
    u, v = (torch.zeros(tiles, m, dtype=torch.int64) if start is None else start.clone().contiguous() for start in (u, v))
    mask = torch.zeros(tiles, m * m, dtype=torch.bool)
    arguments = q.contiguous(), mask, u, v, tiles, m, n, exactly, warm
    over_bands(integers_kernel(), arguments, tiles, 1, max(1, 4096 // (m * m)))
    return mask.view(tiles, m, m), u, v
