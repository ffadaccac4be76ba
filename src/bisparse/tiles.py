"""Weight <-> matrices <-> tiles: the only file that reshapes weights.

A weight is pruned as the matrix that the GEMM multiplies by: rows are outputs, columns are inputs, so that groups
along a row are on the reduction axis of the forward pass and groups along a column on that of the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

import torch
from jaxtyping import Shaped
from torch import Tensor

__all__ = [
    "Layout",
    "LayoutKind",
    "check_layout",
    "check_padding",
    "default_layout",
    "from_matrices",
    "from_tiles",
    "kernel_positions",
    "pad_to_multiple",
    "to_matrices",
    "to_tiles",
]


class LayoutKind(StrEnum):
    """How a parameter stores its GEMM operands."""

    LINEAR = "linear"
    """(O, I): `nn.Linear`; one matrix."""
    TRANSPOSED = "transposed"
    """(I, O): GPT-2's `Conv1D`; one matrix, transposed."""
    CONV = "conv"
    """(C_out, C_in / groups, *kernel): `nn.Conv1d/2d/3d`; one matrix per group and kernel position."""
    PACKED = "packed"
    """(parts * O, I): several projections stacked, as attention's `in_proj_weight`; one matrix per part."""
    CONV_LAST = "conv-last"
    """(C_out, *kernel, C_in / groups): a convolution with its channels last, as MLX stores it; matrices as for CONV."""
    CONV_TRANSPOSED = "conv-transposed"
    """(C_in, C_out / groups, *kernel): `nn.ConvTranspose1d/2d/3d`; one matrix per group and kernel position."""
    EXPERTS = "experts"
    """(E, O, I): a mixture's experts in one parameter; a matrix per expert."""
    EXPERTS_TRANSPOSED = "experts-transposed"
    """(E, I, O): the same with the inputs first, as GPT-OSS and Llama 4 store it; a matrix per expert, transposed."""


CONVOLUTIONS = frozenset({LayoutKind.CONV, LayoutKind.CONV_LAST, LayoutKind.CONV_TRANSPOSED})
INPUTS_FIRST = frozenset({LayoutKind.TRANSPOSED, LayoutKind.CONV_TRANSPOSED, LayoutKind.EXPERTS_TRANSPOSED})

DIMENSIONS = {
    LayoutKind.LINEAR: (2,),
    LayoutKind.TRANSPOSED: (2,),
    LayoutKind.CONV: (3, 4, 5),
    LayoutKind.PACKED: (2,),
    LayoutKind.CONV_LAST: (3, 4, 5),
    LayoutKind.CONV_TRANSPOSED: (3, 4, 5),
    LayoutKind.EXPERTS: (3,),
    LayoutKind.EXPERTS_TRANSPOSED: (3,),
}
"""How many dimensions a weight of each layout may have."""


@dataclass(frozen=True)
class Layout:
    """The layout of one parameter; `groups` for convolutions, `parts` for packed projections."""

    kind: LayoutKind = LayoutKind.LINEAR
    groups: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in (*LayoutKind,):
            raise ValueError(f"Layout(kind={self.kind!r:.40}): expected one of {', '.join(LayoutKind)}")
        object.__setattr__(self, "kind", LayoutKind(self.kind))
        for name, number in (("groups", self.groups), ("parts", self.parts)):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 1 << 31:
                raise ValueError(f"Layout({name}={number!r:.40}): expected a whole number that is 1 or more")
        if self.groups > 1 and not self.is_convolution:
            raise ValueError(f"Layout('{self.kind}', groups={self.groups}): only convolutions have groups")
        if self.parts > 1 and self.kind is not LayoutKind.PACKED:
            raise ValueError(f"Layout('{self.kind}', parts={self.parts}): only the kind 'packed' has parts")

    @property
    def is_convolution(self) -> bool:
        """Whether the weight has kernel positions, whose products are summed into one output."""
        return self.kind in CONVOLUTIONS

    @property
    def inputs_first(self) -> bool:
        """Whether a row of the stored weight is a column of a GEMM matrix."""
        return self.kind in INPUTS_FIRST

    def __str__(self) -> str:
        detail = f", {self.groups} groups" if self.groups > 1 else f", {self.parts} parts" if self.parts > 1 else ""
        return f"{self.kind}{detail}"


