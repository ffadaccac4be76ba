"""The interface of backends: how a 2:4 matrix is stored and multiplied by.

Each backend stores a packed matrix as two tensors: `packed`, of the weight's dtype, and `metadata`. Backends do not check that
a matrix is 2:4; callers must.
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

__all__ = ["HALF", "Backend", "BackendError", "Refusal", "token_count"]

HALF = (torch.float16, torch.bfloat16)


class BackendError(ValueError):
    """The given backend cannot run here, or cannot run this layer."""


@dataclass(frozen=True)
class Refusal:
    """Why something does not run sparse."""

    reason: str
    cause: Literal["layer", "weight", "backend", "unmeasured"] = "backend"
    """What the reason is about: the kind of layer, a weight that is not 2:4, the backend, or sizes that no grid has measured."""


class Backend(ABC):
    """A way to store a 2:4 matrix and to multiply by it."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    row_multiple: int = 1
    column_multiple: int = 1
    learns_layout: bool = False
    """Whether the first call of `metadata_layout` for a shape takes as long as about fifteen products."""

    def shape_reason(self, rows: int, columns: int) -> str | None:
        """Why the library's documentation excludes (rows, columns) matrices; None if it does not."""
        if rows % self.row_multiple == 0 and columns % self.column_multiple == 0:
            return None
        return (
            f"{self.name} packs matrices whose rows are a multiple of {self.row_multiple} and columns of {self.column_multiple}, "
            f"not {rows} x {columns}"
        )

    def probed_reason(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the library refuses a shape that its documentation allows, found by a probe; None if it does not."""
        del rows, columns, dtype, device
        return None

    def matrix_reason(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why a (rows, columns) matrix cannot be packed, by documentation and probe; None if it can."""
        return self.shape_reason(rows, columns) or self.probed_reason(rows, columns, dtype, device)

    def dtype_reason(self, dtype: torch.dtype) -> str | None:
        """Why numbers of this dtype cannot be packed; None if they can."""
        if dtype in self.dtypes:
            return None
        taken = ", ".join(str(one).removeprefix("torch.") for one in self.dtypes)
        return f"{self.name} takes {taken}, not {str(dtype).removeprefix('torch.')}"

    @abstractmethod
    def device_reason(self, device: torch.device) -> str | None:
        """Why the backend cannot run on this device; None if it can."""

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
        """The layout of the metadata of (rows, columns) matrices; None if unknown, so that only the backend can pack them."""

    def dtypes_of_layout(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
        """The dtypes of values that can use metadata in the layout of `dtype`; by default all that the backend takes."""
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
            metadata: bytes in the backend's `metadata_layout`; empty if that is unknown.
        """

    def split(self, flat: Shaped[Tensor, " P"], rows: int, columns: int) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) from one tensor that has the values of a matrix followed by its metadata."""
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


def token_count(tokens: int) -> str:
    """A number of tokens as text.

    >>> token_count(1), token_count(4096)
    ('1 token', '4,096 tokens')
    """
    return f"{tokens:,} token{'' if tokens == 1 else 's'}"
