"""The unbiased 2:4 estimate of a gradient: probabilities, systematic sampling, and its transpose, dense or packed, in one pass.

Each group g of 4 consecutive tokens of a column keeps at most two entries. Entry i is kept with probability
p_i = min(1, |g_i| / tau), with tau such that the p_i sum to 2, and has the value g_i / p_i, which is g_i or tau with g_i's sign:
of all unbiased estimates the one with the least variance. One uniform number u per group draws both: of the entries with p_i < 1,
those are kept at which the running sum of the |g_i| passes u tau and (1 + u) tau. Only sums and comparisons decide, so that
rounding cannot keep a third entry; it can change a probability by some 2**-24.

The uniforms are those of `philox.uniforms`: only a seed is read, and every device keeps the same entries.

Source: Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", ICLR 2023, arXiv 2203.10991; systematic
sampling after Madow (1949).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bisparse.kernels.mvue.philox import uniforms
from bisparse.kernels.sparse24.metadata import LAYOUT, MetadataLayout, check_layout, kept_sets, metadata_of
from bisparse.kernels.sparse24.positions import take_values

__all__ = ["estimate_2to4", "keep_probabilities", "pack_estimate"]

CHUNK_GROUPS = 64
"""Groups that plain torch estimates at a time: half the time of all at once, at 4096 x 1024."""

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define("estimate_2to4(Tensor gradient, Tensor seed, SymInt groups) -> Tensor")
_LIBRARY.define(f"pack_estimate_2to4(Tensor gradient, Tensor seed, SymInt groups, {LAYOUT}) -> Tensor")


def keep_probabilities(groups: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """The probability of keeping each of 4 entries: ``min(1, |g_i| / tau)``, with sum 2, or the number of non-zeros if less.

    >>> keep_probabilities(torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 0.0]])).tolist()
    [[0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.0]]
    """
    size = groups.abs()
    tau, certain, _ = _threshold(size)
    return torch.where(certain, 1.0, size / tau.unsqueeze(-1))


def _threshold(size: Float[Tensor, "*B 4"]) -> tuple[Float[Tensor, "*B"], Bool[Tensor, "*B 4"], Float[Tensor, "*B"]]:
    """tau, which entries it makes certain, never more than two, and the sum of all."""
    s0, s1, s2, s3 = size.unbind(-1)
    low, high = torch.minimum(s0, s1), torch.maximum(s0, s1)
    other_low, other_high = torch.minimum(s2, s3), torch.maximum(s2, s3)
    # The sum of all but the largest; the total less the largest would round them away next to a large one.
    rest = torch.minimum(high, other_high) + low + other_low
    total = s0 + s1 + s2 + s3
    # At most one entry can pass 1: then it is certain, and the others share what is left of the 2.
    tau = torch.where(torch.maximum(high, other_high) > rest, rest, 0.5 * total)
    smallest = torch.finfo(size.dtype)
    tau = tau.clamp(min=smallest.tiny * smallest.eps)  # which no zero reaches
    return tau, size >= tau.unsqueeze(-1), total


def estimate_2to4(gradient: Float[Tensor, "T O"], seed: Int64[Tensor, "1"], groups: int) -> Float[Tensor, "O T4"]:
    """The estimate, transposed: (O, 4 groups), 2:4 along its rows; tokens beyond the gradient's are zeros.

    Args:
        gradient: tokens by outputs. A group that holds NaN or an infinite number gives NaN.
        seed: of the draw, on the gradient's device; see `philox.draw_seed`.
        groups: at least a quarter of the tokens.
    """
    _check(gradient, seed, groups)
    estimate: Tensor = torch.ops.bisparse.estimate_2to4(gradient, seed, groups)
    return estimate


def pack_estimate(
    gradient: Float[Tensor, "T O"], seed: Int64[Tensor, "1"], groups: int, layout: MetadataLayout
) -> Float[Tensor, " K"]:
    """The packed form of `estimate_2to4`, in one pass: its values, (O, 2 groups) row by row, and then its metadata.

    A slot that is not in use holds zero. The metadata are O * groups / 4 words of 16 bits, viewed in the gradient's dtype;
    the layout must give each of them its own place. A group that is not finite keeps its first two entries, as NaN.

    Args:
        gradient: float16 or bfloat16.
        groups: divisible by 4.
        layout: of matrices of the estimate's shape, (O, 4 groups).
    """
    _check(gradient, seed, groups)
    if gradient.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"an estimate is packed in float16 or bfloat16, not in {gradient.dtype}")
    if groups % 4:
        raise ValueError(f"{groups} groups do not fill words of metadata: 4 must divide them")
    check_layout(layout, gradient.shape[1], 4 * groups)
    packed: Tensor = torch.ops.bisparse.pack_estimate_2to4(gradient, seed, groups, *layout)
    return packed


def _check(gradient: Tensor, seed: Tensor, groups: int) -> None:
    if 4 * groups < gradient.shape[0]:
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} needs a group for every 4 tokens, not {groups} in all")
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise ValueError(f"a seed is one number of int64, of shape (1,), not of {seed.dtype} and shape {tuple(seed.shape)}")


def reference_estimate_2to4(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    """The specification of `estimate_2to4`."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    start = uniforms(seed, groups, gradient.shape[1], wide)
    estimate = gradient.new_empty((gradient.shape[1], 4 * groups))
    for first in range(0, groups, CHUNK_GROUPS):  # so that intermediate results stay in the cache
        last = first + CHUNK_GROUPS
        estimate[:, 4 * first : 4 * last] = estimate_by(start[first:last], gradient[4 * first : 4 * last])
    return estimate


