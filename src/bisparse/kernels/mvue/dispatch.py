"""Registers the Triton kernels as the operators' CUDA implementation. Triton is imported when an operator is first called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bisparse.kernels.mvue import ops
from bisparse.kernels.registration import HAS_TRITON, register_kernel

__all__: list[str] = []

if HAS_TRITON:

    @register_kernel("estimate_2to4", "CUDA")
    def _estimate_2to4(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
        from bisparse.kernels.mvue import cuda

        if gradient.dtype == torch.float64:  # for tests of arithmetic, not worth a kernel
            return ops.reference_estimate_2to4(gradient, seed, groups)
        with torch.cuda.device_of(gradient):
            return cuda.estimate_2to4(gradient, seed, groups)

    @register_kernel("pack_estimate_2to4", "CUDA")
    def _pack_estimate_2to4(gradient: Tensor, *how: Any) -> Tensor:
        from bisparse.kernels.mvue import cuda

        with torch.cuda.device_of(gradient):
            return cuda.pack_estimate_2to4(gradient, *how)
