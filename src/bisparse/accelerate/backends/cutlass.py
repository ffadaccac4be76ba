"""The CUTLASS backend: torch's CUTLASS kernels, which take values and metadata as separate tensors.

Source of shapes and dtypes: `torch.sparse.SparseSemiStructuredTensorCUTLASS`, torch 2.11 to 2.13. The operators are prototypes in
torch; this file alone calls them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from bisparse.accelerate.backends.probe import TensorCoreBackend, pad_tokens
from bisparse.kernels.sparse24.metadata import MetadataLayout
from bisparse.kernels.sparse24.pack import cutlass_layout
from bisparse.kernels.sparse24.positions import take_values

__all__ = ["Cutlass"]


class Cutlass(TensorCoreBackend):
    """torch's CUTLASS kernels: values and metadata are separate tensors, so that new values need no packing.

    The kernels take metadata as int16, which gloo and NCCL cannot broadcast: they are held as bytes and viewed as int16.
    """

    name = "cutlass"
    row_multiple, column_multiple = 32, 64

    def library_reason(self, major: int, minor: int) -> str | None:
        if major != 8:
            return f"torch's CUTLASS kernels for 2:4 run on compute capability 8.x, and this device has {major}.{minor}"
        return None

    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Float[Tensor, "R C2"], UInt8[Tensor, "R B"]]:
        values, metadata = sparse_semi_structured_from_dense_cutlass(matrix.contiguous())
        return values, metadata.view(torch.uint8)

    def unpack(
        self, packed: Float[Tensor, "R C2"], metadata: UInt8[Tensor, "R B"], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        matrix: Tensor = sparse_semi_structured_to_dense_cutlass(packed, metadata.view(torch.int16))
        return matrix

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataLayout | None:
        return cutlass_layout(rows, device)

    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: UInt8[Tensor, "R B"],
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "R C2"], UInt8[Tensor, "R B"]]:
        return take_values(weight, positions, dtype), metadata

    def multiply(
        self,
        packed: Float[Tensor, "R C2"],
        metadata: UInt8[Tensor, "R B"],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        padded = pad_tokens(dense)
        if bias is None:
            product = torch._sparse_semi_structured_mm(packed, metadata.view(torch.int16), padded)
        else:
            product = torch._sparse_semi_structured_addmm(bias, packed, metadata.view(torch.int16), padded)
        product = product[:, : dense.shape[1]]
        return product.t().contiguous() if transposed else product.contiguous()
