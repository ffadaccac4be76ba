"""The exact solver on a GPU: Triton kernels over all tiles.

Two launches: prices of all tiles (`prices`), then their masks, balanced (`repair`); at 2:4 one launch (`enumerate_2to4`).
Nothing is copied to the host or synchronised, so no kernel can raise: a tile with a NaN, infinite or negative score is returned
as `NEEDS_EXACT`, and `Exact`, which solves coarse tiles again, raises there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from bisparse.kernels.exact import reference
from bisparse.kernels.exact.cpu.enumerate_2to4 import mask_bits
from bisparse.kernels.exact.cuda.enumerate_2to4 import middle_masks
from bisparse.kernels.exact.cuda.prices import bisected_prices, swept_prices
from bisparse.kernels.exact.cuda.repair import balanced_masks
from bisparse.kernels.exact.cuda.top_n import largest_of_groups
from bisparse.kernels.exact.schema import NEEDS_EXACT, check_integers, check_matrix, check_start
from bisparse.kernels.exact.sorting_network import sorting_network

__all__ = [
    "exact_mask",
    "exact_mask_of_magnitudes",
    "exact_solve",
    "exact_solve_integers",
    "keep_largest",
    "mask_words",
]

SIDES = (4, 8, 16, 32, 64)
NETWORK_SIDES = (4, 8, 16, 32)
"""A line of 64 does not fit a thread's registers, and its network of 543 comparators takes a minute to compile."""
COLD_ALTERNATIONS = 8
WARM_ALTERNATIONS = 2
CLAMPED_ALTERNATIONS = 3
WIDE_ALTERNATIONS = 4
MIDDLE_BYTES = 2048
"""Bytes that a program reads of each of a band's four rows: 16 per thread."""
GROUP_ENTRIES = 512
SWEEP_LANES = 128
REPAIR_LANES = 32
FAR, LIMIT = 1 << 30, 1 << 28
"""A tile whose prices move by this much in total might overflow 32 bits: it is returned as coarse."""
WIDE_FAR = 1 << 62
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def keep_largest(groups: Tensor, n: int) -> Tensor:
    """`ops.keep_largest` on a GPU."""
    groups = groups.contiguous()
    count, m = groups.shape
    mask = torch.empty(groups.shape, dtype=torch.bool, device=groups.device)
    if mask.numel():
        lanes = triton.next_power_of_2(m)
        block = max(1, GROUP_ENTRIES // lanes)
        largest_of_groups[(triton.cdiv(count, block),)](
            groups, mask.view(torch.int8), count, N=n, M=m, LANES=lanes, BLOCK=block,
            HALF=groups.dtype in (torch.float16, torch.bfloat16), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return mask


def exact_mask(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
    """`ops.exact_mask` on a GPU; float16 and bfloat16 are read as they are."""
    if (n, m) != (2, 4) or scores.dtype not in DTYPES:
        mask, _, exponent = exact_solve(scores, n, m, exactly, None, None)
        return mask, exponent == NEEDS_EXACT
    return _middle(scores, exactly, magnitudes=False)


def exact_mask_of_magnitudes(weight: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
    """`ops.exact_mask_of_magnitudes` on a GPU; float16 and bfloat16 are read as they are."""
    return _middle(weight if weight.dtype in DTYPES else weight.float(), exactly, magnitudes=True)


def _middle(scores: Tensor, exactly: bool, magnitudes: bool) -> tuple[Tensor, Tensor]:
    scores = scores.contiguous()
    rows, columns = scores.shape
    across = columns // 4
    mask = torch.empty((rows, columns), dtype=torch.bool, device=scores.device)
    coarse = torch.empty(rows // 4 * across, dtype=torch.bool, device=scores.device)
    block = MIDDLE_BYTES // (4 * scores.element_size())
    if coarse.numel():
        middle_masks[(rows // 4, triton.cdiv(across, block))](
            scores, mask_words(scores.device), mask.view(torch.int32), coarse.view(torch.int8), columns, across,
            BLOCK=block, EXACTLY=exactly, MAGNITUDES=magnitudes, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return mask, coarse


@cache
def mask_words(device: torch.device) -> Tensor:
    """The table of 2:4-T masks, as bits, on a device; see `mask_bits`."""
    return torch.from_numpy(mask_bits()).to(device)


def exact_solve(
    scores: Tensor, n: int, m: int, exactly: bool, start: Tensor | None, start_exponent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.exact_solve` on a GPU; float16 and bfloat16 are read as they are."""
    if m not in SIDES or scores.dtype not in DTYPES:
        return reference.exact_solve(scores, n, m, exactly, start, start_exponent)
    check_matrix(scores, n, m)
    scores = scores.contiguous()
    rows, columns = scores.shape
    across, tiles = columns // m, (rows // m) * (columns // m)
    mask = torch.empty((rows, columns), dtype=torch.bool, device=scores.device)
    prices = torch.empty((2, tiles, m), dtype=torch.int32, device=scores.device)
    exponents = torch.empty(tiles, dtype=torch.int32, device=scores.device)
    if tiles == 0:
        return mask, prices, exponents
    warm = start is not None and start_exponent is not None
    if start is not None and start_exponent is not None:
        check_start(tiles, m, start, start_exponent)
    start = start.to(torch.int32).contiguous() if warm and start is not None else prices
    start_exponent = start_exponent.to(torch.int32).contiguous() if warm and start_exponent is not None else exponents
    if m in NETWORK_SIDES:
        side = SWEEP_LANES // m
        swept_prices[(triton.cdiv(tiles, side),)](
            scores, start, start_exponent, prices, exponents, tiles, across, columns,
            ALTERNATIONS=WARM_ALTERNATIONS if warm else COLD_ALTERNATIONS, CLAMPED_ALTERNATIONS=CLAMPED_ALTERNATIONS,
            NETWORK=sorting_network(m), N=n, M=m, T=side, FREE=exactly, WARM=warm,
            num_warps=SWEEP_LANES // 32, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        bisected_prices[(tiles,)](
            scores, start, start_exponent, prices, exponents, tiles, across, columns,
            ALTERNATIONS=WARM_ALTERNATIONS if warm else COLD_ALTERNATIONS, STEPS=27, N=n, M=m, FREE=exactly, WARM=warm,
            WIDE=False, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    side = max(1, REPAIR_LANES // m)
    balanced_masks[(triton.cdiv(tiles, side),)](
        scores, prices, exponents, mask.view(torch.int8), tiles, across, columns,
        FAR=FAR, LIMIT=LIMIT, N=n, M=m, T=side, FREE=exactly, WIDE=False, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return mask, prices, exponents


def exact_solve_integers(q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.exact_solve_integers` on a GPU."""
    if q.ndim != 3 or q.shape[1] not in SIDES or len(q) == 0:
        return reference.exact_solve_integers(q, n, exactly, u, v)
    given = check_integers(q, n, u, v)
    tiles, m, _ = q.shape
    q = q.contiguous()
    mask = torch.empty((tiles, m, m), dtype=torch.bool, device=q.device)
    prices = torch.empty((2, tiles, m), dtype=torch.int64, device=q.device)
    warm = given is not None
    start = prices if given is None else torch.stack(given)
    # Tiles stacked along the rows are a matrix one tile wide.
    bisected_prices[(tiles,)](
        q, start, prices, prices, prices, tiles, 1, m,
        ALTERNATIONS=0 if warm else WIDE_ALTERNATIONS, STEPS=58, N=n, M=m, FREE=exactly, WARM=warm,
        WIDE=True, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    side = max(1, REPAIR_LANES // m)
    balanced_masks[(triton.cdiv(tiles, side),)](
        q, prices, prices, mask.view(torch.int8), tiles, 1, m,
        FAR=WIDE_FAR, LIMIT=WIDE_FAR, N=n, M=m, T=side, FREE=exactly, WIDE=True, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return mask, prices[0], prices[1]
