"""How a library lays out the metadata that it packs, learnt from what it packs: cuSPARSELt documents it nowhere.

Matrices whose groups spell their own number in kept sets tell where each group's four bits go; one with all kept sets, what bits
and slots each set gets. What was learnt is believed only if it foretells, bit by bit, what the library makes of a random matrix.
So a mask's metadata can be written without the library, which reads and writes whole dense matrices for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bisparse.kernels.metadata import POSITION_BITS, WORD, MetadataForm
from bisparse.kernels.positions import read_positions, take_values

__all__ = ["learn_form"]

SETS = tuple(kept for kept in range(16) if kept.bit_count() <= 2)
DIGITS = (0b0011, 0b0101, 0b1010, 0b1100)
"""Kept sets that spell the digits of a number in base four."""
TAGS = 63
"""So many tags of groups, times four places, are whole numbers that bfloat16 tells apart."""
HEIGHTS, WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16)
"""Blocks of words in which an order may repeat."""

Pack = Callable[[Float[Tensor, "R C"]], Tensor]
"""All that the library keeps of a matrix, as one tensor."""


def learn_form(pack: Pack, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataForm | None:
    """The form of (rows, columns) matrices, if the values come first, group after group, and then the metadata in words.

    It takes some fifteen matrices of this size. None where the library stores them in another way, or memory is short.
    """
    try:
        return _learnt(pack, rows, columns, dtype, device)
    except torch.OutOfMemoryError:  # not for good
        return None


@functools.lru_cache(maxsize=256)
def _learnt(pack: Pack, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataForm | None:
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
    place = _places_of_words(spelt.clamp_(max=count - 1))
    if place is None:
        return None
    sets = torch.tensor(SETS, device=device)[number % len(SETS)]
    if (found := packed(sets)) is None:
        return None
    values, nibbles = found
    nibbles = nibbles[(4 * place[:, None] + torch.arange(4, device=device)).flatten()]
    entries = read_positions((values - 1).view(-1, 1, 2), (values != 0).view(-1, 1, 2)).flatten() | nibbles << POSITION_BITS
    codes = torch.zeros(16, dtype=torch.int16, device=device).scatter_(0, sets, entries.to(torch.int16))
    form = MetadataForm(codes, *_repeating(place.view(rows, columns // WORD)))
    own = torch.Generator(device).manual_seed(0)
    sets = torch.tensor(SETS, device=device)[torch.randint(len(SETS), (count,), device=device, generator=own)]
    tags = torch.randint(TAGS, (count,), device=device, generator=own)
    values, nibbles = _foretold(form, _image(sets, tags, dtype).view(rows, columns), codes[sets].view(rows, -1))
    found = packed(sets, tags)
    return form if found is not None and torch.equal(values, found[0]) and torch.equal(nibbles, found[1]) else None


def _image(sets: Int[Tensor, " G"], tags: Int[Tensor, " G"] | int, dtype: torch.dtype) -> Float[Tensor, "G 4"]:
    """Groups whose kept entries hold their places, 1 to 4, above four times a tag."""
    place = torch.arange(4, dtype=torch.int16, device=sets.device)
    numbers = place + 1 + 4 * (tags.to(torch.int16)[:, None] if isinstance(tags, Tensor) else tags)
    return torch.where((sets.to(torch.int16)[:, None] >> place & 1).bool(), numbers, 0).to(dtype)


def _nibbles(metadata: UInt8[Tensor, " B"]) -> Int[Tensor, " G"]:
    return torch.stack((metadata & 15, metadata >> 4), -1).flatten().int()


def _places_of_words(spelt: Int[Tensor, " G"]) -> Int[Tensor, " W"] | None:
    """Where each word of four groups went, from the group whose bits stand at each place; None unless they went as words."""
    place = torch.full_like(spelt, -1)
    place[spelt] = torch.arange(len(spelt), dtype=place.dtype, device=spelt.device)
    words = place.view(-1, 4)
    whole = words == words[:, :1] + torch.arange(4, device=spelt.device)
    return words[:, 0] // 4 if bool((whole & (words[:, :1] >= 0) & (words[:, :1] % 4 == 0)).all()) else None


def _repeating(place: Int[Tensor, "R W"]) -> tuple[Tensor, int, int]:
    """The smallest block that repeats at regular distances, and the distances; the whole where none does."""
    rows, words = place.shape
    blocks = [(height, width) for height, width in itertools.product(HEIGHTS, WIDTHS) if height <= rows and width <= words]
    for height, width in (*sorted(blocks, key=lambda block: block[0] * block[1]), (rows, words)):
        inner = place[:height, :width].int().contiguous()
        row_stride = int(place[height, 0] - place[0, 0]) if height < rows else 0
        word_stride = int(place[0, width] - place[0, 0]) if width < words else 0
        if torch.equal(MetadataForm(inner, inner, row_stride, word_stride).places(rows, words), place):
            return inner, row_stride, word_stride
    raise AssertionError("the whole repeats itself")


def _foretold(form: MetadataForm, matrix: Float[Tensor, "R C"], entries: Int[Tensor, "R G"]) -> tuple[Tensor, Tensor]:
    """Values and nibbles that the library should make of a matrix."""
    positions = (entries & (1 << POSITION_BITS) - 1).to(torch.uint8)
    groups = form.places(matrix.shape[0], matrix.shape[1] // WORD).flatten()[:, None] * 4 + torch.arange(4, device=matrix.device)
    nibbles = torch.empty(entries.numel(), dtype=torch.int32, device=matrix.device)
    nibbles[groups.flatten()] = (entries.flatten() >> POSITION_BITS).int()
    return take_values(matrix, positions).view(-1, 2), nibbles
