"""Registers the Triton kernels as the operators' CUDA implementation. Triton is imported when an operator is first called."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bisparse.kernels.sparse24 import metadata, pack, positions

__all__: list[str] = []

_SCHEMAS = (positions, metadata, pack)  # which define the operators
_LIBRARY = torch.library.Library("bisparse", "IMPL")


def _find_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    from bisparse.kernels.sparse24 import cuda_values

    with torch.cuda.device_of(mask):
        return cuda_values.find_positions(mask)


def _take_values(weight: Tensor, *how: Any) -> Tensor:
    from bisparse.kernels.sparse24 import cuda_values

    with torch.cuda.device_of(weight):
        return cuda_values.take_values(weight, *how)


def _lay_out(mask: Tensor, *how: Any) -> None:
    from bisparse.kernels.sparse24 import cuda_metadata

    with torch.cuda.device_of(mask):
        cuda_metadata.lay_out(mask, *how)


def _pack_2to4(weight: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    from bisparse.kernels.sparse24 import cuda_pack

    with torch.cuda.device_of(weight):
        return cuda_pack.pack_2to4(weight, *how)


def _pack_2to4_transposable(weight: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    from bisparse.kernels.sparse24 import cuda_pack

    with torch.cuda.device_of(weight):
        return cuda_pack.pack_2to4_transposable(weight, *how)


if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    _LIBRARY.impl("find_positions", _find_positions, "CUDA")
    _LIBRARY.impl("take_values", _take_values, "CUDA")
    _LIBRARY.impl("lay_out_2to4", _lay_out, "CUDA")
    _LIBRARY.impl("pack_2to4", _pack_2to4, "CUDA")
    _LIBRARY.impl("pack_2to4_transposable", _pack_2to4_transposable, "CUDA")
