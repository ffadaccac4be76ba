"""Reads torch's semi-structured tensors in torch files: kept values, with two bits for each, in the CUTLASS layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from bisparse.checkpoint.formats.unpickle import Wrapped
from bisparse.checkpoint.stored_tensor import StoredTensor, as_bytes
from bisparse.errors import CheckpointError

__all__ = ["semi_structured"]

CUTLASS = "torch.sparse.semi_structured.SparseSemiStructuredTensorCUTLASS"
CUSPARSELT = "torch.sparse.semi_structured.SparseSemiStructuredTensorCUSPARSELT"


@dataclass(frozen=True)
class _Unpacked(StoredTensor):
    """The dense tensor, rebuilt at each read, since no piece of CUTLASS's metadata is contiguous."""

    values: StoredTensor
    metadata: StoredTensor
    is_transposed: bool

    def read_bytes(self, start: int, stop: int) -> bytearray:
        return bytearray(as_bytes(self._dense())[start:stop])

    def _dense(self) -> Shaped[Tensor, "O I"]:
        values, metadata = (one.read().view(one.shape) for one in (self.values, self.metadata))
        try:
            dense = sparse_semi_structured_to_dense_cutlass(values, metadata)
        except RuntimeError as error:
            raise CheckpointError(
                self.path, f"has values and metadata that do not fit ({error})", "save it again", tensor=self.name
            ) from error
        return dense.t() if self.is_transposed else dense


def semi_structured(name: str, path: Path, wrapped: Wrapped, parts: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The dense tensor of a semi-structured one; None for other tensor subclasses.

    Raises:
        CheckpointError: it is packed by cuSPARSELt, whose layout is not public, or its parts do not fit its shape.
    """
    if wrapped.kind == CUSPARSELT:
        raise CheckpointError(
            path,
            "is packed by cuSPARSELt, whose layout only that library knows",
            "load it on a GPU, replace the weight by weight.to_dense() and save again",
            tensor=name,
        )
    if wrapped.kind != CUTLASS:
        return None
    for values, metadata, transposed in (("packed", "meta", False), ("packed_t", "meta_t", True)):
        if values in parts and metadata in parts:
            packed, shape = parts[values], wrapped.shape
            if packed.dtype == "F32":
                raise CheckpointError(
                    path,
                    "is packed in float32 (1:2), which torch's own conversion does not unpack exactly",
                    "load it on a GPU, replace the weight by weight.to_dense() and save again",
                    tensor=name,
                )
            rows = shape[::-1] if transposed else shape
            if len(shape) != 2 or len(packed.shape) != 2 or packed.shape != (rows[0], rows[1] // 2):
                raise CheckpointError(
                    path,
                    f"of shape {shape} has packed values of shape {packed.shape}",
                    "load it on a GPU, replace the weight by weight.to_dense() and save again",
                    tensor=name,
                )
            size = math.prod(shape) * (packed.nbytes // max(packed.size, 1))
            return _Unpacked(name, packed.dtype, shape, path, size, packed, parts[metadata], transposed)
    return None