def estimate_by(start: Float[Tensor, "G O"], gradient: Float[Tensor, "T O"]) -> Float[Tensor, "O T4"]:
    """The estimate that uniform numbers in [0, 1) draw, computed in their dtype."""
    tokens, out = gradient.shape
    padded = torch.nn.functional.pad(gradient.to(start.dtype), (0, 0, 0, 4 * start.shape[0] - tokens))
    groups = padded.unflatten(0, (-1, 4)).transpose(1, 2)  # (G, O, 4)
    size = groups.abs()
    tau, certain, total = _threshold(size)
    number = certain.sum(-1)
    # Two thresholds, or one where an entry is certain; where two are, none that a sum could pass.
    first = torch.where(number == 2, -1.0, start * tau)
    second = torch.where(number == 0, start * tau + tau, first)
    reached, kept = torch.zeros_like(tau), []
    for part in torch.where(certain, 0.0, size).unbind(-1):
        before, reached = reached, reached + part
        kept.append((before <= first) & (first < reached) | (before <= second) & (second < reached))
    # All thresholds are passed in the end, whatever the sum was rounded to.
    kept[-1] = (before <= second) & (part > 0)
    value = torch.copysign(torch.maximum(size, tau.unsqueeze(-1)), groups)
    # NaN where a gradient is not finite, which must not pass for a zero.
    estimate: Tensor = torch.where(certain | torch.stack(kept, dim=-1), value, 0.0) + (total - total).unsqueeze(-1)
    return estimate.transpose(0, 1).reshape(out, 4 * start.shape[0]).to(gradient.dtype).contiguous()


def reference_pack_estimate_2to4(gradient: Tensor, seed: Tensor, groups: int, *layout: Any) -> Tensor:
    """The specification of `pack_estimate`."""
    own = MetadataLayout(*layout)
    estimate = torch.ops.bisparse.estimate_2to4(gradient, seed, groups)
    broken = estimate.isnan().unflatten(1, (-1, 4)).all(-1, keepdim=True)
    first_two = torch.arange(4, device=gradient.device) < 2
    kept = torch.where(broken, first_two, estimate.unflatten(1, (-1, 4)) != 0).flatten(1)
    positions = own.codes[kept_sets(kept).long()]
    packed: Tensor = take_values(estimate, positions, tail=metadata_of(positions, own).view(estimate.dtype))
    return packed


@torch.library.register_fake("bisparse::estimate_2to4")
def _(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    return gradient.new_empty((gradient.shape[1], 4 * groups))


@torch.library.register_fake("bisparse::pack_estimate_2to4")
def _(gradient: Tensor, seed: Tensor, groups: int, *_: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[1] * (2 * groups) + gradient.shape[1] * groups // 4)


_LIBRARY.impl("estimate_2to4", reference_estimate_2to4, "CompositeExplicitAutograd")
_LIBRARY.impl("pack_estimate_2to4", reference_pack_estimate_2to4, "CompositeExplicitAutograd")


def _estimate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tokens = inputs[0].shape[0]


def _estimate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    """The derivative of the expectation, which is the gradient itself: that of a draw would be biased."""
    return upstream.t()[: ctx.tokens], None, None


def _no_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("a packed estimate has no derivative: differentiate `estimate_2to4`, or pack gradient.detach()")


torch.library.register_autograd("bisparse::estimate_2to4", _estimate_backward, setup_context=_estimate_context)
torch.library.register_autograd("bisparse::pack_estimate_2to4", _no_gradient)
