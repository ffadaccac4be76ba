"""Where the kept weights of a mask stand, and how a library wants to be told: positions and metadata of W and W^T.

All libraries keep four bits of metadata a group of 4. They differ in which bits stand for which kept set, in which slot an only
kept weight takes, and in the order of the groups; a `MetadataForm` says all three. The order repeats: a block of (height, width)
rows and groups fills `height * width / 4` consecutive words of 16 bits, in an order of its own, and block (i, j) begins at word

    i * row_stride + j * group_stride.

CUTLASS's block is 32 rows and 8 groups, and a word holds four groups of a row. What is known of cuSPARSELt's stands in
`accelerate.form`: on Hopper a word holds two groups of each of two rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Int16, Int32, UInt8
from torch import Tensor

from bisparse.kernels.sparse24.positions import find_positions

__all__ = [
    "WORD",
    "MetadataForm",
    "both_forms",
    "check_form",
    "empty_slots",
    "form_of_order",
    "kept_sets",
    "lay_out",
    "metadata_of",
]

WORD = 16
"""Entries of a matrix that one word of metadata tells of; the length of its lines is a multiple of this."""
CODES = 64
"""Positions of a group are six bits."""

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
FORM = "Tensor codes, Tensor nibbles, Tensor sources, int height, int width, int row_stride, int group_stride"
"""A form among the arguments of an operator; the next is another, of W^T."""
FORM_T = FORM.replace(",", "_t,") + "_t"
_LIBRARY.define(
    f"lay_out_2to4(Tensor mask, {FORM}, {FORM_T.replace('Tensor', 'Tensor?')},"
    " Tensor(a!) positions, Tensor(b!) metadata, Tensor(c!)? positions_t, Tensor(d!)? metadata_t, Tensor(e!)? broken) -> ()"
)


class MetadataForm(NamedTuple):
    """How a library stores the metadata of (R, C) matrices; the same for all masks."""

    codes: UInt8[Tensor, "16"]
    """The positions (see `positions`) of each kept set of a group, bit j for entry j. Sets of more than two have none."""
    nibbles: UInt8[Tensor, "64"]
    """The four bits of metadata for each of these positions."""
    sources: Int32[Tensor, "K 4"]
    """For each word of a block, the groups whose bits it holds, the lowest first; row * width + group, within the block."""
    height: int
    width: int
    row_stride: int
    group_stride: int

    def groups_of_words(self, rows: int, groups: int) -> Int[Tensor, "W 4"]:
        """For each word in memory of the metadata of a (rows, 4 * groups) matrix, its groups: row * groups + group."""
        device, size = self.sources.device, len(self.sources)
        down = torch.arange(rows // self.height, device=device)[:, None, None]
        beside = torch.arange(groups // self.width, device=device)[:, None]
        place = down * self.row_stride + beside * self.group_stride + torch.arange(size, device=device)
        source = self.sources.long()
        row, group = down[..., None] * self.height + source // self.width, beside[..., None] * self.width + source % self.width
        found = torch.empty((rows * groups // 4, 4), dtype=torch.int64, device=device)
        found[place.flatten()] = (row * groups + group).flatten(0, 2)
        return found


NO_FORM = (None, None, None, 1, 1, 0, 0)
"""In place of the form of W^T."""


def both_forms(*arguments: Any) -> tuple[MetadataForm, MetadataForm]:
    """The forms of W and of W^T among the arguments of an operator."""
    return MetadataForm(*arguments[:7]), MetadataForm(*arguments[7:])


def form_of_order(
    place: Int[Tensor, "A B"],
    row_stride: int,
    group_stride: int,
    device: torch.device,
    slots: tuple[Tensor, Tensor] | None = None,
) -> MetadataForm:
    """A form by the place, in four bits, of each group of a block.

    Args:
        place: a permutation of 0 to A * B - 1; 4 divides that.
        slots: `codes` and `nibbles`; by default those of `find_positions`, and of CUTLASS.
    """
    height, width = place.shape
    sources = place.flatten().argsort().view(-1, 4).to(device, torch.int32)
    if slots is None:
        sets = torch.arange(16)[:, None] >> torch.arange(4) & 1 == 1
        few = sets.sum(-1, keepdim=True) <= 2
        codes = torch.where(few, find_positions(sets & few), 0).flatten()
        slots = codes.to(device), torch.arange(CODES, dtype=torch.uint8, device=device) & 15
    return MetadataForm(*slots, sources, height, width, row_stride, group_stride)


def lay_out(
    mask: Bool[Tensor, "R C"],
    form: MetadataForm,
    positions: UInt8[Tensor, "R G"],
    metadata: UInt8[Tensor, "R B"],
    transposed: tuple[MetadataForm, UInt8[Tensor, "C H"], UInt8[Tensor, "C D"]] | None = None,
    broken: Int32[Tensor, ""] | None = None,
) -> None:
    """Write positions and metadata of a mask, and with `transposed` of its transpose, into memory that is given.

    What is written of a group that keeps more than two is not to be used.

    Args:
        mask: 16 divides its columns, and with `transposed` its rows.
        form: of W.
        transposed: the form of W^T, and where its positions and metadata go.
        broken: becomes 1 if a group keeps more than two; stays as it is otherwise.
    """
    rows, columns = mask.shape
    check_form(form, rows, columns)
    words = metadata.view(torch.int16)
    if transposed is None:
        torch.ops.bisparse.lay_out_2to4(mask, *form, *NO_FORM, positions, words, None, None, broken)
    else:
        form_t, positions_t, metadata_t = transposed
        check_form(form_t, columns, rows)
        words_t = metadata_t.view(torch.int16)
        torch.ops.bisparse.lay_out_2to4(mask, *form, *form_t, positions, words, positions_t, words_t, broken)


def check_form(form: MetadataForm, rows: int, columns: int) -> None:
    """Raise ValueError unless (rows, columns) matrices are whole words and blocks of a form."""
    if columns % WORD:
        raise ValueError(f"lines of {columns} cannot be laid out: {WORD} must divide them")
    if rows % form.height or columns // 4 % form.width:
        raise ValueError(f"a form in blocks of {form.height} rows and {4 * form.width} columns is not one of {rows} x {columns}")


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


def metadata_of(positions: UInt8[Tensor, "R G"], form: MetadataForm) -> Int16[Tensor, " W"]:
    """The metadata of positions, in plain torch: the specification of what kernels write."""
    nibbles = form.nibbles[positions.long()].flatten().long()
    words = nibbles[form.groups_of_words(*positions.shape)] << torch.arange(0, WORD, 4, device=positions.device)
    return words.sum(-1).to(torch.int16)


def reference_lay_out(mask: Tensor, *arguments: Any) -> None:
    """The specification of `lay_out`."""
    form, form_t = both_forms(*arguments[:14])
    positions, metadata, positions_t, metadata_t, broken = arguments[14:]
    sides = [(mask, form, positions, metadata)]
    if positions_t is not None:
        sides.append((mask.t(), form_t, positions_t, metadata_t))
    for matrix, one, place_of_positions, place_of_metadata in sides:
        place_of_positions.copy_(one.codes[kept_sets(matrix).long()])
        place_of_metadata.view(-1).copy_(metadata_of(place_of_positions, one))
        if broken is not None:
            more = matrix.unflatten(-1, (-1, 4)).sum(-1) > 2
            broken.copy_(torch.maximum(broken, more.any().to(broken.dtype)))


@torch.library.register_fake("bisparse::lay_out_2to4")
def _(*_: Any) -> None:
    return None


def _on_a_gpu(*arguments: Any) -> None:
    from bisparse.kernels.sparse24 import cuda_metadata

    with torch.cuda.device_of(arguments[0]):
        cuda_metadata.lay_out(*arguments)


_KERNELS: dict[str, Callable[..., None]] = {"CompositeExplicitAutograd": reference_lay_out}
if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    _KERNELS["CUDA"] = _on_a_gpu
for _key, _kernel in _KERNELS.items():
    _LIBRARY.impl("lay_out_2to4", _kernel, _key)
