"""The reference backend: stores the same packed matrices as the libraries, on any device, but is no faster than dense."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from bisparse.accelerate.backends.base import HALF, Backend
from bisparse.kernels.sparse24.metadata import WORD, MetadataLayout, layout_from_order
from bisparse.kernels.sparse24.positions import from_metadata, put_values, take_values, to_metadata

__all__ = ["Reference"]


class Reference(Backend):
    """Unpacks the matrix for every product: the same results as the libraries, on any device, but no faster than dense."""

    name = "reference"
    dtypes = (torch.float64, torch.float32, *HALF)

    def device_reason(self, device: torch.device) -> str | None:
        return None

    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Float[Tensor, "R C2"], UInt8[Tensor, "R B"]]:
        positions, _ = torch.ops.bisparse.find_positions(matrix != 0)  # two of a group that keeps more, like the libraries
        return take_values(matrix, positions), to_metadata(positions)

    def unpack(
        self, packed: Float[Tensor, "R C2"], metadata: UInt8[Tensor, "R B"], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        return put_values(packed, from_metadata(metadata, packed.shape[1] // 2), columns)

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataLayout | None:
        return _row_major_layout(columns, device) if columns % WORD == 0 else None

    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: Shaped[Tensor, "..."],
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "R C2"], Shaped[Tensor, "..."]]:
        # The given metadata is not used: an averaged model that runs here may receive the buffers of one that runs by a library.
        return take_values(weight, positions, dtype), to_metadata(positions)

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
        matrix = self.unpack(packed, metadata, rows, dense.shape[0])
        with torch.autocast(dense.device.type, enabled=False):  # autocast does not affect the libraries' operators either
            product = torch.nn.functional.linear(dense.t(), matrix, bias)
        return product if transposed else product.t().contiguous()


@functools.lru_cache(maxsize=256)
def _row_major_layout(columns: int, device: torch.device) -> MetadataLayout:
    """The layout of `to_metadata`."""
    return layout_from_order(torch.arange(4, device="cpu")[None], columns // WORD, 1, device)
