"""Which of cuSPARSELt's algorithms is the fastest for a shape: found by trying all of them, once.

Source of signatures: torch/csrc/cuda/shared/cusparselt.cpp and ATen/native/sparse/cuda/cuSPARSELtOps.cpp, torch 2.11 to 2.13.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Algorithm", "search_algorithm"]


TOLERANCE = 1e-2
"""Relative error that half precision and another order of sums may make."""


class Algorithm(NamedTuple):
    """What `torch._cslt_sparse_mm` is told, by its own names."""

    alg_id: int = 0
    split_k: int = 1
    """In how many parts the sum over columns is taken."""
    split_k_mode: int = -1
    """How the parts are added up; read where there are several."""


@functools.lru_cache(maxsize=1024)
def search_algorithm(
    shape: tuple[int, int, int], by_rows: bool, bias: bool, transposed: bool, dtype: torch.dtype, device: torch.device
) -> Algorithm:
    """The fastest for (rows, columns, tokens), by trying all of them once on random numbers, if it is right; else the usual one.

    Args:
        by_rows: the dense operand, (columns, tokens), lies row by row; otherwise column by column.
        bias, transposed: what else the product does.
    """
    rows, columns, tokens = shape
    usual = Algorithm()
    try:
        own = torch.Generator(device).manual_seed(0)  # a search in the middle of a run must not move its random numbers
        matrix = torch.randn(rows, columns // 4, 4, dtype=dtype, device=device, generator=own)
        matrix[..., 2:] = 0
        packed = torch._cslt_compress(matrix.view(rows, columns)).view(rows, -1)
        dense = torch.randn((columns, tokens) if by_rows else (tokens, columns), dtype=dtype, device=device, generator=own)
        dense = dense if by_rows else dense.t()
        numbers = torch.randn(rows, dtype=dtype, device=device, generator=own) if bias else None
        with torch.cuda.device_of(packed):
            found = _search(packed, dense, numbers, transposed)
            products = [
                torch._cslt_sparse_mm(packed, dense, bias=numbers, transpose_result=transposed, **one._asdict())
                for one in (usual, found)
            ]
    except RuntimeError:  # also out of memory
        return usual
    # Some algorithms have given wrong products (pytorch/pytorch issue 155333), or refused what they were found for.
    right, other = (product.float() for product in products)
    return found if bool((right - other).norm() <= TOLERANCE * right.norm()) else usual


def _search(packed: Tensor, dense: Tensor, bias: Tensor | None, transposed: bool) -> Algorithm:
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:  # the operator is deprecated, and keeps to itself how it split the sum
        return Algorithm(int(torch._cslt_sparse_mm_search(packed, dense, bias, transpose_result=transposed)))
    alg_id, split_k, split_k_mode, _ = search(packed, dense, bias, None, None, transposed)
    return Algorithm(int(alg_id), int(split_k), int(split_k_mode))
