"""Scores: the value of keeping each weight. Pure functions of the weight and of calibration statistics.

Every score is non-negative and finite for finite inputs, float32 (float64 for float64 weights), and of the weight's shape.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bisparse.arguments import check_dense

__all__ = ["hessian", "magnitude", "taylor", "wanda"]


def magnitude(weight: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """How large each weight is: ``|w|``.

    >>> magnitude(torch.tensor([[-3.0, 0.5]])).tolist()
    [[3.0, 0.5]]
    """
    return _wide(weight, "weight").abs()


def _per_input(numbers: Tensor, weight: Tensor) -> bool:
    """Whether there is one number per input of each matrix, or the same ones for all matrices."""
    if numbers.ndim < 1 or weight.ndim < 2 or numbers.shape[-1] != weight.shape[-1]:
        return False
    given, batch = tuple(numbers.shape[:-1]), tuple(weight.shape[:-2])
    return len(given) <= len(batch) and all(one in (1, other) for one, other in zip(given[::-1], batch[::-1], strict=False))


def wanda(weight: Float[Tensor, "*B O I"], norm: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O I"]:
    """How much each weight moves the output: ``|w_oi| * ||x_i||``, with the norm of its input over the calibration tokens.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1.

    >>> wanda(torch.tensor([[3.0, -1.0]]), torch.tensor([1.0, 5.0])).tolist()
    [[3.0, 5.0]]
    """
    check_dense("weight", weight)
    check_dense("norm", norm)
    if not _per_input(norm, weight):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} needs one norm per input, not norms of {tuple(norm.shape)}")
    return _wide(weight, "weight").abs() * _wide(norm, "norm").abs().unsqueeze(-2)


def hessian(weight: Float[Tensor, "*B O I"], inverse_diagonal: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O I"]:
    """How much the squared output error grows when a weight is removed and its row repaired: ``w_oi^2 / [H^-1]_ii``.

    Source: Frantar and Alistarh, "SparseGPT", ICML 2023, equation 3 (Hassibi and Stork's optimal brain surgeon).

    >>> hessian(torch.tensor([[3.0, -1.0]]), torch.tensor([1.0, 0.25])).tolist()
    [[9.0, 4.0]]
    """
    inverse_diagonal = _wide(inverse_diagonal, "inverse_diagonal")
    check_dense("weight", weight)
    if not _per_input(inverse_diagonal, weight):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} needs one entry per input, not a diagonal of "
            f"{tuple(inverse_diagonal.shape)}"
        )
    if bool((inverse_diagonal <= 0).any()):
        raise ValueError("the diagonal of an inverse Hessian must be positive: raise the damping")
    return _wide(weight, "weight").square() / inverse_diagonal.unsqueeze(-2)


def taylor(weight: Float[Tensor, "*S"], gradient: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """How much the loss moves, to first order, when a weight is removed: ``|w * dL/dw|``.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.

    >>> taylor(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])).tolist()
    [[1.0, 3.0]]
    """
    check_dense("weight", weight)
    check_dense("gradient", gradient)
    if gradient.shape != weight.shape:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} needs a gradient of that shape, not {tuple(gradient.shape)}")
    return (_wide(weight, "weight") * _wide(gradient, "gradient")).abs()


def _wide(tensor: Float[Tensor, "*S"], what: str) -> Float[Tensor, "*S"]:
    """In float32, or float64 where it already is: products of half-precision numbers would round or overflow."""
    check_dense(what, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{what} of dtype {tensor.dtype} has no scores: quantised or integer weights cannot be pruned")
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
