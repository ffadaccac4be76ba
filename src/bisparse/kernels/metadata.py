"""Where the kept weights of a mask stand, and how a library wants to be told: positions and metadata of W and W^T in one pass.

All libraries keep four bits of metadata a group of 4. They differ in which bits stand for which kept set, in which slot an only
kept weight takes, and in the order of the groups; a `MetadataForm` says all three. Metadata are 16-bit words of four consecutive
groups of a row, the first in the lowest bits. Word (r, w) of a matrix stands at

    inner[r mod A, w mod B] + (r div A) * row_stride + (w div B) * word_stride,     inner of shape (A, B).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Int16, Int32, UInt8
from torch import Tensor

from bisparse.kernels.positions import find_positions

__all__ = ["WORD", "MetadataForm", "empty_slots", "form_of_positions", "kept_sets", "lay_out", "words_of"]

WORD = 16
"""Entries of a row that one word of metadata tells of."""
POSITION_BITS = 6

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define(
    "lay_out_2to4(Tensor mask, Tensor codes, Tensor inner, int row_stride, int word_stride, Tensor? inner_t, int row_stride_t,"
    " int word_stride_t, Tensor(a!) positions, Tensor(b!) metadata, Tensor(c!)? positions_t, Tensor(d!)? metadata_t,"
    " Tensor(e!)? broken) -> ()"
)


class MetadataForm(NamedTuple):
    """How a library stores the metadata of (R, C) matrices; the same for all masks."""

    codes: Int16[Tensor, "16"]
    """For each kept set of a group, bit j for entry j: its positions (see `positions`), and above these `POSITION_BITS` its four
    bits of metadata. Sets of more than two have none."""
    inner: Int32[Tensor, "A B"]
    row_stride: int
    word_stride: int

    def places(self, rows: int, words: int) -> Int[Tensor, "R W"]:
        """Where each word of a (rows, 16 * words) matrix stands."""
        height, width = self.inner.shape
        row = torch.arange(rows, device=self.inner.device)[:, None]
        word = torch.arange(words, device=self.inner.device)
        outer = row // height * self.row_stride + word // width * self.word_stride
        return self.inner[row % height, word % width].long() + outer


def form_of_positions(inner: Int[Tensor, "A B"], row_stride: int, word_stride: int, device: torch.device) -> MetadataForm:
    """The form of a library whose four bits are those of `find_positions`, as CUTLASS has them, in an order that is given."""
    sets = torch.arange(16)[:, None] >> torch.arange(4) & 1 == 1
    few = sets.sum(-1, keepdim=True) <= 2
    positions = torch.where(few, find_positions(sets & few), 0).flatten().to(torch.int16)
    codes = positions | (positions & 15) << POSITION_BITS
    return MetadataForm(codes.to(device), inner.to(device, torch.int32), row_stride, word_stride)


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
        form: of W; its codes serve W^T too.
        transposed: the form of W^T, and where its positions and metadata go.
        broken: becomes 1 if a group keeps more than two; stays as it is otherwise.
    """
    rows, columns = mask.shape
    if columns % WORD or (transposed is not None and rows % WORD):
        raise ValueError(f"a {rows} x {columns} mask cannot be laid out: {WORD} must divide the length of its lines")
    words = metadata.view(torch.int16)
    if transposed is None:
        torch.ops.bisparse.lay_out_2to4(mask, *form, None, 0, 0, positions, words, None, None, broken)
    else:
        form_t, positions_t, metadata_t = transposed
        words_t = metadata_t.view(torch.int16)
        torch.ops.bisparse.lay_out_2to4(mask, *form, *form_t[1:], positions, words, positions_t, words_t, broken)


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


def words_of(entries: Int[Tensor, "R G"], form: MetadataForm) -> Int16[Tensor, " W"]:
    """The metadata of groups whose codes are given, each word at its place."""
    nibbles = (entries.long() >> POSITION_BITS).unflatten(-1, (-1, 4))
    words = (nibbles << torch.arange(0, WORD, 4, device=entries.device)).sum(-1).to(torch.int16)
    placed = torch.empty_like(words).flatten()
    placed[form.places(*words.shape).flatten()] = words.flatten()
    return placed


def reference_lay_out(
    mask: Tensor, codes: Tensor, inner: Tensor, row_stride: int, word_stride: int, inner_t: Tensor | None, row_stride_t: int,
    word_stride_t: int, positions: Tensor, metadata: Tensor, positions_t: Tensor | None, metadata_t: Tensor | None,
    broken: Tensor | None,
) -> None:  # fmt: skip
    """The specification of `lay_out`."""
    sides = [(mask, MetadataForm(codes, inner, row_stride, word_stride), positions, metadata)]
    if inner_t is not None and positions_t is not None and metadata_t is not None:
        sides.append((mask.t(), MetadataForm(codes, inner_t, row_stride_t, word_stride_t), positions_t, metadata_t))
    for matrix, form, place_of_positions, place_of_metadata in sides:
        kept = kept_sets(matrix).long()
        entry = codes[kept].long()
        place_of_positions.copy_(entry & (1 << POSITION_BITS) - 1)
        place_of_metadata.view(-1).copy_(words_of(entry, form))
        if broken is not None:
            more = matrix.unflatten(-1, (-1, 4)).sum(-1) > 2
            broken.copy_(torch.maximum(broken, more.any().to(broken.dtype)))


@torch.library.register_fake("bisparse::lay_out_2to4")
def _(*_: Any) -> None:
    return None


def _on_a_gpu(*arguments: Any) -> None:
    from bisparse.kernels import cuda_metadata

    with torch.cuda.device_of(arguments[0]):
        cuda_metadata.lay_out(*arguments)


_KERNELS: dict[str, Callable[..., None]] = {"CompositeExplicitAutograd": reference_lay_out}
if find_spec("triton") is not None:  # without it, as on Windows, the specification runs on the GPU too
    _KERNELS["CUDA"] = _on_a_gpu
for _key, _kernel in _KERNELS.items():
    _LIBRARY.impl("lay_out_2to4", _kernel, _key)
