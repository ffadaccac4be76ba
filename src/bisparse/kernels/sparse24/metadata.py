"""Positions of the kept weights of a mask, of W and of W^T, and their metadata in the layout of any library.

All libraries keep four bits of metadata per group of 4. They differ in the bits of each kept set, in the slot of a weight that is
alone in its group, and in the order of the groups; a `MetadataLayout` holds all three. The order repeats: a block of (height,
width) rows and groups fills `height * width / 4` consecutive words of 16 bits, in an order of its own, and block (i, j) begins at
word

    i * row_stride + j * group_stride.

CUTLASS's block is 32 rows and 8 groups, and a word holds four groups of a row. `accelerate.backends.metadata_layout` describes
cuSPARSELt's: on Hopper a word holds two groups of each of two rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Int16, Int32, UInt8
from torch import Tensor

from bisparse.kernels.sparse24.positions import find_positions

__all__ = [
    "WORD",
    "MetadataLayout",
    "both_layouts",
    "check_layout",
    "empty_slots",
    "kept_sets",
    "lay_out",
    "layout_from_order",
    "metadata_of",
]

WORD = 16
"""Entries of a matrix per word of metadata; the length of its rows is a multiple of this."""
CODES = 64
"""Positions of a group are six bits."""

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
LAYOUT = "Tensor codes, Tensor nibbles, Tensor sources, int height, int width, int row_stride, int group_stride"
"""The schema of a layout among the arguments of an operator; the next one is that of W^T."""
LAYOUT_T = LAYOUT.replace(",", "_t,") + "_t"
_LIBRARY.define(
    f"lay_out_2to4(Tensor mask, {LAYOUT}, {LAYOUT_T.replace('Tensor', 'Tensor?')},"
    " Tensor(a!) positions, Tensor(b!) metadata, Tensor(c!)? positions_t, Tensor(d!)? metadata_t, Tensor(e!)? invalid) -> ()"
)


class MetadataLayout(NamedTuple):
    """How a library stores the metadata of (R, C) matrices; the same for all masks."""

    codes: UInt8[Tensor, "16"]
    """The positions (see `positions`) of each kept set of a group, bit j for entry j. Sets of more than two have none."""
    nibbles: UInt8[Tensor, "64"]
    """The four bits of metadata for each of these positions."""
    sources: Int32[Tensor, "K 4"]
    """For each word of a block, the groups whose bits it holds, from the lowest bits up; row * width + group within the block."""
    height: int
    width: int
    row_stride: int
    group_stride: int

    def groups_of_words(self, rows: int, groups: int) -> Int[Tensor, "W 4"]:
        """For each word in memory of the metadata of a (rows, 4 * groups) matrix, its groups: row * groups + group."""
        device, size = self.sources.device, len(self.sources)
        block_row = torch.arange(rows // self.height, device=device)[:, None, None]
        block_column = torch.arange(groups // self.width, device=device)[:, None]
        place = block_row * self.row_stride + block_column * self.group_stride + torch.arange(size, device=device)
        source = self.sources.long()
        row = block_row[..., None] * self.height + source // self.width
        group = block_column[..., None] * self.width + source % self.width
        found = torch.empty((rows * groups // 4, 4), dtype=torch.int64, device=device)
        found[place.flatten()] = (row * groups + group).flatten(0, 2)
        return found


NO_LAYOUT = (None, None, None, 1, 1, 0, 0)
"""Passed instead of a layout of W^T where there is none."""


def both_layouts(*arguments: Any) -> tuple[MetadataLayout, MetadataLayout]:
    """The layouts of W and of W^T among the arguments of an operator."""
    return MetadataLayout(*arguments[:7]), MetadataLayout(*arguments[7:])


def layout_from_order(
    place: Int[Tensor, "A B"],
    row_stride: int,
    group_stride: int,
    device: torch.device,
    slots: tuple[Tensor, Tensor] | None = None,
) -> MetadataLayout:
    """The layout in which each group of a block has a given position, in units of four bits.

    Args:
        place: a permutation of 0 to A * B - 1; 4 divides that.
        slots: `codes` and `nibbles`; by default those of `find_positions`, and of CUTLASS.
    """
    height, width = place.shape
    sources = place.flatten().argsort().view(-1, 4).to(device, torch.int32)
    if slots is None:
        sets = torch.arange(16, device="cpu")[:, None] >> torch.arange(4, device="cpu") & 1 == 1
        few = sets.sum(-1, keepdim=True) <= 2
        codes = torch.where(few, find_positions(sets & few), 0).flatten()
        slots = codes.to(device), torch.arange(CODES, dtype=torch.uint8, device=device) & 15
    return MetadataLayout(*slots, sources, height, width, row_stride, group_stride)


def lay_out(
    mask: Bool[Tensor, "R C"],
    layout: MetadataLayout,
    positions: UInt8[Tensor, "R G"],
    metadata: UInt8[Tensor, "R B"],
    transposed: tuple[MetadataLayout, UInt8[Tensor, "C H"], UInt8[Tensor, "C D"]] | None = None,
    invalid: Int32[Tensor, ""] | None = None,
) -> None:
    """Write positions and metadata of a mask, and with `transposed` of its transpose, into given memory.

    Of a group that keeps more than two, what is written is undefined.

    Args:
        mask: with a multiple of 16 columns, and with `transposed` of rows.
        layout: of W.
        transposed: the layout of W^T, and where its positions and metadata go.
        invalid: becomes 1 if a group keeps more than two; unchanged otherwise.
    """
    rows, columns = mask.shape
    check_layout(layout, rows, columns)
    words = metadata.view(torch.int16)
    if transposed is None:
        torch.ops.bisparse.lay_out_2to4(mask, *layout, *NO_LAYOUT, positions, words, None, None, invalid)
    else:
        layout_t, positions_t, metadata_t = transposed
        check_layout(layout_t, columns, rows)
        words_t = metadata_t.view(torch.int16)
        torch.ops.bisparse.lay_out_2to4(mask, *layout, *layout_t, positions, words, positions_t, words_t, invalid)


def check_layout(layout: MetadataLayout, rows: int, columns: int) -> None:
    """Raise ValueError unless a metadata layout tiles (rows, columns) matrices in whole words and blocks."""
    if columns % WORD:
        raise ValueError(f"rows of {columns} entries have no metadata in whole words: {WORD} must divide their length")
    if rows % layout.height or columns // 4 % layout.width:
        raise ValueError(
            f"a metadata layout in blocks of {layout.height} x {4 * layout.width} does not tile a {rows} x {columns} matrix"
        )


def empty_slots(rows: int, columns: int, device: torch.device) -> tuple[UInt8[Tensor, "R G"], UInt8[Tensor, "R B"]]:
    """Memory for the positions and, as bytes, the metadata of a (rows, columns) mask; 16 divides the columns."""
    positions = torch.empty((rows, columns // 4), dtype=torch.uint8, device=device)
    return positions, torch.empty((rows, columns // 8), dtype=torch.uint8, device=device)


def kept_sets(mask: Bool[Tensor, "R C"]) -> UInt8[Tensor, "R G"]:
    """The kept set of every group, bit j for entry j; 4 divides the columns.

    >>> kept_sets(torch.tensor([[True, False, False, True, False, False, False, False]])).tolist()
    [[9, 0]]
    """
    m0, m1, m2, m3 = mask.unflatten(-1, (-1, 4)).to(torch.uint8).unbind(-1)
    return m0 | m1 << 1 | m2 << 2 | m3 << 3


def metadata_of(positions: UInt8[Tensor, "R G"], layout: MetadataLayout) -> Int16[Tensor, " W"]:
    """The metadata of positions, in plain torch: the specification of what the kernels write."""
    nibbles = layout.nibbles[positions.long()].flatten().long()
    words = nibbles[layout.groups_of_words(*positions.shape)] << torch.arange(0, WORD, 4, device=positions.device)
    return words.sum(-1).to(torch.int16)


def reference_lay_out(mask: Tensor, *arguments: Any) -> None:
    """The specification of `lay_out`."""
    layout, layout_t = both_layouts(*arguments[:14])
    positions, metadata, positions_t, metadata_t, invalid = arguments[14:]
    sides = [(mask, layout, positions, metadata)]
    if positions_t is not None:
        sides.append((mask.t(), layout_t, positions_t, metadata_t))
    for matrix, one, positions_out, metadata_out in sides:
        positions_out.copy_(one.codes[kept_sets(matrix).long()])
        metadata_out.view(-1).copy_(metadata_of(positions_out, one))
        if invalid is not None:
            more = matrix.unflatten(-1, (-1, 4)).sum(-1) > 2
            invalid.copy_(torch.maximum(invalid, more.any().to(invalid.dtype)))


@torch.library.register_fake("bisparse::lay_out_2to4")
def _(*_: Any) -> None:
    return None


_LIBRARY.impl("lay_out_2to4", reference_lay_out, "CompositeExplicitAutograd")
