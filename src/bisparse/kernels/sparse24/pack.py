"""A 2:4 matrix as sparse tensor cores read it, of W and of W^T: schema, shapes, and the plain-torch specification.

Sparse GEMMs take half of the values and, for each group of four, the positions of its two values. Both operands of a transposable
weight are packed at once: W for the forward pass, W^T for the backward pass. A packed matrix is one tensor: the values, two per
group, row by row; then the metadata, in the layout of the library that reads them (`metadata`). `cutlass_layout` is that of
CUTLASS and of torch's semi-structured operators, to which the result is bit-equal; `accelerate` learns that of cuSPARSELt.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int16, Shaped
from torch import Tensor

from bisparse.kernels.exact import ops
from bisparse.kernels.sparse24.metadata import (
    LAYOUT,
    LAYOUT_T,
    MetadataLayout,
    both_layouts,
    check_layout,
    kept_sets,
    layout_from_order,
    metadata_of,
)
from bisparse.kernels.sparse24.positions import reference_take_values

__all__ = ["cutlass_layout", "metadata_place", "pack_2to4", "pack_2to4_transposable", "packed_like", "split_packed"]

DTYPES = (torch.float16, torch.bfloat16)
GROUP_ROWS = 32
"""CUTLASS reorders metadata within bands of this many rows; the rows of W^T are the columns of W."""

Layouts = tuple[MetadataLayout, MetadataLayout]
"""Of W and of W^T."""

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define(f"pack_2to4(Tensor weight, Tensor mask, {LAYOUT}, {LAYOUT_T}) -> (Tensor packed, Tensor packed_t)")
_LIBRARY.define(f"pack_2to4_transposable(Tensor weight, {LAYOUT}, {LAYOUT_T}) -> (Tensor mask, Tensor packed, Tensor packed_t)")


def pack_2to4(
    weight: Float[Tensor, "O I"], mask: Bool[Tensor, "O I"], layouts: Layouts | None = None
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """W and W^T packed under a mask that is 2:4 both ways; pruned entries are read as zero.

    The mask is not checked: a group that keeps more than two loses values. `bisparse.verify` checks it.

    Args:
        weight: float16 or bfloat16, both sides divisible by 32.
        mask: 2:4-T.
        layouts: how the library stores the metadata of W and of W^T; by default CUTLASS's.

    Returns:
        W packed and W^T packed, each 9/16 of the weight's size; `split_packed` separates values from metadata.
    """
    _check(weight)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} needs a bool mask of that shape, not {mask.dtype} {tuple(mask.shape)}"
        )
    packed, packed_t = torch.ops.bisparse.pack_2to4(weight, mask, *_flat(_layouts_of(weight, layouts)))
    return packed, packed_t


def pack_2to4_transposable(
    weight: Float[Tensor, "O I"], layouts: Layouts | None = None
) -> tuple[Bool[Tensor, "O I"], Float[Tensor, " P"], Float[Tensor, " P"]]:
    """The best 2:4-T mask of ``weight.abs()`` and W and W^T packed under it, in one pass over a dense weight on a GPU.

    The mask is that of `ops.exact_mask`: optimal for magnitudes rounded to 24 bits of each tile's largest, which for float16 and
    bfloat16 are the magnitudes themselves unless a tile spans more than 2**16 (bfloat16) or 2**13 (float16). A weight that is NaN
    or infinite is an error on the CPU and, so that nothing waits for the device, not on a GPU: check the loss.

    Args:
        weight: float16 or bfloat16, both sides divisible by 32.
        layouts: how the library stores the metadata of W and of W^T; by default CUTLASS's.

    Returns:
        mask; W packed; W^T packed.
    """
    _check(weight)
    mask, packed, packed_t = torch.ops.bisparse.pack_2to4_transposable(weight, *_flat(_layouts_of(weight, layouts)))
    return mask, packed, packed_t


def split_packed(packed: Shaped[Tensor, " P"], rows: int, columns: int) -> tuple[Shaped[Tensor, "R C2"], Int16[Tensor, "R C16"]]:
    """Values and metadata of a packed (rows, columns) matrix, two views."""
    count = rows * columns // 2
    return packed[:count].view(rows, columns // 2), packed[count:].view(torch.int16).view(rows, columns // 16)


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.dtype not in DTYPES:
        raise ValueError(
            f"a {weight.dtype} tensor of shape {tuple(weight.shape)} cannot be packed: expected a float16 or bfloat16 matrix"
        )
    if weight.shape[0] % GROUP_ROWS or weight.shape[1] % GROUP_ROWS:
        raise ValueError(
            f"a {weight.shape[0]} x {weight.shape[1]} matrix cannot be packed both ways: both sides must be divisible by "
            f"{GROUP_ROWS}; pad it with zeros, or leave the layer masked-dense"
        )


def metadata_place(rows: int, columns: int, device: torch.device | None = None) -> Int[Tensor, "R C"]:
    """The place in memory of each of the (rows, columns) words of metadata, after CUTLASS's reordering.

    Rows of a band of 32 are interleaved by eights, each 2 x 2 square is transposed, and pairs of columns are adjacent, column
    pair by column pair (CUTLASS, `reorder_meta` and `ColumnMajorInterleaved<2>`).
    """
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    row = row // GROUP_ROWS * GROUP_ROWS + row % 8 * 4 + row % GROUP_ROWS // 8
    turn = column % 2 - row % 2
    row, column = row + turn, column - turn
    return column // 2 * (2 * rows) + row * 2 + column % 2


@functools.lru_cache(maxsize=256)
def cutlass_layout(rows: int, device: torch.device) -> MetadataLayout:
    """CUTLASS's metadata layout of matrices with this many rows; 32 divides rows and columns."""
    words = metadata_place(GROUP_ROWS, 2)
    place = (4 * words[:, :, None] + torch.arange(4, device="cpu")).flatten(1)
    return layout_from_order(place, 2 * GROUP_ROWS, 2 * rows, device)


