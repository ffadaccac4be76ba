"""Finds the layout of cuSPARSELt's metadata from matrices that it packs, since the layout is not documented.

Matrices whose groups encode their own index in the choice of kept entries show where each group's four bits are stored; one
with all choices shows the bits and slots of each. The layout is used only if it predicts the library's packing of a random
matrix bit by bit. A mask's metadata can then be written without the library, which would read and write whole dense matrices.

Known from other sources, but not assumed here: the values come first, group after group; four bits per group follow, on
Ampere in blocks of 128 rows and 64 columns, a word for four groups of a row (torch, SparseSemiStructuredTile.cu), on Hopper in
blocks of 64 rows and 32 columns, a word for two groups of each of two rows (torchao, sparse24_sm90_sparsify.cu).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bisparse.kernels.sparse24.metadata import CODES, MetadataLayout, layout_from_order, metadata_of
from bisparse.kernels.sparse24.positions import read_positions, take_values

__all__ = ["learn_layout"]

SETS = tuple(kept for kept in range(16) if kept.bit_count() <= 2)
DIGITS = (0b0011, 0b0101, 0b1010, 0b1100)
"""Choices of kept entries that encode the digits of a number in base four."""
TAGS = 63
"""Number of tags of groups: with four places each, they are integers that bfloat16 represents exactly."""
HEIGHTS, WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (4, 8, 16, 32, 64)
"""Block sizes (rows, groups) at which an order may repeat."""

Pack = Callable[[Float[Tensor, "R C"]], Tensor]
"""A function that returns everything the library stores for a matrix, as one tensor."""


@functools.lru_cache(maxsize=256)
def learn_layout(pack: Pack, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataLayout | None:
    """The layout of (rows, columns) matrices, if the values come first, group after group, followed by four bits per group.

    Packs about fifteen matrices of this size, once. None if the library stores them differently, or there is too little memory;
    this is cached too, since trying again in every pass would be slower than letting the library pack.
    """
    try:
        return _learnt(pack, rows, columns, dtype, device)
    except torch.OutOfMemoryError:
        return None


def _learnt(pack: Pack, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataLayout | None:
    count = rows * columns // 4
    number = torch.arange(count, dtype=torch.int32, device=device)

    def packed(sets: Int[Tensor, " G"], tags: Int[Tensor, " G"] | int = 0) -> tuple[Tensor, Tensor] | None:
        flat = pack(_image(sets, tags, dtype).view(rows, columns)).flatten()
        tail = flat[2 * count :].view(torch.uint8)
        return (flat[: 2 * count].view(count, 2), _nibbles(tail)) if 2 * tail.numel() == count else None

    alphabet = torch.full((16,), -1, dtype=torch.int32, device=device)
    for digit, kept in enumerate(DIGITS):
        found = packed(torch.full_like(number, kept))
        if found is None or bool((found[1] != found[1][:1]).any()):
            return None
        alphabet[found[1][0]] = digit
    spelt = torch.zeros_like(number)
    digits = torch.tensor(DIGITS, dtype=torch.int32, device=device)
    for power in range(0, max(1, (count - 1).bit_length()), 2):
        found = packed(digits[number >> power & 3])
        if found is None or bool((read := alphabet[found[1]]).lt(0).any()):
            return None
        spelt |= read << power
    place = torch.full_like(number, -1)
    place[spelt.clamp_(max=count - 1)] = number
    if bool((place < 0).any()):  # two places for one group, and none for another
        return None
    sets = torch.tensor(SETS, device=device)[number % len(SETS)]
    if (found := packed(sets)) is None:
        return None
    values, metadata = found
    positions = read_positions((values - 1).view(-1, 1, 2), (values != 0).view(-1, 1, 2)).flatten()
    codes = torch.zeros(16, dtype=torch.uint8, device=device).scatter_(0, sets, positions)
    nibbles = torch.zeros(CODES, dtype=torch.uint8, device=device).scatter_(0, positions.long(), metadata[place].to(torch.uint8))
    layout = _repeating(place.view(rows, columns // 4), (codes, nibbles))
    own = torch.Generator(device).manual_seed(0)
    sets = torch.tensor(SETS, device=device)[torch.randint(len(SETS), (count,), device=device, generator=own)]
    tags = torch.randint(TAGS, (count,), device=device, generator=own)
    positions = codes[sets].view(rows, -1)
    values = take_values(_image(sets, tags, dtype).view(rows, columns), positions).view(-1, 2)
    metadata = _nibbles(metadata_of(positions, layout).view(torch.uint8))
    found = packed(sets, tags)
    return layout if found is not None and torch.equal(values, found[0]) and torch.equal(metadata, found[1]) else None


def _image(sets: Int[Tensor, " G"], tags: Int[Tensor, " G"] | int, dtype: torch.dtype) -> Float[Tensor, "G 4"]:
    """Groups whose kept entries have as values their places, 1 to 4, plus four times a tag."""
    place = torch.arange(4, dtype=torch.int16, device=sets.device)
    numbers = place + 1 + 4 * (tags.to(torch.int16)[:, None] if isinstance(tags, Tensor) else tags)
    return torch.where((sets.to(torch.int16)[:, None] >> place & 1).bool(), numbers, 0).to(dtype)


def _nibbles(metadata: UInt8[Tensor, " B"]) -> Int[Tensor, " G"]:
    return torch.stack((metadata & 15, metadata >> 4), -1).flatten().int()


def _repeating(place: Int[Tensor, "R G"], slots: tuple[Tensor, Tensor]) -> MetadataLayout:
    """The layout of the smallest block that repeats at regular strides and fills whole words; or of the whole matrix."""
    rows, groups = place.shape
    blocks = [(height, width) for height, width in itertools.product(HEIGHTS, WIDTHS) if not (rows % height or groups % width)]
    for height, width in (*sorted(blocks, key=lambda block: block[0] * block[1]), (rows, groups)):
        inner = place[:height, :width]
        down = int(place[height, 0] - place[0, 0]) if height < rows else 0
        beside = int(place[0, width] - place[0, 0]) if width < groups else 0
        every = torch.arange(inner.numel(), dtype=place.dtype, device=place.device)
        if down % 4 or beside % 4 or not torch.equal(inner.flatten().sort().values, every):
            continue
        row, group = torch.arange(rows, device=place.device)[:, None], torch.arange(groups, device=place.device)
        if torch.equal(inner[row % height, group % width] + row // height * down + group // width * beside, place):
            return layout_from_order(inner, down // 4, beside // 4, place.device, slots)
    raise AssertionError("the whole repeats itself")
