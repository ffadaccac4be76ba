"""A library is tried before it is believed: small products of whole numbers on the device, compared bit by bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from bisparse.kernels.sparse24.metadata import empty_slots, lay_out

if TYPE_CHECKING:
    from bisparse.accelerate.backends.base import Backend

__all__ = ["halves_share_metadata", "try_out", "try_shape"]


def try_out(backend: Backend, device: torch.device) -> str | None:
    """Why a small product fails on this device, or gives wrong numbers; None where it is right."""
    return _tried(_small_product, backend, device)


def try_shape(backend: Backend, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the library refuses matrices of this shape, in packing or in multiplying; None where it takes them."""
    return _tried(_shaped_product, backend, rows, columns, dtype, device)


def halves_share_metadata(backend: Backend, device: torch.device) -> bool:
    """Whether metadata of bfloat16's form serve values in float16 as well."""
    return _tried(_other_half, backend, device) is None


def _tried(trial: Callable[..., str | None], *arguments: Any) -> str | None:
    """The outcome of a trial, which is made once; but one that memory was short for counts for nothing later."""
    try:
        return trial(*arguments)
    except torch.OutOfMemoryError as error:
        return f"out of memory while {arguments[0].name} was tried: {str(error).splitlines()[0]}"


@functools.cache
def _small_product(backend: Backend, device: torch.device) -> str | None:
    matrix, dense, expected = _operands(device, torch.bfloat16)
    try:
        product = backend.multiply(*backend.pack(matrix), dense, matrix.shape[0])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"{backend.name} does not run on {torch.cuda.get_device_name(device)}: {str(error).splitlines()[0]}"
    if torch.equal(product, expected):
        return None
    return f"{backend.name} gives wrong products on {torch.cuda.get_device_name(device)}"


@functools.cache
def _shaped_product(backend: Backend, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
    zeros = torch.zeros(rows, columns, dtype=dtype, device=device)
    try:
        product = backend.multiply(*backend.pack(zeros), zeros[: backend.row_multiple].t(), rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"{backend.name} refuses matrices of {rows} x {columns}: {str(error).splitlines()[0]}"
    return None if product.shape == (rows, backend.row_multiple) else f"{backend.name} gives products of {tuple(product.shape)}"


@functools.cache
def _other_half(backend: Backend, device: torch.device) -> str | None:
    matrix, dense, expected = _operands(device, torch.float16)
    rows, columns = matrix.shape
    mask, form = matrix != 0, backend.form(rows, columns, torch.bfloat16, device)
    if form is None:
        return f"{backend.name} tells nothing of its order"
    positions, metadata = empty_slots(rows, columns, device)
    lay_out(mask, form, positions, metadata)
    try:
        product = backend.multiply(*backend.fill(matrix, positions, metadata, torch.float16), dense, rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error)
    return None if torch.equal(product, expected) else f"{backend.name} keeps float16 in another order"


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
