"""The cuSPARSELt backend: NVIDIA's library, which stores values and metadata in one tensor, and its algorithm search.

Source of signatures: torch/csrc/cuda/shared/cusparselt.cpp and ATen/native/sparse/cuda/cuSPARSELtOps.cpp, torch 2.11 to 2.13; of
shapes and dtypes: `torch.sparse.SparseSemiStructuredTensorCUSPARSELT`. The operators are prototypes in torch; this file alone
calls them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from bisparse.accelerate.backends.base import HALF
from bisparse.accelerate.backends.metadata_layout import learn_layout
from bisparse.accelerate.backends.probe import TensorCoreBackend, halves_share_metadata, numbered, pad_tokens
from bisparse.kernels.sparse24.metadata import MetadataLayout
from bisparse.kernels.sparse24.positions import kept_mask, take_values

__all__ = ["Algorithm", "CuSparseLt", "search_algorithm"]

MAX_ALGORITHM_ERROR = 1e-2
"""Maximum relative error from half precision and a different order of summation."""


class CuSparseLt(TensorCoreBackend):
    """NVIDIA's cuSPARSELt: values and metadata in one tensor, in an undocumented layout."""

    name = "cusparselt"
    row_multiple, column_multiple = 16, 16
    learns_layout = True

    def library_reason(self, major: int, minor: int) -> str | None:
        return None if torch.backends.cusparselt.is_available() else "this torch is built without cuSPARSELt"

    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Shaped[Tensor, "R P"], Shaped[Tensor, "0"]]:
        # Adding zero turns -0.0 into 0.0; it is not documented whether the library treats -0.0 as a zero.
        packed = self._compress(matrix.contiguous() + 0.0)
        return packed.view(matrix.shape[0], -1), matrix.new_empty(0)

    def unpack(
        self, packed: Shaped[Tensor, "R P"], metadata: Shaped[Tensor, "..."], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        # Exact for finite numbers: every sum has at most one non-zero term.
        return self.multiply(packed, metadata, torch.eye(columns, dtype=packed.dtype, device=packed.device), rows)

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataLayout | None:
        return learn_layout(self._compress, rows, columns, dtype, numbered(device))

    @staticmethod
    def _compress(matrix: Float[Tensor, "R C"]) -> Shaped[Tensor, "..."]:
        packed: Tensor = torch._cslt_compress(matrix)
        return packed

    def dtypes_of_layout(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
        return HALF if halves_share_metadata(self, numbered(device)) else (dtype,)

    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: Shaped[Tensor, "..."],
        dtype: torch.dtype,
    ) -> tuple[Shaped[Tensor, "R P"], Shaped[Tensor, "0"]]:
        if metadata.numel() == 0:
            return self.pack(torch.where(kept_mask(positions, weight.shape[1]), weight, 0).to(dtype))
        packed = take_values(weight, positions, dtype, metadata.view(-1).view(dtype)).view(weight.shape[0], -1)
        return packed, packed.new_empty(0)

    def split(self, flat: Shaped[Tensor, " P"], rows: int, columns: int) -> tuple[Shaped[Tensor, "R P"], Shaped[Tensor, "0"]]:
        return flat.view(rows, -1), flat.new_empty(0)

    def multiply(
        self,
        packed: Shaped[Tensor, "R P"],
        metadata: Shaped[Tensor, "..."],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        padded = pad_tokens(dense)
        algorithm = Algorithm()
        if search:
            by_rows = padded.is_contiguous()
            shape = (rows, *padded.shape)
            algorithm = search_algorithm(shape, by_rows, bias is not None, transposed, packed.dtype, packed.device)
        product = torch._cslt_sparse_mm(packed, padded, bias=bias, transpose_result=transposed, **algorithm._asdict())
        tokens = dense.shape[1]
        return (product[:tokens] if transposed else product[:, :tokens]).contiguous()


class Algorithm(NamedTuple):
    """Arguments of `torch._cslt_sparse_mm` that select how a product is computed."""

    alg_id: int = 0
    split_k: int = 1
    """Number of parts into which the sum over columns is split."""
    split_k_mode: int = -1
    """How the parts are added, if there are several."""


@functools.lru_cache(maxsize=1024)
def search_algorithm(
    shape: tuple[int, int, int], by_rows: bool, bias: bool, transposed: bool, dtype: torch.dtype, device: torch.device
) -> Algorithm:
    """The fastest algorithm for (rows, columns, tokens), by a run of each on random numbers; the default if its result is wrong.

    Args:
        by_rows: the dense operand, (columns, tokens), is row-major; otherwise column-major.
        bias, transposed: whether the product adds a bias, and returns the transpose.
    """
    rows, columns, tokens = shape
    default = Algorithm()
    try:
        own = torch.Generator(device).manual_seed(
            0
        )  # a search in the middle of a run must not advance its random number generator
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
                for one in (default, found)
            ]
    except RuntimeError:  # also out of memory
        return default
    # Some algorithms have returned wrong products (pytorch/pytorch issue 155333), or failed on the shape they were found for.
    right, other = (product.float() for product in products)
    return found if bool((right - other).norm() <= MAX_ALGORITHM_ERROR * right.norm()) else default


def _search(packed: Tensor, dense: Tensor, bias: Tensor | None, transposed: bool) -> Algorithm:
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:  # the operator is deprecated, and does not return how it split the sum
        return Algorithm(int(torch._cslt_sparse_mm_search(packed, dense, bias, transpose_result=transposed)))
    alg_id, split_k, split_k_mode, _ = search(packed, dense, bias, None, None, transposed)
    return Algorithm(int(alg_id), int(split_k), int(split_k_mode))
