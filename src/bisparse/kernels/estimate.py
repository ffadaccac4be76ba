"""The unbiased 2:4 estimate of a gradient as one operator: probabilities, systematic sampling, and the transpose that is packed.

Each group g of 4 consecutive tokens of a column keeps at most two entries. Entry i is kept with probability
p_i = min(1, |g_i| / tau), with tau such that the p_i sum to 2, and has the value g_i / p_i, which is g_i or tau with g_i's sign:
of all unbiased estimates the one with the least variance. One uniform number u a group draws both: of the entries that are not
certain, the one is kept with which the running sum of the |g_i| passes u tau, and that with which it passes (1 + u) tau. Only
sums and comparisons decide, so that no rounding can keep a third entry; it can move a probability by some 2**-24.

The uniforms are those of `philox.uniforms`: a seed is all that is read of them, and every device keeps the same entries.

Source: Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", ICLR 2023, arXiv 2203.10991; systematic
sampling after Madow (1949).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bisparse.kernels.philox import uniforms

__all__ = ["estimate_2to4", "keep_probabilities"]

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define("estimate_2to4(Tensor gradient, Tensor seed, SymInt groups) -> Tensor")


def keep_probabilities(groups: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """The probability of keeping each of 4 entries: ``min(1, |g_i| / tau)``, summing to 2, or to the non-zeros where fewer.

    >>> keep_probabilities(torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 0.0]])).tolist()
    [[0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.0]]
    """
    size = groups.abs()
    tau, certain = _threshold(size)
    return torch.where(certain, 1.0, size / tau.unsqueeze(-1))


def _threshold(size: Float[Tensor, "*B 4"]) -> tuple[Float[Tensor, "*B"], Bool[Tensor, "*B 4"]]:
    """tau, and which entries it makes certain; never more than two."""
    s0, s1, s2, s3 = size.unbind(-1)
    low, high = torch.minimum(s0, s1), torch.maximum(s0, s1)
    other_low, other_high = torch.minimum(s2, s3), torch.maximum(s2, s3)
    # The sum of all but the largest; that of all less the largest would lose them beside a large one.
    rest = torch.minimum(high, other_high) + low + other_low
    # At most one entry can pass 1: then it is certain, and the others share what is left of the 2.
    tau = torch.where(torch.maximum(high, other_high) > rest, rest, 0.5 * (s0 + s1 + s2 + s3))
    smallest = torch.finfo(size.dtype)
    tau = tau.clamp(min=smallest.tiny * smallest.eps)  # which no zero reaches
    return tau, size >= tau.unsqueeze(-1)


def estimate_2to4(gradient: Float[Tensor, "T O"], seed: Int64[Tensor, "1"], groups: int) -> Float[Tensor, "O T4"]:
    """The estimate, transposed: (O, 4 groups), 2:4 along its rows; tokens beyond the gradient's count as zeros.

    Args:
        gradient: tokens by outputs. A group that holds NaN or an infinite number gives NaN.
        seed: of the draw, on the gradient's device; see `philox.draw_seed`.
        groups: 4 of them at least as many as tokens.
    """
    _check(gradient, seed, groups)
    estimate: Tensor = torch.ops.bisparse.estimate_2to4(gradient, seed, groups)
    return estimate


def _check(gradient: Tensor, seed: Tensor, groups: int) -> None:
    if 4 * groups < gradient.shape[0]:
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} needs a group for every 4 tokens, not {groups} in all")
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise ValueError(f"a seed is one number of int64, of shape (1,), not of {seed.dtype} and shape {tuple(seed.shape)}")


def reference_estimate_2to4(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    """The specification of `estimate_2to4`."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    estimate: Tensor = estimate_by(uniforms(seed, groups, gradient.shape[1], wide), gradient)
    return estimate


def estimate_by(start: Float[Tensor, "G O"], gradient: Float[Tensor, "T O"]) -> Float[Tensor, "O T4"]:
    """The estimate that uniform numbers in [0, 1) draw, computed in their dtype."""
    tokens, out = gradient.shape
    padded = torch.nn.functional.pad(gradient.to(start.dtype), (0, 0, 0, 4 * start.shape[0] - tokens))
    groups = padded.unflatten(0, (-1, 4)).transpose(1, 2)  # (G, O, 4)
    size = groups.abs()
    tau, certain = _threshold(size)
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
    total = size.sum(-1, keepdim=True)
    value = torch.copysign(torch.maximum(size, tau.unsqueeze(-1)), groups)
    # NaN where a gradient is not finite, which must not pass for a zero.
    estimate: Tensor = torch.where(certain | torch.stack(kept, dim=-1), value, 0.0) + (total - total)
    return estimate.transpose(0, 1).reshape(out, 4 * start.shape[0]).to(gradient.dtype).contiguous()


@torch.library.register_fake("bisparse::estimate_2to4")
def _(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    return gradient.new_empty((gradient.shape[1], 4 * groups))


def _on_a_cpu(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    from bisparse.kernels import cpu_estimate  # numba takes a second to import

    return cpu_estimate.estimate_2to4(gradient, seed, groups)


def _on_a_gpu(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    from bisparse.kernels import cuda_estimate

    if gradient.dtype == torch.float64:  # for tests of arithmetic, not worth a kernel
        return reference_estimate_2to4(gradient, seed, groups)
    with torch.cuda.device_of(gradient):
        return cuda_estimate.estimate_2to4(gradient, seed, groups)


_LIBRARY.impl("estimate_2to4", reference_estimate_2to4, "CompositeExplicitAutograd")
_LIBRARY.impl("estimate_2to4", _on_a_cpu, "CPU")
if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    _LIBRARY.impl("estimate_2to4", _on_a_gpu, "CUDA")