@cache
def default_layout(ndim: int) -> Layout:
    """The layout of a bare tensor: 2-D is a Linear weight, 3-D a batch of matrices, 4-D and 5-D a convolution's weight."""
    if not isinstance(ndim, int):
        raise TypeError(f"{ndim!r:.40} is no number of dimensions")
    if ndim == 2:
        return Layout(LayoutKind.LINEAR)
    if ndim == 3:
        return Layout(LayoutKind.EXPERTS)
    if ndim in (4, 5):
        return Layout(LayoutKind.CONV)
    raise ValueError(
        f"a weight of {ndim} dimensions has no GEMM layout: expected 2-D (O, I), 3-D (B, O, I), 4-D or 5-D (C_out, C_in, *k)"
    )


def to_matrices(weight: Shaped[Tensor, "..."], layout: Layout) -> Shaped[Tensor, "B O I"]:
    """The batch of GEMM matrices that a weight holds; a view where strides allow it.

    Shapes: linear (O, I) -> (1, O, I); transposed (I, O) -> (1, O, I); conv (C_out, C_in/g, *K) -> (g * prod(K),
    C_out/g, C_in/g), and so do channels last (C_out, *K, C_in/g) and transposed convolutions (C_in, C_out/g, *K); packed
    (p * O, I) -> (p, O, I); experts (E, O, I), or transposed (E, I, O), -> (E, O, I).
    """
    _check_strided(weight)
    _check_layout(tuple(weight.shape), layout)
    match layout.kind:
        case LayoutKind.LINEAR:
            return weight.unsqueeze(0)
        case LayoutKind.TRANSPOSED:
            return weight.t().unsqueeze(0)
        case LayoutKind.PACKED:
            return weight.unflatten(0, (layout.parts, -1))
        case LayoutKind.EXPERTS:
            return weight
        case LayoutKind.CONV:
            by_position = weight.unflatten(0, (layout.groups, -1)).flatten(3)  # (g, O, I, P)
            return by_position.permute(0, 3, 1, 2).flatten(0, 1)
        case LayoutKind.CONV_LAST:
            return to_matrices(weight.movedim(-1, 1), replace(layout, kind=LayoutKind.CONV))
        case LayoutKind.CONV_TRANSPOSED:
            by_position = weight.unflatten(0, (layout.groups, -1)).flatten(3)  # (g, I, O, P)
            return by_position.permute(0, 3, 2, 1).flatten(0, 1)
        case LayoutKind.EXPERTS_TRANSPOSED:
            return weight.transpose(1, 2)
    raise AssertionError(layout.kind)


