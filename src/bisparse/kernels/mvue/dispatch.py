"""Registers the Triton kernels as the operators' CUDA implementation. Triton is imported when an operator is first called."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bisparse.kernels.mvue import ops

__all__: list[str] = []

_LIBRARY = torch.library.Library("bisparse", "IMPL")


def _estimate_2to4(gradient: Tensor, seed: Tensor, groups: int) -> Tensor:
    from bisparse.kernels.mvue import cuda

    if gradient.dtype == torch.float64:  # for tests of arithmetic, not worth a kernel
        return ops.reference_estimate_2to4(gradient, seed, groups)
    with torch.cuda.device_of(gradient):
        return cuda.estimate_2to4(gradient, seed, groups)


def _pack_estimate_2to4(gradient: Tensor, *how: Any) -> Tensor:
    from bisparse.kernels.mvue import cuda

    with torch.cuda.device_of(gradient):
        return cuda.pack_estimate_2to4(gradient, *how)


if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    _LIBRARY.impl("estimate_2to4", _estimate_2to4, "CUDA")
    _LIBRARY.impl("pack_estimate_2to4", _pack_estimate_2to4, "CUDA")
