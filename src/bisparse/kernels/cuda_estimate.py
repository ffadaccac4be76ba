"""The 2:4 estimate of the output's gradient, transposed: read once and written once; in plain torch about forty passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["estimate_2to4"]

ESTIMATE_GROUPS, ESTIMATE_OUTPUTS = 16, 64


def estimate_2to4(gradient: Tensor, start: Tensor) -> Tensor:
    """`estimate.estimate_2to4` on a GPU."""
    gradient, start = gradient.contiguous(), start.contiguous()
    (tokens, outputs), groups = gradient.shape, start.shape[0]
    estimate = torch.empty((outputs, 4 * groups), dtype=gradient.dtype, device=gradient.device)
    if estimate.numel():
        estimate_kernel[(triton.cdiv(groups, ESTIMATE_GROUPS), triton.cdiv(outputs, ESTIMATE_OUTPUTS))](
            gradient, start, estimate, tokens, outputs, groups,
            BLOCK_GROUPS=ESTIMATE_GROUPS, BLOCK_OUTPUTS=ESTIMATE_OUTPUTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return estimate


@triton.jit
def estimate_kernel(  # type: ignore[no-untyped-def]
    gradient,
    start,
    estimate,
    tokens,
    outputs,
    groups,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The estimate of a block of groups and outputs, in the order of operations of the specification."""
    group = (tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)).to(tl.int64)[:, None]
    output = (tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)[None, :]
    there = (group < groups) & (output < outputs)
    uniform = tl.load(start + group * outputs + output, mask=there, other=0.0)
    place = gradient + 4 * group * outputs + output
    g0 = tl.load(place, mask=there & (4 * group < tokens), other=0.0).to(uniform.dtype)
    g1 = tl.load(place + outputs, mask=there & (4 * group + 1 < tokens), other=0.0).to(uniform.dtype)
    g2 = tl.load(place + 2 * outputs, mask=there & (4 * group + 2 < tokens), other=0.0).to(uniform.dtype)
    g3 = tl.load(place + 3 * outputs, mask=there & (4 * group + 3 < tokens), other=0.0).to(uniform.dtype)
    e0, e1, e2, e3 = estimate_group(g0, g1, g2, g3, uniform)
    # (groups, outputs, 2, 2): the last index is the lower bit of the token.
    four = tl.join(tl.join(e0, e2), tl.join(e1, e3)).to(estimate.dtype.element_ty)
    high = 2 * tl.arange(0, 2)[None, None, :, None]
    low = tl.arange(0, 2)[None, None, None, :]
    where = estimate + (output * 4 * groups + 4 * group)[:, :, None, None] + high + low
    tl.store(where, four, mask=there[:, :, None, None] & (high + low < 4))


@triton.jit
def estimate_group(g0, g1, g2, g3, uniform):  # type: ignore[no-untyped-def]
    """The estimate of four entries, float32, in the order of operations of the specification."""
    s0, s1, s2, s3 = tl.abs(g0), tl.abs(g1), tl.abs(g2), tl.abs(g3)
    low, high = tl.minimum(s0, s1), tl.maximum(s0, s1)
    other_low, other_high = tl.minimum(s2, s3), tl.maximum(s2, s3)
    rest = tl.minimum(high, other_high) + low + other_low
    total = s0 + s1 + s2 + s3
    tau = tl.where(tl.maximum(high, other_high) > rest, rest, 0.5 * total)
    certain0 = (s0 >= tau) & (s0 > 0)
    certain1 = (s1 >= tau) & (s1 > 0)
    certain2 = (s2 >= tau) & (s2 > 0)
    certain3 = (s3 >= tau) & (s3 > 0)
    one = certain0 | certain1 | certain2 | certain3
    two = (certain0 & certain1) | (certain2 & certain3) | ((certain0 | certain1) & (certain2 | certain3))
    reached0 = tl.where(certain0, 0.0, s0)
    reached1 = reached0 + tl.where(certain1, 0.0, s1)
    reached2 = reached1 + tl.where(certain2, 0.0, s2)
    first = uniform * tau
    second = tl.where(one, first, first + tau)
    # Two that are certain leave no threshold; below one that is infinite, no sum has passed and the last entry would be kept.
    sampled0 = (first < reached0) & (two == 0)
    sampled1 = (((reached0 <= first) & (first < reached1)) | ((reached0 <= second) & (second < reached1))) & (two == 0)
    sampled2 = (((reached1 <= first) & (first < reached2)) | ((reached1 <= second) & (second < reached2))) & (two == 0)
    sampled3 = (reached2 <= second) & (s3 > 0) & (two == 0)
    broken = total - total  # NaN where a gradient is not finite, which must not pass for a zero
    e0 = tl.where(certain0, g0, tl.where(sampled0, tl.where(g0 < 0, -tau, tau), 0.0)) + broken
    e1 = tl.where(certain1, g1, tl.where(sampled1, tl.where(g1 < 0, -tau, tau), 0.0)) + broken
    e2 = tl.where(certain2, g2, tl.where(sampled2, tl.where(g2 < 0, -tau, tau), 0.0)) + broken
    e3 = tl.where(certain3, g3, tl.where(sampled3, tl.where(g3 < 0, -tau, tau), 0.0)) + broken
    return e0, e1, e2, e3
