"""A library is tried before it is believed: small products of whole numbers on the device, compared bit by bit."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from bisparse.kernels.positions import find_positions

if TYPE_CHECKING:
    from bisparse.accelerate.backend import Backend

__all__ = ["halves_share_metadata", "try_out"]


@functools.cache
def try_out(backend: Backend, device: torch.device) -> str | None:
    """Why a small product fails on this device, or gives wrong numbers; None where it is right."""
    matrix, dense, expected = _operands(device, torch.bfloat16)
    try:
        product = backend.multiply(*backend.pack(matrix), dense, matrix.shape[0])
    except RuntimeError as error:
        return f"{backend.name} does not run on {torch.cuda.get_device_name(device)}: {str(error).splitlines()[0]}"
    if torch.equal(product, expected):
        return None
    return f"{backend.name} gives wrong products on {torch.cuda.get_device_name(device)}"


@functools.cache
def halves_share_metadata(backend: Backend, device: torch.device) -> bool:
    """Whether what `layout` says of a mask in bfloat16 serves values in float16 as well."""
    matrix, dense, expected = _operands(device, torch.float16)
    mask = matrix != 0
    try:
        layout = backend.layout(mask, find_positions(mask), torch.bfloat16)
        product = backend.multiply(*backend.fill(matrix, *layout, torch.float16), dense, matrix.shape[0])
    except RuntimeError:
        return False
    return torch.equal(product, expected)


def _operands(
    device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "64 128"], Float[Tensor, "128 16"], Float[Tensor, "64 16"]]:
    """A 2:4 matrix with none, one or two kept in a group, a dense one, and their product."""
    numbers = torch.Generator(device="cpu").manual_seed(0)
    rank = torch.rand(64, 32, 4, generator=numbers).argsort(-1)
    kept = rank < torch.randint(0, 3, (64, 32, 1), generator=numbers)
    matrix = torch.randint(1, 8, (64, 128), generator=numbers) * kept.flatten(-2)
    dense = torch.randint(-8, 8, (128, 16), generator=numbers)
    return tuple(one.to(device, dtype) for one in (matrix, dense, (matrix @ dense).float()))  # type: ignore[return-value]