def _cutlass_layouts(weight: Tensor) -> Layouts:
    return cutlass_layout(weight.shape[0], weight.device), cutlass_layout(weight.shape[1], weight.device)


def _layouts_of(weight: Tensor, given: Layouts | None) -> Layouts:
    if given is None:
        return _cutlass_layouts(weight)
    for layout, sides in zip(given, (weight.shape, weight.shape[::-1]), strict=True):
        check_layout(layout, *sides)
    return given


def _flat(layouts: Layouts) -> tuple[Any, ...]:
    return *layouts[0], *layouts[1]


def reference_pack_2to4(weight: Tensor, mask: Tensor, *layouts: Any) -> tuple[Tensor, Tensor]:
    """The specification of `pack_2to4`."""
    kept = torch.where(mask, weight, torch.zeros_like(weight))
    layout, layout_t = both_layouts(*layouts)
    return _pack(kept, layout), _pack(kept.t(), layout_t)


def reference_pack_2to4_transposable(weight: Tensor, *layouts: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `pack_2to4_transposable`."""
    mask, _ = ops.exact_mask(weight.abs().float(), 2, 4, False)
    return mask, *reference_pack_2to4(weight, mask, *layouts)


def _pack(matrix: Tensor, layout: MetadataLayout) -> Tensor:
    positions = layout.codes[kept_sets(matrix != 0).long()]
    return reference_take_values(matrix, positions, matrix.dtype, metadata_of(positions, layout).view(matrix.dtype))


def packed_like(weight: Tensor) -> tuple[Tensor, Tensor]:
    """New, unwritten tensors for W and W^T packed."""
    count = weight.numel() // 16 * 9
    return weight.new_empty(count), weight.new_empty(count)


@torch.library.register_fake("bisparse::pack_2to4")
def _(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return packed_like(weight)


@torch.library.register_fake("bisparse::pack_2to4_transposable")
def _(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.bool), *packed_like(weight)


_LIBRARY.impl("pack_2to4", reference_pack_2to4, "CompositeExplicitAutograd")
_LIBRARY.impl("pack_2to4_transposable", reference_pack_2to4_transposable, "CompositeExplicitAutograd")


def _no_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("a packed weight is a constant, through which no gradient flows: pack weight.detach()")


for _name in ("pack_2to4", "pack_2to4_transposable"):
    torch.library.register_autograd(f"bisparse::{_name}", _no_gradient)
