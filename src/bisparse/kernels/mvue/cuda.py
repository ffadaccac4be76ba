"""The 2:4 estimate of the output's gradient, transposed: the gradient is read once, and the result written once.

A lane owns 16 consecutive tokens of an output: four groups, drawn by one Philox counter. Only the gradient and the seed are
read. In half precision the packed estimate takes 3.6 bytes per entry in all, with its positions and metadata; uniforms in memory,
a dense estimate and its compression take 9.1 at least. Adjacent lanes of a warp own adjacent outputs, as in the gradient; the
results, which are transposed, pass through shared memory.
"""

# Triton reads the source of these functions and types them itself; its tuples grow by addition only.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bisparse.kernels.sparse24.cuda_metadata import write_metadata
from bisparse.kernels.sparse24.metadata import MetadataLayout

__all__ = ["estimate_2to4", "pack_estimate_2to4"]

WORDS, OUTPUTS = 4, 64
"""Lanes of a program: results are written 64 bytes at a time or more, gradients read 128."""


def estimate_2to4(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    """`ops.estimate_2to4` on a GPU."""
    gradient = gradient.contiguous()
    tokens, outputs = gradient.shape
    estimate = torch.empty((outputs, 4 * groups), dtype=gradient.dtype, device=gradient.device)
    if estimate.numel():
        estimate_kernel[(triton.cdiv(groups, 4 * WORDS), triton.cdiv(outputs, OUTPUTS))](
            gradient, seed, estimate, tokens, outputs, groups,
            WORDS=WORDS, OUTPUTS=OUTPUTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return estimate


def pack_estimate_2to4(gradient: Tensor, seed: Tensor, groups: int, *layout: Any) -> Tensor:
    """`ops.pack_estimate` on a GPU."""
    gradient, own = gradient.contiguous(), MetadataLayout(*layout)
    (tokens, outputs), words = gradient.shape, groups // 4
    packed = torch.empty(9 * outputs * words, dtype=gradient.dtype, device=gradient.device)
    positions = torch.empty((outputs, groups), dtype=torch.uint8, device=gradient.device)
    if packed.numel():
        pack_kernel[(triton.cdiv(words, WORDS), triton.cdiv(outputs, OUTPUTS))](
            gradient, seed, own.codes, packed, positions.view(torch.int32), tokens, outputs, words,
            WORDS=WORDS, OUTPUTS=OUTPUTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        write_metadata(positions, own, packed.view(torch.int16)[8 * outputs * words :])
    return packed


@triton.jit
def estimate_kernel(  # type: ignore[no-untyped-def]
    gradient,
    seed,
    estimate,
    tokens,
    outputs,
    groups,
    WORDS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """The estimate of a block of words and outputs."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[:, None]
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    uniforms = draw_uniforms(seed, word, output)
    e = ()
    for k in tl.static_range(4):
        g0, g1, g2, g3 = load_group(gradient, 16 * word + 4 * k, output, tokens, outputs)
        e = e + estimate_group(g0, g1, g2, g3, uniforms[k])
    even = join_eight(e[0], e[2], e[4], e[6], e[8], e[10], e[12], e[14])
    odd = join_eight(e[1], e[3], e[5], e[7], e[9], e[11], e[13], e[15])
    sixteen = tl.reshape(tl.join(even, odd), [WORDS, OUTPUTS, 16]).to(estimate.dtype.element_ty)
    token = tl.arange(0, 16)[None, None, :]
    start = (output.to(tl.int64) * groups + 4 * word) * 4
    in_bounds = ((output < outputs)[:, :, None]) & (4 * word[:, :, None] + token // 4 < groups)
    tl.store(estimate + start[:, :, None] + token, sixteen, mask=in_bounds)


@triton.jit
def pack_kernel(  # type: ignore[no-untyped-def]
    gradient,
    seed,
    codes,
    values,
    positions,
    tokens,
    outputs,
    words,
    WORDS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Values and positions of a block of words and outputs; `positions` are seen as one int32 for the four groups of a word."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[:, None]
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    uniforms = draw_uniforms(seed, word, output)
    v = ()
    four = word * 0 + output * 0
    for k in tl.static_range(4):
        g0, g1, g2, g3 = load_group(gradient, 16 * word + 4 * k, output, tokens, outputs)
        first, second, code = pack_group(g0, g1, g2, g3, uniforms[k], codes)
        v = v + (first, second)
        four |= code << (8 * k)
    in_bounds = (word < words) & (output < outputs)
    eight = join_eight(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]).to(values.dtype.element_ty)
    start = (output.to(tl.int64) * words + word) * 8
    slot = tl.arange(0, 8)[None, None, :]
    tl.store(values + start[:, :, None] + slot, eight, mask=in_bounds[:, :, None] & (slot < 8))
    tl.store(positions + output.to(tl.int64) * words + word, four, mask=in_bounds)


@triton.jit
def pack_group(g0, g1, g2, g3, uniform, codes):  # type: ignore[no-untyped-def]
    """The values of a group's two slots, and its positions."""
    kept, tau, broken = sample_group(g0, g1, g2, g3, uniform)
    entry = tl.load(codes + kept).to(tl.int32)
    first = tl.where((entry & 2) != 0, tl.where((entry & 1) != 0, g3, g2), tl.where((entry & 1) != 0, g1, g0))
    second = tl.where((entry & 8) != 0, tl.where((entry & 4) != 0, g3, g2), tl.where((entry & 4) != 0, g1, g0))
    first = tl.where((entry & 16) != 0, kept_value(first, tau) + broken, 0.0)
    second = tl.where((entry & 32) != 0, kept_value(second, tau) + broken, 0.0)
    return first, second, entry


@triton.jit
def draw_uniforms(seed, word, output):  # type: ignore[no-untyped-def]
    """`philox.uniforms` of the four groups of a word."""
    x0, x1, x2, x3 = tl.philox(tl.load(seed), output, word, word * 0, word * 0)
    unit = 2.0**-24
    u0, u1 = (x0 >> 8).to(tl.float32) * unit, (x1 >> 8).to(tl.float32) * unit
    return u0, u1, (x2 >> 8).to(tl.float32) * unit, (x3 >> 8).to(tl.float32) * unit


@triton.jit
def load_group(gradient, token, output, tokens, outputs):  # type: ignore[no-untyped-def]
    """The four entries from a token on, zero beyond the last."""
    in_bounds = output < outputs
    place = gradient + token.to(tl.int64) * outputs + output
    g0 = tl.load(place, mask=in_bounds & (token < tokens), other=0.0).to(tl.float32)
    g1 = tl.load(place + outputs, mask=in_bounds & (token + 1 < tokens), other=0.0).to(tl.float32)
    g2 = tl.load(place + 2 * outputs, mask=in_bounds & (token + 2 < tokens), other=0.0).to(tl.float32)
    g3 = tl.load(place + 3 * outputs, mask=in_bounds & (token + 3 < tokens), other=0.0).to(tl.float32)
    return g0, g1, g2, g3


@triton.jit
def sample_group(g0, g1, g2, g3, uniform):  # type: ignore[no-untyped-def]
    """The kept set of four entries, bit j for entry j, tau, and what adds NaN; operation by operation as the specification."""
    s0, s1, s2, s3 = tl.abs(g0), tl.abs(g1), tl.abs(g2), tl.abs(g3)
    low, high = tl.minimum(s0, s1), tl.maximum(s0, s1)
    other_low, other_high = tl.minimum(s2, s3), tl.maximum(s2, s3)
    largest, middle = tl.maximum(high, other_high), tl.minimum(high, other_high)
    rest = middle + low + other_low
    total = s0 + s1 + s2 + s3
    smallest = tl.full([], 2.0**-149, tl.float32)  # a plain number would be a double in Triton 3.6
    tau = tl.maximum(tl.where(largest > rest, rest, 0.5 * total), smallest)
    one, two = largest >= tau, tl.maximum(middle, tl.maximum(low, other_low)) >= tau
    certain0, certain1, certain2 = s0 >= tau, s1 >= tau, s2 >= tau
    reached0 = tl.where(certain0, 0.0, s0)
    reached1 = reached0 + tl.where(certain1, 0.0, s1)
    reached2 = reached1 + tl.where(certain2, 0.0, s2)
    first = uniform * tau
    second = tl.where(one, first, first + tau)
    last = tl.where(s3 > 0, 8, 0)
    sampled = tl.where(first < reached0, 1, tl.where(first < reached1, 2, tl.where(first < reached2, 4, last)))
    sampled |= tl.where(second < reached0, 1, tl.where(second < reached1, 2, tl.where(second < reached2, 4, last)))
    kept = tl.where(certain0, 1, 0) | tl.where(certain1, 2, 0) | tl.where(certain2, 4, 0) | tl.where(s3 >= tau, 8, 0)
    broken = total - total  # NaN where a gradient is not finite, which must not pass for a zero
    return tl.where(broken == 0, kept | tl.where(two, 0, sampled), 3), tau, broken


@triton.jit
def kept_value(entry, tau):  # type: ignore[no-untyped-def]
    """``g / p``: a certain entry as it is, another's sign with tau."""
    size = tl.maximum(tl.abs(entry), tau)
    return (size.to(tl.int32, bitcast=True) | (entry.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def estimate_group(g0, g1, g2, g3, uniform):  # type: ignore[no-untyped-def]
    """The estimate of four entries."""
    kept, tau, broken = sample_group(g0, g1, g2, g3, uniform)
    e0 = tl.where((kept & 1) != 0, kept_value(g0, tau), 0.0) + broken
    e1 = tl.where((kept & 2) != 0, kept_value(g1, tau), 0.0) + broken
    e2 = tl.where((kept & 4) != 0, kept_value(g2, tau), 0.0) + broken
    e3 = tl.where((kept & 8) != 0, kept_value(g3, tau), 0.0) + broken
    return e0, e1, e2, e3


@triton.jit
def join_eight(x0, x1, x2, x3, x4, x5, x6, x7):  # type: ignore[no-untyped-def]
    """Eight tensors along a new last dimension, in this order."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), [x0.shape[0], x0.shape[1], 8])
