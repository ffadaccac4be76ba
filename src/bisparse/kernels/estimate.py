"""The unbiased 2:4 estimate of a gradient as one operator: probabilities, systematic sampling, and the transpose that is packed.

Each group g of 4 consecutive tokens of a column keeps at most two entries. Entry i is kept with probability
p_i = min(1, |g_i| / tau), with tau such that the p_i sum to 2, and has the value g_i / p_i: of all unbiased estimates the one
with the least variance. One uniform number u a group draws both: entry i is kept when the running sum of the p_i passes u or
u + 1. The uniforms are an argument, so that the draw is torch's own and every device keeps the same entries.

Source: Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", ICLR 2023, arXiv 2203.10991; systematic
sampling after Madow (1949).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["estimate_2to4", "keep_probabilities"]

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define("estimate_2to4(Tensor gradient, Tensor start) -> Tensor")


def keep_probabilities(groups: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """The probability of keeping each of 4 entries: ``min(1, |g_i| / tau)``, summing to 2, or to the non-zeros where fewer.

    >>> keep_probabilities(torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 0.0]])).tolist()
    [[0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.0]]
    """
    size = groups.abs()
    one, two, three, four = size.unbind(-1)
    total = (one + two + three + four).unsqueeze(-1)
    largest, where = size.max(-1, keepdim=True)
    rest = total - largest
    # At most one entry can pass 1: then it is certain, and the others share what is left of the 2.
    clipped = largest > rest
    probability = torch.where(clipped, size / _nonzero(rest), 2 * size / _nonzero(total)).clamp(max=1.0)
    certain = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, where, True)
    return torch.where(clipped & certain, 1.0, probability)


def estimate_2to4(gradient: Float[Tensor, "T O"], start: Float[Tensor, "G O"]) -> Float[Tensor, "O T4"]:
    """The estimate, transposed: (O, 4 G), 2:4 along its rows; tokens beyond the gradient's count as zeros.

    Args:
        gradient: tokens by outputs. A group that holds NaN or an infinite number gives NaN.
        start: a uniform number in [0, 1) for each group and output, float32, or float64 for a float64 gradient. 4 G must reach T.
    """
    if start.ndim != 2 or start.shape[1] != gradient.shape[1] or 4 * start.shape[0] < gradient.shape[0]:
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} needs a start for each group, not {tuple(start.shape)}")
    estimate: Tensor = torch.ops.bisparse.estimate_2to4(gradient, start)
    return estimate


def reference_estimate_2to4(gradient: Tensor, start: Tensor) -> Tensor:
    """The specification of `estimate_2to4`."""
    tokens, out = gradient.shape
    padded = torch.nn.functional.pad(gradient.to(start.dtype), (0, 0, 0, 4 * start.shape[0] - tokens))
    groups = padded.unflatten(0, (-1, 4)).transpose(1, 2)  # (G, O, 4)
    probability = keep_probabilities(groups)
    certain = probability == 1
    reached = torch.where(certain, 0, probability).cumsum(-1)
    # The sum is a whole number but for rounding, which must not add or lose a draw.
    reached[..., -1:] = reached[..., -1:].round()
    # Entry i is kept where a whole number lies in (reached_(i-1) - start, reached_i - start]; the floor counts them.
    passed = torch.floor(reached - start.unsqueeze(-1))
    before = torch.cat([torch.floor(-start.unsqueeze(-1)), passed[..., :-1]], dim=-1)
    kept = certain | ((passed > before) & (probability > 0))
    total = groups.abs().sum(-1, keepdim=True)
    # NaN where a gradient is not finite, which must not pass for a zero.
    estimate: Tensor = torch.where(kept, groups / _nonzero(probability), 0.0) + (total - total)
    return estimate.transpose(0, 1).reshape(out, 4 * start.shape[0]).to(gradient.dtype).contiguous()


def _nonzero(number: Tensor) -> Tensor:
    return torch.where(number > 0, number, 1.0)


@torch.library.register_fake("bisparse::estimate_2to4")
def _(gradient: Tensor, start: Tensor) -> Tensor:
    return gradient.new_empty((gradient.shape[1], 4 * start.shape[0]))


def _on_a_cpu(gradient: Tensor, start: Tensor) -> Tensor:
    from bisparse.kernels import cpu_estimate  # numba takes a second to import

    return cpu_estimate.estimate_2to4(gradient, start)


def _on_a_gpu(gradient: Tensor, start: Tensor) -> Tensor:
    from bisparse.kernels import cuda_values

    if start.dtype == torch.float64:  # for tests of arithmetic, not worth a kernel
        return reference_estimate_2to4(gradient, start)
    with torch.cuda.device_of(gradient):
        return cuda_values.estimate_2to4(gradient, start)


_LIBRARY.impl("estimate_2to4", reference_estimate_2to4, "CompositeExplicitAutograd")
_LIBRARY.impl("estimate_2to4", _on_a_cpu, "CPU")
if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    _LIBRARY.impl("estimate_2to4", _on_a_gpu, "CUDA")
