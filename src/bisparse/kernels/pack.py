"""A 2:4 matrix as sparse tensor cores read it, of W and of W^T: schema, shapes, and the plain-torch specification.

Sparse GEMMs take half of the values and, for each group of four, where its two values stood. Both operands of a transposable
weight are packed at once: W for the forward pass, W^T for the backward pass.

Layout, that of CUTLASS and of torch's semi-structured operators: `values` (O, I / 2) holds the two values of each group in
order. A group's metadata are 4 bits, the index of its first value and, shifted by two, that of its second; four groups make an
int16, lowest bits first. The (O, I / 16) integers are then reordered (see `metadata_place`). A group with fewer than two
non-zero weights is completed with zeros the way torch does it, so that the packed tensors are bit-equal to torch's.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from bisparse.kernels import ops

__all__ = ["metadata_place", "pack_2to4", "pack_2to4_transposable", "packed_like"]

DTYPES = (torch.float16, torch.bfloat16)
GROUP_ROWS = 32
"""Metadata are reordered within bands of this many rows; W^T has the columns of W for rows."""

Packed = tuple[Tensor, Tensor, Tensor, Tensor]

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define("pack_2to4(Tensor weight, Tensor mask) -> (Tensor values, Tensor metadata, Tensor values_t, Tensor metadata_t)")
_LIBRARY.define(
    "pack_2to4_transposable(Tensor weight) -> (Tensor mask, Tensor values, Tensor metadata, Tensor values_t, Tensor metadata_t)"
)


def pack_2to4(
    weight: Float[Tensor, "O I"], mask: Bool[Tensor, "O I"]
) -> tuple[Float[Tensor, "O I2"], Int16[Tensor, "O I16"], Float[Tensor, "I O2"], Int16[Tensor, "I O16"]]:
    """Pack W and W^T under a mask that is 2:4 both ways; what the mask drops is read as zero.

    The mask is not checked: of a group that keeps more than two, values are lost. `bisparse.verify` checks it.

    Args:
        weight: float16 or bfloat16, both sides divisible by 32.
        mask: 2:4-T.

    Returns:
        values (O, I / 2), metadata (O, I / 16) of W; values (I, O / 2), metadata (I, O / 16) of W^T.
    """
    _check(weight)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} needs a bool mask of that shape, not {mask.dtype} {tuple(mask.shape)}"
        )
    packed = torch.ops.bisparse.pack_2to4(weight, mask)
    return packed[0], packed[1], packed[2], packed[3]


def pack_2to4_transposable(
    weight: Float[Tensor, "O I"],
) -> tuple[Bool[Tensor, "O I"], Float[Tensor, "O I2"], Int16[Tensor, "O I16"], Float[Tensor, "I O2"], Int16[Tensor, "I O16"]]:
    """The best 2:4-T mask of ``weight.abs()`` and W and W^T packed under it, in one pass over a dense weight on a GPU.

    The mask is that of `ops.exact_mask`: optimal for magnitudes rounded to 24 bits of each tile's largest, which for float16 and
    bfloat16 are the magnitudes themselves unless a tile spans more than 2**16 (bfloat16) or 2**13 (float16). A weight that is NaN
    or infinite is an error on the CPU and, so that nothing waits for the device, none on a GPU: check the loss, as ever.

    Args:
        weight: float16 or bfloat16, both sides divisible by 32.

    Returns:
        mask; values (O, I / 2), metadata (O, I / 16) of W; values (I, O / 2), metadata (I, O / 16) of W^T.
    """
    _check(weight)
    packed = torch.ops.bisparse.pack_2to4_transposable(weight)
    return packed[0], packed[1], packed[2], packed[3], packed[4]


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
    """Where each of the (rows, columns) metadata integers lies in memory once reordered.

    Rows of a band of 32 are dealt out by eights, each 2 x 2 square is transposed, and pairs of columns lie together, column pair
    by column pair (CUTLASS, `reorder_meta` and `ColumnMajorInterleaved<2>`).
    """
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    row = row // GROUP_ROWS * GROUP_ROWS + row % 8 * 4 + row % GROUP_ROWS // 8
    turn = column % 2 - row % 2
    row, column = row + turn, column - turn
    return column // 2 * (2 * rows) + row * 2 + column % 2


def reference_pack_2to4(weight: Tensor, mask: Tensor) -> Packed:
    """The specification of `pack_2to4`."""
    kept = torch.where(mask, weight, torch.zeros_like(weight))
    return *_pack(kept), *_pack(kept.t())


def reference_pack_2to4_transposable(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification of `pack_2to4_transposable`."""
    mask, _ = ops.exact_mask(weight.abs().float(), 2, 4, False)
    return mask, *reference_pack_2to4(weight, mask)


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 4, 4)
    first, second, _, fourth = (groups != 0).unbind(-1)
    # Where fewer than two are non-zero, any other index completes the pair; torch's choice is kept.
    low = torch.where(first, 0, torch.where(second, 1, 2))
    high = torch.where(second, torch.where(first, 1, torch.where(fourth, 3, 2)), torch.where(first & ~fourth, 2, 3))
    index = torch.stack([low, high], -1)
    values = groups.gather(-1, index).reshape(rows, columns // 2)
    bits = (low | high << 2).view(rows, columns // 16, 4) << torch.arange(0, 16, 4, device=weight.device)
    metadata = torch.empty(rows * columns // 16, dtype=torch.int16, device=weight.device)
    place = metadata_place(rows, columns // 16, weight.device)
    metadata[place.flatten()] = bits.sum(-1).flatten().to(torch.int16)
    return values, metadata.view(rows, columns // 16)


def packed_like(weight: Tensor) -> Packed:
    """New, unwritten tensors for the packed operands of a weight."""
    rows, columns = weight.shape
    return (
        weight.new_empty(rows, columns // 2),
        weight.new_empty((rows, columns // 16), dtype=torch.int16),
        weight.new_empty(columns, rows // 2),
        weight.new_empty((columns, rows // 16), dtype=torch.int16),
    )


@torch.library.register_fake("bisparse::pack_2to4")
def _(weight: Tensor, mask: Tensor) -> Packed:
    return packed_like(weight)


@torch.library.register_fake("bisparse::pack_2to4_transposable")
def _(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.bool), *packed_like(weight)


_LIBRARY.impl("pack_2to4", reference_pack_2to4, "CompositeExplicitAutograd")
_LIBRARY.impl("pack_2to4_transposable", reference_pack_2to4_transposable, "CompositeExplicitAutograd")


if find_spec("triton") is not None:
    for _name in ("pack_2to4", "pack_2to4_transposable"):
        _LIBRARY.impl(_name, ops.triton_kernel(_name), "CUDA")
