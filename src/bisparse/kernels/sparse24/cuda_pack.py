"""W and W^T packed under a 2:4-T mask, given or the best one, by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bisparse.kernels.exact.cuda.enumerate_2to4 import packed_tiles
from bisparse.kernels.exact.cuda.solve import mask_words
from bisparse.kernels.sparse24.cuda_metadata import write_metadata
from bisparse.kernels.sparse24.metadata import both_layouts
from bisparse.kernels.sparse24.pack import packed_like, split_packed

__all__ = ["pack_2to4", "pack_2to4_transposable"]

PACKED_TILES = 16


def pack_2to4(weight: Tensor, mask: Tensor, *layouts: Any) -> tuple[Tensor, Tensor]:
    """`pack.pack_2to4` on a GPU."""
    return _pack(weight, mask.contiguous(), *layouts)[1:]


def pack_2to4_transposable(weight: Tensor, *layouts: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`pack.pack_2to4_transposable` on a GPU."""
    return _pack(weight, None, *layouts)


def _pack(weight: Tensor, given: Tensor | None, *layouts: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    rows, columns = weight.shape
    mask = torch.empty_like(weight, dtype=torch.bool) if given is None else given
    packed, packed_t = packed_like(weight)
    if weight.numel():
        (values, metadata), (values_t, metadata_t) = split_packed(packed, rows, columns), split_packed(packed_t, columns, rows)
        positions = torch.empty((rows, columns // 4), dtype=torch.uint8, device=weight.device)
        positions_t = torch.empty((columns, rows // 4), dtype=torch.uint8, device=weight.device)
        layout, layout_t = both_layouts(*layouts)
        packed_tiles[(rows // 32, triton.cdiv(columns // 4, PACKED_TILES))](
            weight, mask_words(weight.device), mask.view(torch.int32), mask.view(torch.int32), layout.codes, layout_t.codes,
            values.view(torch.int32), positions, values_t.view(torch.int32), positions_t, rows, columns,
            BLOCK=PACKED_TILES, GIVEN=given is not None, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        write_metadata(positions, layout, metadata)
        write_metadata(positions_t, layout_t, metadata_t)
    return mask, packed, packed_t
