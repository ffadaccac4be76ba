"""What a backend is: a way to store a 2:4 matrix and to multiply by it.

Each backend keeps a packed matrix in two tensors: `packed`, of the weight's dtype, and `metadata`. None of them checks that what
it packs is 2:4: callers must.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from bisparse.kernels.sparse24.metadata import MetadataLayout
from bisparse.kernels.sparse24.pack import split_packed

__all__ = ["HALF", "Backend", "BackendError", "Refusal"]

HALF = (torch.float16, torch.bfloat16)


class BackendError(ValueError):
    """A backend that was asked for cannot run here, or cannot take this layer."""


@dataclass(frozen=True)
class Refusal:
    """Why something does not run sparse."""

    reason: str
    cause: Literal["layer", "weight", "backend", "unmeasured"] = "backend"
    """The kind of layer; a weight that is not 2:4; what the backend takes; or sizes that no grid has measured."""


class Backend(ABC):
    """A way to store a 2:4 matrix and to multiply by it."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    row_multiple: int = 1
    column_multiple: int = 1
    learns_layout: bool = False
    """The first call of `metadata_layout` for a shape takes as long as some fifteen products."""

    def shape_reason(self, rows: int, columns: int) -> str | None:
        """Why a (rows, columns) matrix cannot be packed, by the library's documentation; None where it can."""
        if rows % self.row_multiple == 0 and columns % self.column_multiple == 0:
            return None
        return (
            f"{self.name} packs matrices whose rows are a multiple of {self.row_multiple} and columns of {self.column_multiple}, "
            f"not {rows} x {columns}"
        )

    def probed_reason(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the library itself refuses a shape that its documentation allows, found by a probe; None where it takes it."""
        del rows, columns, dtype, device
        return None

    def matrix_reason(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why a (rows, columns) matrix cannot be packed, by documentation and by a probe; None where it can."""
        return self.shape_reason(rows, columns) or self.probed_reason(rows, columns, dtype, device)

    def dtype_reason(self, dtype: torch.dtype) -> str | None:
        """Why numbers of this dtype cannot be packed; None where they can."""
        if dtype in self.dtypes:
            return None
        taken = ", ".join(str(one).removeprefix("torch.") for one in self.dtypes)
        return f"{self.name} takes {taken}, not {str(dtype).removeprefix('torch.')}"

    @abstractmethod
    def device_reason(self, device: torch.device) -> str | None:
        """Why it cannot run on this device; None where it can."""

    @abstractmethod
    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) of a matrix that is 2:4 along its rows."""

    @abstractmethod
    def unpack(
        self, packed: Shaped[Tensor, "..."], metadata: Shaped[Tensor, "..."], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        """The matrix that was packed, dense, with zeros."""

    @abstractmethod
    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataLayout | None:
        """How it stores the metadata of (rows, columns) matrices; None where that is unknown: then only it can pack them."""

    def dtypes_of_layout(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
        """The dtypes of values that metadata in the layout of `dtype` serve; by default all that the backend takes."""
        del dtype, device
        return self.dtypes

    @abstractmethod
    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: Shaped[Tensor, "..."],
        dtype: torch.dtype,
    ) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) of the current values of a weight at the given positions, cast to a dtype.

        Args:
            metadata: bytes in the backend's `metadata_layout`; empty where that is unknown.
        """

    def split(self, flat: Shaped[Tensor, " P"], rows: int, columns: int) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) from one tensor that holds the values of a matrix and then its metadata."""
        values, metadata = split_packed(flat, rows, columns)
        return values, metadata.view(torch.uint8)

    @abstractmethod
    def multiply(
        self,
        packed: Shaped[Tensor, "..."],
        metadata: Shaped[Tensor, "..."],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        """``S @ dense + bias``, (R, N), or its transpose, (N, R); contiguous. With `search`, by the fastest algorithm here."""
