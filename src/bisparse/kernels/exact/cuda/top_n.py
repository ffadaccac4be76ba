"""The n largest entries of each group on a GPU, one entry per thread: an entry stays if fewer than n of its group precede it."""

# Triton reads the source of this function and types it itself.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["largest_of_groups"]


@triton.jit
def largest_of_groups(
    groups, mask, count, N: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """BLOCK groups of M entries; LANES is the power of two that M fits. Of equals the lower index comes first.

    HALF: float16 or bfloat16, compared as float32.
    """
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (group < count) & (lane < M)
    entry = tl.load(groups + group * M + lane, mask=inside, other=0)
    if HALF:
        entry = entry.to(tl.float32)
    before = tl.zeros([BLOCK, LANES], tl.int32)
    for k in tl.range(0, M):
        other = tl.load(groups + group * M + k, mask=group < count, other=0)
        if HALF:
            other = other.to(tl.float32)
        before += ((other > entry) | ((other == entry) & (lane > k))).to(tl.int32)
    tl.store(mask + group * M + lane, (before < N).to(tl.int8), mask=inside)
