"""2:4 matrices in half the space: positions of the kept weights, and their values.

A group of four consecutive entries of a row has two slots. `positions` holds one byte per group: bits 0-1 are the entry in the
first slot, bits 2-3 the entry in the second, which is to its right, bits 4 and 5 whether each slot is in use. A free slot points
where CUTLASS's packer points, so that one set of values serves every metadata layout. Positions come from the mask, not from the
weights' zeros: a kept weight may be zero now and non-zero after the next step.

If 4 does not divide the columns, the last group is padded with pruned entries.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

__all__ = ["find_positions", "kept_mask", "put_values", "read_positions", "take_values", "to_metadata"]

FIRST_USED, SECOND_USED = 1 << 4, 1 << 5

_LIBRARY = torch.library.Library("bisparse", "FRAGMENT")
_LIBRARY.define("find_positions(Tensor mask) -> (Tensor positions, Tensor invalid)")
_LIBRARY.define("take_values(Tensor weight, Tensor positions, ScalarType dtype, Tensor? tail=None) -> Tensor")


def find_positions(mask: Bool[Tensor, "R C"]) -> UInt8[Tensor, "R G"]:
    """The positions of the kept entries of every group, at most two each.

    Raises:
        ValueError: a group keeps more than two.

    >>> [bin(p) for p in find_positions(torch.tensor([[True, False, True, False, False, False, True, False]]))[0].tolist()]
    ['0b111000', '0b11110']
    """
    positions, invalid = torch.ops.bisparse.find_positions(mask)
    if bool(invalid):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} keeps more than 2 of 4 in some group: it is not 2:4 along its rows"
        )
    found: Tensor = positions
    return found


def reference_find_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `find_positions`: the positions, and whether a group keeps more than two."""
    groups = _groups(mask)
    m0, m1, m2, m3 = groups.unbind(-1)
    empty = ~m0 & ~m1
    first = torch.where(m0, 0, torch.where(m1, 1, 2))
    second = torch.where(m0 & m1, 1, torch.where(empty, 3, 2 + m3.to(torch.int64)))
    first_used = m0 | m1 | m2
    second_used = torch.where(m0 & m1, m1, torch.where(second == 2, m2, m3))
    code = first | second << 2 | first_used.to(torch.int64) << 4 | second_used.to(torch.int64) << 5
    return code.to(torch.uint8), (groups.sum(-1) > 2).any()


def take_values(
    weight: Shaped[Tensor, "R C"],
    positions: UInt8[Tensor, "R G"],
    dtype: torch.dtype | None = None,
    tail: Shaped[Tensor, " B"] | None = None,
) -> Shaped[Tensor, "..."]:
    """The values of the kept entries, two per group, zero in a slot that is not in use; (R, C / 2), contiguous, in `dtype`.

    The weight may be a transposed view: on a GPU one kernel reads any strides.

    Args:
        tail: numbers of that dtype to store after the values in the same memory. Then the result is flat.
    """
    values: Tensor = torch.ops.bisparse.take_values(weight, positions, dtype or weight.dtype, tail)
    return values


def reference_take_values(weight: Tensor, positions: Tensor, dtype: torch.dtype, tail: Tensor | None = None) -> Tensor:
    """The specification of `take_values`."""
    values: Tensor = _groups(weight).gather(-1, _slots(positions))
    values = values.masked_fill_(~_used(positions), 0).flatten(-2).to(dtype)
    if tail is None:
        return values
    flat = values.new_empty(values.numel() + tail.numel())  # not `cat`, which autocast would affect
    flat[: values.numel()], flat[values.numel() :] = values.flatten(), tail
    return flat


def put_values(values: Shaped[Tensor, "R C2"], positions: UInt8[Tensor, "R G"], columns: int) -> Shaped[Tensor, "R C"]:
    """The inverse of `take_values`: the dense matrix, with zeros."""
    groups = values.new_zeros((*positions.shape, 4))
    return groups.scatter_(-1, _slots(positions), values.unflatten(-1, (-1, 2))).flatten(-2)[:, :columns].contiguous()