def check_layout(layout: object) -> None:
    """Raise TypeError for what is no `Layout`; text is turned into one by `bisparse.layers.parse_layout`."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, such as Layout('linear'), not {layout!r:.40}")


def from_matrices(
    matrices: Shaped[Tensor, "B O I"], layout: Layout, shape: tuple[int, ...] | torch.Size
) -> Shaped[Tensor, "..."]:
    """The inverse of `to_matrices` for a weight of the given shape; contiguous."""
    shape = tuple(shape)
    _check_strided(matrices)
    _check_layout(shape, layout)
    if matrices.ndim != 3 or matrices.numel() != math.prod(shape):
        raise ValueError(f"matrices of shape {tuple(matrices.shape)} are not those of a weight of shape {shape}")
    match layout.kind:
        case LayoutKind.LINEAR | LayoutKind.PACKED | LayoutKind.EXPERTS:
            return matrices.reshape(shape).contiguous()
        case LayoutKind.TRANSPOSED:
            return matrices[0].t().contiguous()
        case LayoutKind.CONV:
            by_position = matrices.unflatten(0, (layout.groups, math.prod(shape[2:])))  # (g, P, O, I)
            return by_position.permute(0, 2, 3, 1).reshape(shape).contiguous()
        case LayoutKind.CONV_LAST:
            channels_first = (shape[0], shape[-1], *shape[1:-1])
            return from_matrices(matrices, replace(layout, kind=LayoutKind.CONV), channels_first).movedim(1, -1).contiguous()
        case LayoutKind.CONV_TRANSPOSED:
            by_position = matrices.unflatten(0, (layout.groups, math.prod(shape[2:])))  # (g, P, O, I)
            return by_position.permute(0, 3, 2, 1).reshape(shape).contiguous()
        case LayoutKind.EXPERTS_TRANSPOSED:
            return matrices.transpose(1, 2).contiguous()
    raise AssertionError(layout.kind)


def kernel_positions(shape: tuple[int, ...] | torch.Size, layout: Layout) -> int:
    """The number of kernel positions, which are summed into one output; 1 for layouts other than convolutions."""
    check_layout(layout)
    if not layout.is_convolution:
        return 1
    return math.prod(tuple(shape)[1:-1] if layout.kind is LayoutKind.CONV_LAST else tuple(shape)[2:])


def _check_layout(shape: tuple[int, ...], layout: Layout) -> None:
    check_layout(layout)
    kind = layout.kind
    if len(shape) not in DIMENSIONS[kind]:
        raise ValueError(
            f"a weight of shape {shape} cannot have the layout '{kind}', "
            f"which needs {' or '.join(map(str, DIMENSIONS[kind]))} dimensions"
        )
    divisor = layout.groups if layout.is_convolution else layout.parts
    if divisor < 1 or shape[0] % divisor:
        raise ValueError(
            f"a weight of shape {shape} cannot be split into {divisor} "
            f"{'groups' if layout.is_convolution else 'parts'} along its first dimension"
        )


MAX_PADDED, MAX_PADDING = 1 << 26, 4
"""Entries that matrices may have after padding, and how many times their own; the larger of the two is the limit."""


def _check_side(m: int) -> None:
    if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m < 1 << 31:
        raise ValueError(f"{m!r:.40} is no side of a tile")


def _check_strided(tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(f"a tensor stored as {tensor.layout} cannot be cut into tiles: pass its dense form, tensor.to_dense()")


def check_padding(shape: tuple[int, ...], padded: tuple[int, ...], m: int) -> None:
    """Raise ValueError if matrices of a shape would be almost all padding once `m` divides their sides."""
    if any(isinstance(side, Tensor) for side in (*shape, *padded)):
        raise ValueError("shapes are tuples of integers, and these hold tensors")
    entries = math.prod(padded)
    if entries > max(MAX_PADDED, MAX_PADDING * math.prod(shape)):
        raise ValueError(
            f"M = {m} is far larger than the sides of matrices of shape {shape}, which would take {entries:,} entries with zeros "
            "appended; choose a smaller M, or leave the layer dense"
        )


def pad_to_multiple(matrices: Shaped[Tensor, "*B R C"], m: int) -> Shaped[Tensor, "*B R2 C2"]:
    """Zeros appended so that `m` divides the last two sides; the same tensor where it already does.

    Raises:
        ValueError: no matrices, no side of a tile, or one so large that almost all would be padding.
    """
    _check_side(m)
    _check_strided(matrices)
    if matrices.ndim < 2:
        raise ValueError(f"a tensor of shape {tuple(matrices.shape)} holds no matrices")
    rows, columns = -matrices.shape[-2] % m, -matrices.shape[-1] % m
    check_padding(tuple(matrices.shape), (*matrices.shape[:-2], matrices.shape[-2] + rows, matrices.shape[-1] + columns), m)
    return torch.nn.functional.pad(matrices, (0, columns, 0, rows)) if rows or columns else matrices


def to_tiles(matrix: Shaped[Tensor, "R C"], m: int) -> Shaped[Tensor, "B M M"]:
    """Cut a matrix into its tiles, band by band, left to right: tile t covers rows ``t // (C/m)``, columns ``t % (C/m)``."""
    _check_side(m)
    _check_strided(matrix)
    if matrix.ndim != 2 or matrix.shape[0] % m or matrix.shape[1] % m:
        raise ValueError(f"a tensor of shape {tuple(matrix.shape)} is no matrix of whole tiles of side {m}: see pad_to_multiple")
    rows, columns = matrix.shape
    return matrix.view(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m, m)


def from_tiles(tiles: Shaped[Tensor, "B M M"], rows: int, columns: int) -> Shaped[Tensor, "R C"]:
    """The inverse of `to_tiles`."""
    _check_strided(tiles)
    for side in (rows, columns):
        if isinstance(side, bool) or not isinstance(side, int):
            raise ValueError(f"{rows!r:.40} x {columns!r:.40} is no shape of a matrix")
    m = tiles.shape[-1] if tiles.ndim == 3 else 0
    if m == 0 or tiles.shape[-2] != m or rows % m or columns % m or tiles.numel() != rows * columns:
        raise ValueError(f"tiles of shape {tuple(tiles.shape)} do not make a {rows} x {columns} matrix")
    return tiles.view(rows // m, columns // m, m, m).transpose(1, 2).reshape(rows, columns)
