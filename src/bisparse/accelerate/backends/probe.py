"""Base of the tensor-core backends, which are probed before use: small products of integers, compared bit by bit."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bisparse.accelerate.backends.base import HALF, Backend
from bisparse.kernels.sparse24.metadata import empty_slots, lay_out

__all__ = ["TensorCoreBackend", "halves_share_metadata", "numbered", "pad_tokens", "probe_device", "probe_shape"]

TOKEN_MULTIPLE = 8
"""Both libraries need a multiple of this number of tokens; activations are padded with zeros."""


class TensorCoreBackend(Backend):
    """A backend that needs a GPU with sparse tensor cores; usable if a probe of its library succeeds."""

    dtypes = HALF

    def device_reason(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{self.name} needs a CUDA device, and the weights are on {device.type}"
        if not torch.cuda.is_available():
            return f"{self.name} needs a CUDA device, and torch sees none here"
        if torch.version.hip:  # ROCm has some of the operators, by hipSPARSELt; the probe finds out which
            return probe_device(self, numbered(device))
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{self.name} needs sparse tensor cores (compute capability 8.0, Ampere), and this device has {major}.{minor}"
        return self.library_reason(major, minor) or probe_device(self, numbered(device))

    def probed_reason(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        return probe_shape(self, rows, columns, dtype, numbered(device))

    @abstractmethod
    def library_reason(self, major: int, minor: int) -> str | None:
        """Why this build of the library does not support devices of a compute capability; None if it does."""


def probe_device(backend: Backend, device: torch.device) -> str | None:
    """Why a small product fails or is wrong on this device; None if it is right."""
    return _probed(_small_product, backend, device)


def probe_shape(backend: Backend, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the library refuses to pack or multiply matrices of this shape; None if it does not."""
    return _probed(_shaped_product, backend, rows, columns, dtype, device)


def halves_share_metadata(backend: Backend, device: torch.device) -> bool:
    """Whether metadata in bfloat16's layout also works for values in float16."""
    return _probed(_other_half, backend, device) is None


def numbered(device: torch.device) -> torch.device:
    """The device with its index, so that "cuda" and "cuda:0" share a cache entry."""
    return torch.device(device.type, device.index or 0)


def pad_tokens(dense: Float[Tensor, "C N"]) -> Float[Tensor, "C N8"]:
    """The matrix, padded with zero columns to the libraries' multiple; row-major or column-major as before."""
    missing = -dense.shape[1] % TOKEN_MULTIPLE
    if missing:
        dense = torch.nn.functional.pad(dense.t(), (0, 0, 0, missing)).t()
    return dense if dense.is_contiguous() or dense.t().is_contiguous() else dense.contiguous()


def _probed(probe: Callable[..., str | None], *arguments: Any) -> str | None:
    """The cached result of a probe; one that ran out of memory runs again at the next call."""
    try:
        return probe(*arguments)
    except torch.OutOfMemoryError as error:
        return f"out of memory while probing {arguments[0].name}: {str(error).splitlines()[0]}"


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
    layout = backend.metadata_layout(rows, columns, torch.bfloat16, device)
    if layout is None:
        return f"the metadata layout of {backend.name} is unknown"
    positions, metadata = empty_slots(rows, columns, device)
    lay_out(matrix != 0, layout, positions, metadata)
    try:
        product = backend.multiply(*backend.fill(matrix, positions, metadata, torch.float16), dense, rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error)
    return None if torch.equal(product, expected) else f"{backend.name} lays out float16 differently"


def _operands(
    device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "64 128"], Float[Tensor, "128 16"], Float[Tensor, "64 16"]]:
    """A 2:4 matrix with zero, one or two kept entries per group, a dense matrix, and their product."""
    numbers = torch.Generator(device="cpu").manual_seed(0)
    rank = torch.rand(64, 32, 4, generator=numbers, dtype=torch.float32, device="cpu").argsort(-1)
    kept = rank < torch.randint(0, 3, (64, 32, 1), generator=numbers, device="cpu")
    matrix = torch.randint(1, 8, (64, 128), generator=numbers, device="cpu") * kept.flatten(-2)
    dense = torch.randint(-8, 8, (128, 16), generator=numbers, device="cpu")
    return tuple(one.to(device, dtype) for one in (matrix, dense, (matrix @ dense).float()))  # type: ignore[return-value]