def kept_mask(positions: UInt8[Tensor, "R G"], columns: int) -> Bool[Tensor, "R C"]:
    """The mask that the positions were found from."""
    # Without an index: this may run in every pass, and an index takes eight bytes per value.
    code, place = positions.unsqueeze(-1), torch.arange(4, dtype=torch.uint8, device=positions.device)
    first = (code & 3 == place) & (code & FIRST_USED != 0)
    second = (code >> 2 & 3 == place) & (code & SECOND_USED != 0)
    return (first | second).flatten(-2)[:, :columns].contiguous()


def read_positions(places: Shaped[Tensor, "R G 2"], used: Bool[Tensor, "R G 2"]) -> UInt8[Tensor, "R G"]:
    """Positions from the place in its group of each slot's entry, in any order; a place outside 0 to 3 marks a slot not in use.

    >>> [bin(p) for p in read_positions(torch.tensor([[[2, 0], [7, 3]]]), torch.tensor([[[True, True], [False, True]]]))[0]]
    ['0b110010', '0b101100']
    """
    used = used & (places >= 0) & (places < 4)
    first, second = torch.where(used, places, 0).to(torch.uint8).unbind(-1)
    first_used, second_used = used.unbind(-1)
    # A free slot points next to the other one, which it must not hide.
    first = torch.where(first_used, first, torch.where(second_used, second + 1 & 3, 0))
    second = torch.where(second_used, second, first + 1 & 3)
    return first | second << 2 | first_used.to(torch.uint8) << 4 | second_used.to(torch.uint8) << 5


def to_metadata(positions: UInt8[Tensor, "R G"]) -> UInt8[Tensor, "R B"]:
    """Positions in two bits per slot, two groups per byte, as the reference backend stores them; see `from_metadata`."""
    padded = torch.nn.functional.pad(positions & 15, (0, positions.shape[1] % 2))
    return padded[:, ::2] | padded[:, 1::2] << 4


def from_metadata(metadata: UInt8[Tensor, "R B"], groups: int) -> UInt8[Tensor, "R G"]:
    """Positions from `to_metadata`, with every slot in use: free slots hold zeros."""
    codes = torch.stack((metadata & 15, metadata >> 4), -1).flatten(-2)[:, :groups]
    return codes | FIRST_USED | SECOND_USED


def _groups(matrix: Shaped[Tensor, "R C"]) -> Shaped[Tensor, "R G 4"]:
    missing = -matrix.shape[-1] % 4
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.unflatten(-1, (-1, 4))


def _slots(positions: UInt8[Tensor, "R G"]) -> Shaped[Tensor, "R G 2"]:
    return torch.stack((positions & 3, positions >> 2 & 3), -1).long()


def _used(positions: UInt8[Tensor, "R G"]) -> Bool[Tensor, "R G 2"]:
    return torch.stack((positions & FIRST_USED, positions & SECOND_USED), -1) != 0


@torch.library.register_fake("bisparse::find_positions")
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    groups = -(-mask.shape[1] // 4)
    return mask.new_empty((mask.shape[0], groups), dtype=torch.uint8), mask.new_empty((), dtype=torch.bool)


@torch.library.register_fake("bisparse::take_values")
def _(weight: Tensor, positions: Tensor, dtype: torch.dtype, tail: Tensor | None = None) -> Tensor:
    rows, columns = positions.shape[0], 2 * positions.shape[1]
    return weight.new_empty((rows, columns) if tail is None else rows * columns + tail.shape[0], dtype=dtype)


_LIBRARY.impl("find_positions", reference_find_positions, "CompositeExplicitAutograd")
_LIBRARY.impl("take_values", reference_take_values, "CompositeExplicitAutograd")


def _take_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, positions, _, tail = (*inputs, None)[:4]
    ctx.save_for_backward(positions)
    ctx.dtype, ctx.columns, ctx.has_tail = weight.dtype, weight.shape[1], tail is not None


def _take_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    count = 2 * positions.numel()
    values = gradient.flatten()[:count].view(positions.shape[0], -1)
    used = _used(positions).flatten(-2)
    to_weight = put_values(torch.where(used, values, 0), positions, ctx.columns).to(ctx.dtype)
    return to_weight, None, None, gradient[count:] if ctx.has_tail else None


torch.library.register_autograd("bisparse::take_values", _take_backward, setup_context=_take_context)
