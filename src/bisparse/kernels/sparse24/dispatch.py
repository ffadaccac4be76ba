"""Registers the Triton kernels as the operators' CUDA implementation. Triton is imported when an operator is first called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bisparse.kernels.registration import HAS_TRITON, register_kernel
from bisparse.kernels.sparse24 import metadata, pack, positions

__all__: list[str] = []

_SCHEMAS = (positions, metadata, pack)  # which define the operators

if HAS_TRITON:

    @register_kernel("find_positions", "CUDA")
    def _find_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
        from bisparse.kernels.sparse24 import cuda_values

        with torch.cuda.device_of(mask):
            return cuda_values.find_positions(mask)

    @register_kernel("take_values", "CUDA")
    def _take_values(weight: Tensor, *how: Any) -> Tensor:
        from bisparse.kernels.sparse24 import cuda_values

        with torch.cuda.device_of(weight):
            return cuda_values.take_values(weight, *how)

    @register_kernel("lay_out_2to4", "CUDA")
    def _lay_out(mask: Tensor, *how: Any) -> None:
        from bisparse.kernels.sparse24 import cuda_metadata

        with torch.cuda.device_of(mask):
            cuda_metadata.lay_out(mask, *how)

    @register_kernel("pack_2to4", "CUDA")
    def _pack_2to4(weight: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        from bisparse.kernels.sparse24 import cuda_pack

        with torch.cuda.device_of(weight):
            return cuda_pack.pack_2to4(weight, *how)

    @register_kernel("pack_2to4_transposable", "CUDA")
    def _pack_2to4_transposable(weight: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
        from bisparse.kernels.sparse24 import cuda_pack

        with torch.cuda.device_of(weight):
            return cuda_pack.pack_2to4_transposable(weight, *how)
