"""The third GEMM: the weight gradient from an unbiased 2:4 estimate, of minimum variance, of the output gradient.

With transposable masks the forward pass and the input gradient multiply by a sparse weight. The weight gradient is
``G^T X`` with G (tokens, out); sparse hardware speeds it up if G is 2:4 along the tokens, the axis it sums over. Each group
g of 4 keeps entry i with probability p_i and the value g_i / p_i, which has mean g_i and variance g_i^2 (1 / p_i - 1). Among
all unbiased estimates with at most two entries kept, ``p_i = min(1, |g_i| / tau)`` with tau such that the p_i sum to 2 has the
smallest variance. Systematic sampling draws exactly two entries with these probabilities: entry i is kept when the
running sum of the p_i passes u or u + 1, for one uniform u per group.

Source: Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", ICLR 2023, arXiv 2203.10991; systematic
sampling after Madow (1949). The sparse gradient is multiplied as a dense matrix here, to study convergence; the sparse kernels
are in `bisparse.accelerate`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bisparse.arguments import check_dense
from bisparse.kernels.mvue.ops import estimate_2to4, keep_probabilities
from bisparse.kernels.mvue.philox import draw_seed
from bisparse.kernels.registration import unviewed
from bisparse.training.shared_classes import separate_class

__all__ = ["MVUELinear", "keep_probabilities", "mvue_2_4"]


def mvue_2_4(gradient: Float[Tensor, "T O"], generator: torch.Generator | None = None) -> Float[Tensor, "T O"]:
    """An unbiased estimate of a gradient with at most 2 of every 4 consecutive tokens (rows) non-zero in each column.

    Sampling runs in float32, or float64 for float64. A last group of fewer than 4 tokens is padded with zeros.
    """
    check_dense("gradient", gradient)
    if gradient.ndim != 2 or not gradient.is_floating_point():
        raise ValueError(
            f"a gradient of shape {tuple(gradient.shape)} and {gradient.dtype}: expected tokens x outputs, floating point"
        )
    return _transposed_estimate(gradient, generator).t().contiguous()


def _transposed_estimate(gradient: Float[Tensor, "T O"], generator: torch.Generator | None = None) -> Float[Tensor, "O T"]:
    tokens = gradient.shape[0]
    return estimate_2to4(gradient, draw_seed(gradient.device, generator), -(-tokens // 4))[:, :tokens]


class _WeightGradient(torch.autograd.Function):
    """``g~^T x`` with g~ the estimate of g. Its derivative is that of the expectation ``g^T x``; the sample's own is biased."""

    @staticmethod
    def forward(gradient: Tensor, inputs: Tensor) -> Tensor:
        product: Tensor = _transposed_estimate(gradient) @ inputs
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gradient, inputs = ctx.saved_tensors
        return inputs @ upstream.t(), gradient @ upstream


class _MVUEMatmul(torch.autograd.Function):
    """``x W^T + b`` whose weight gradient is computed from the estimate; input and bias gradients are exact."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.nn.functional.linear(inputs, weight, bias)
        return unviewed(output, *output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gradient @ weight if needs_input else None,
            _WeightGradient.apply(flat, inputs.reshape(-1, inputs.shape[-1]))  # type: ignore[no-untyped-call]
            if needs_weight
            else None,
            flat.sum(0) if needs_bias else None,
        )


class MVUELinear(nn.Linear):
    """A Linear whose weight gradient uses a random 2:4 version of the output's gradient that has the same mean (MVUE).

    Parameters, outputs and the gradient of the input are those of Linear. Source: Chmiel et al. 2023.
    """

    def forward(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        output: Tensor = _MVUEMatmul.apply(input, weight, bias)  # type: ignore[no-untyped-call]
        return output

    @staticmethod
    def install_(module: nn.Module) -> bool:
        """Turn a plain Linear into this class; returns False and changes nothing for other modules."""
        if type(module) is nn.Linear:
            module.__class__ = MVUELinear
        return type(module) is MVUELinear

    @staticmethod
    def remove_(module: nn.Module) -> None:
        """The inverse of `install_`, once masks are removed; other parametrizations stay."""
        if type(module) is MVUELinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif parametrize.is_parametrized(module) and type(module).__bases__[0] is MVUELinear:
            separate_class(module, nn.Linear)
