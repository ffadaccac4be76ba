"""The libraries that multiply by a 2:4 matrix: cuSPARSELt, CUTLASS, and a reference that runs anywhere.

Each one keeps a packed matrix in two tensors: `packed`, of the weight's dtype, and `metadata`. The operators of torch that are
used are prototypes there; this file and `algorithm` alone call them. None of them checks that what it packs is 2:4: callers must.

Source of shapes and dtypes: `torch.sparse.SparseSemiStructuredTensorCUTLASS` and `...CUSPARSELT`, torch 2.11 to 2.13.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from bisparse.accelerate.backends.algorithm import Algorithm, search_algorithm
from bisparse.accelerate.backends.metadata_layout import learn_form
from bisparse.accelerate.backends.probe import halves_share_metadata, try_out, try_shape
from bisparse.kernels.sparse24.metadata import WORD, MetadataForm, form_of_order
from bisparse.kernels.sparse24.pack import cutlass_form, split_packed
from bisparse.kernels.sparse24.positions import from_metadata, kept_mask, put_values, take_values, to_metadata

__all__ = ["BACKENDS", "Backend", "BackendError", "backend_or_reference", "choose_backend", "usable_backends"]

HALF = (torch.float16, torch.bfloat16)
DENSE_MULTIPLE = 8
"""Both libraries take activations whose number of tokens is a multiple of this; others are completed with zeros."""


class BackendError(ValueError):
    """A backend that was asked for cannot run here, or cannot take this layer."""


class Backend(ABC):
    """A way to store a 2:4 matrix and to multiply by it."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    row_multiple: int = 1
    column_multiple: int = 1
    learns_forms: bool = False
    """`form` takes the time of some fifteen products when it is first asked for a shape."""

    def shape_reason(self, rows: int, columns: int) -> str | None:
        """Why a (rows, columns) matrix cannot be packed; None where it can."""
        if rows % self.row_multiple == 0 and columns % self.column_multiple == 0:
            return None
        return (
            f"{self.name} packs matrices whose rows are a multiple of {self.row_multiple} and columns of {self.column_multiple}, "
            f"not {rows} x {columns}"
        )

    def refusal(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the library itself refuses a shape that its documentation allows, once tried; None where it takes it."""
        del rows, columns, dtype, device
        return None

    def dtype_reason(self, dtype: torch.dtype) -> str | None:
        """Why numbers of this dtype cannot be packed; None where they can."""
        if dtype in self.dtypes:
            return None
        taken = ", ".join(str(one).removeprefix("torch.") for one in self.dtypes)
        return f"{self.name} takes {taken}, not {str(dtype).removeprefix('torch.')}"

    @abstractmethod
    def device_reason(self, device: torch.device) -> str | None:
        """Why it cannot run on this device; None where it can."""

    @abstractmethod
    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) of a matrix that is 2:4 along its rows."""

    @abstractmethod
    def unpack(
        self, packed: Shaped[Tensor, "..."], metadata: Shaped[Tensor, "..."], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        """The matrix that was packed, dense, with zeros."""

    @abstractmethod
    def form(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataForm | None:
        """How it stores the metadata of (rows, columns) matrices; None where that is not known: then it must pack them itself."""

    def served(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
        """The dtypes of values for which metadata of this one's form can be used; by default all it takes."""
        del dtype, device
        return self.dtypes

    @abstractmethod
    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: Shaped[Tensor, "..."],
        dtype: torch.dtype,
    ) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) of a weight as it is now, masked, in another dtype.

        Args:
            metadata: of the backend's `form`, bytes; none where it has no form.
        """

    def split(self, flat: Shaped[Tensor, " P"], rows: int, columns: int) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """(packed, metadata) from the values of a matrix and, behind them, its metadata."""
        values, metadata = split_packed(flat, rows, columns)
        return values, metadata.view(torch.uint8)

    @abstractmethod
    def multiply(
        self,
        packed: Shaped[Tensor, "..."],
        metadata: Shaped[Tensor, "..."],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        """``S @ dense + bias``, (R, N), or its transpose, (N, R); contiguous. With `search`, by the fastest algorithm here."""


class Reference(Backend):
    """Really packed, decompressed for every product: the same numbers on any device, and no faster than dense."""

    name = "reference"
    dtypes = (torch.float64, torch.float32, *HALF)

    def device_reason(self, device: torch.device) -> str | None:
        return None

    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Float[Tensor, "R C2"], UInt8[Tensor, "R B"]]:
        positions, _ = torch.ops.bisparse.find_positions(matrix != 0)  # of a group that keeps more, two, as the libraries do
        return take_values(matrix, positions), to_metadata(positions)

    def unpack(
        self, packed: Float[Tensor, "R C2"], metadata: UInt8[Tensor, "R B"], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        return put_values(packed, from_metadata(metadata, packed.shape[1] // 2), columns)

    def form(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataForm | None:
        return _plain_form(columns, device) if columns % WORD == 0 else None

    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: Shaped[Tensor, "..."],
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "R C2"], Shaped[Tensor, "..."]]:
        # Not those given: an average that runs here may get the buffers of a model that runs by a library, in its form.
        return take_values(weight, positions, dtype), to_metadata(positions)

    def multiply(
        self,
        packed: Float[Tensor, "R C2"],
        metadata: UInt8[Tensor, "R B"],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        matrix = self.unpack(packed, metadata, rows, dense.shape[0])
        with torch.autocast(dense.device.type, enabled=False):  # as the libraries, which autocast does not know
            product = torch.nn.functional.linear(dense.t(), matrix, bias)
        return product if transposed else product.t().contiguous()


class _OnTensorCores(Backend):
    dtypes = HALF

    def device_reason(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{self.name} needs a CUDA device, and the weights are on {device.type}"
        if not torch.cuda.is_available():
            return f"{self.name} needs a CUDA device, and torch sees none here"
        if torch.version.hip:
            return f"{self.name} runs on NVIDIA devices, and this torch is built for ROCm"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{self.name} needs sparse tensor cores (compute capability 8.0, Ampere), and this device has {major}.{minor}"
        return self._library_reason(major, minor) or try_out(self, torch.device(device.type, device.index or 0))

    def refusal(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
        return try_shape(self, rows, columns, dtype, torch.device(device.type, device.index or 0))

    @abstractmethod
    def _library_reason(self, major: int, minor: int) -> str | None: ...


class Cutlass(_OnTensorCores):
    """torch's CUTLASS kernels: values and metadata apart, so that new values need no packing."""

    name = "cutlass"
    row_multiple, column_multiple = 32, 64

    def _library_reason(self, major: int, minor: int) -> str | None:
        if major != 8:
            return f"torch's CUTLASS kernels for 2:4 run on compute capability 8.x, and this device has {major}.{minor}"
        return None

    # The kernels want int16, which DDP cannot broadcast by gloo or NCCL: buffers are bytes, and seen as int16.

    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Float[Tensor, "R C2"], UInt8[Tensor, "R B"]]:
        values, metadata = sparse_semi_structured_from_dense_cutlass(matrix.contiguous())
        return values, metadata.view(torch.uint8)

    def unpack(
        self, packed: Float[Tensor, "R C2"], metadata: UInt8[Tensor, "R B"], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        matrix: Tensor = sparse_semi_structured_to_dense_cutlass(packed, metadata.view(torch.int16))
        return matrix

    def form(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataForm | None:
        return cutlass_form(rows, device)

    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: UInt8[Tensor, "R B"],
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "R C2"], UInt8[Tensor, "R B"]]:
        return take_values(weight, positions, dtype), metadata

    def multiply(
        self,
        packed: Float[Tensor, "R C2"],
        metadata: UInt8[Tensor, "R B"],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        padded = _padded(dense)
        if bias is None:
            product = torch._sparse_semi_structured_mm(packed, metadata.view(torch.int16), padded)
        else:
            product = torch._sparse_semi_structured_addmm(bias, packed, metadata.view(torch.int16), padded)
        product = product[:, : dense.shape[1]]
        return product.t().contiguous() if transposed else product.contiguous()


class CuSparseLt(_OnTensorCores):
    """NVIDIA's cuSPARSELt: values and metadata in one tensor, whose form is the library's own business."""

    name = "cusparselt"
    row_multiple, column_multiple = 16, 16
    learns_forms = True

    def _library_reason(self, major: int, minor: int) -> str | None:
        return None if torch.backends.cusparselt.is_available() else "this torch is built without cuSPARSELt"

    def pack(self, matrix: Float[Tensor, "R C"]) -> tuple[Shaped[Tensor, "R P"], Shaped[Tensor, "0"]]:
        # Adding zero turns -0.0 into 0.0: whether the library takes -0.0 for a zero is not documented.
        packed = self._compress(matrix.contiguous() + 0.0)
        return packed.view(matrix.shape[0], -1), matrix.new_empty(0)

    def unpack(
        self, packed: Shaped[Tensor, "R P"], metadata: Shaped[Tensor, "..."], rows: int, columns: int
    ) -> Float[Tensor, "R C"]:
        # Exact for finite numbers: every sum has one term that is not zero.
        return self.multiply(packed, metadata, torch.eye(columns, dtype=packed.dtype, device=packed.device), rows)

    def form(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> MetadataForm | None:
        return learn_form(self._compress, rows, columns, dtype, torch.device(device.type, device.index or 0))

    @staticmethod
    def _compress(matrix: Float[Tensor, "R C"]) -> Shaped[Tensor, "..."]:
        packed: Tensor = torch._cslt_compress(matrix)
        return packed

    def served(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
        return HALF if halves_share_metadata(self, torch.device(device.type, device.index or 0)) else (dtype,)

    def fill(
        self,
        weight: Float[Tensor, "R C"],
        positions: UInt8[Tensor, "R G"],
        metadata: Shaped[Tensor, "..."],
        dtype: torch.dtype,
    ) -> tuple[Shaped[Tensor, "R P"], Shaped[Tensor, "0"]]:
        if metadata.numel() == 0:
            return self.pack(torch.where(kept_mask(positions, weight.shape[1]), weight, 0).to(dtype))
        packed = take_values(weight, positions, dtype, metadata.view(-1).view(dtype)).view(weight.shape[0], -1)
        return packed, packed.new_empty(0)

    def split(self, flat: Shaped[Tensor, " P"], rows: int, columns: int) -> tuple[Shaped[Tensor, "R P"], Shaped[Tensor, "0"]]:
        return flat.view(rows, -1), flat.new_empty(0)

    def multiply(
        self,
        packed: Shaped[Tensor, "R P"],
        metadata: Shaped[Tensor, "..."],
        dense: Float[Tensor, "C N"],
        rows: int,
        bias: Float[Tensor, " R"] | None = None,
        *,
        transposed: bool = False,
        search: bool = False,
    ) -> Float[Tensor, "..."]:
        padded = _padded(dense)
        algorithm = Algorithm()
        if search:
            by_rows = padded.is_contiguous()
            shape = (rows, *padded.shape)
            algorithm = search_algorithm(shape, by_rows, bias is not None, transposed, packed.dtype, packed.device)
        product = torch._cslt_sparse_mm(packed, padded, bias=bias, transpose_result=transposed, **algorithm._asdict())
        tokens = dense.shape[1]
        return (product[:tokens] if transposed else product[:, :tokens]).contiguous()


BACKENDS: dict[str, Backend] = {one.name: one for one in (CuSparseLt(), Cutlass(), Reference())}
"""All there are; `choose_backend` takes the first that runs, and never the reference."""


def usable_backends(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Every backend, and why it cannot run on this device with this dtype; None where it can.

    >>> usable_backends(torch.device("cpu"))["cusparselt"]
    'cusparselt needs a CUDA device, and the weights are on cpu'
    """
    return {
        name: (None if dtype is None else backend.dtype_reason(dtype)) or backend.device_reason(device)
        for name, backend in BACKENDS.items()
    }


def choose_backend(name: str, device: torch.device) -> Backend | str:
    """The backend of a name, or for "auto" the fastest known to run on a device; the reason where none does.

    cuSPARSELt stands before CUTLASS: it has kernels for every generation, and can search for the best. The advisor measures both.

    Raises:
        BackendError: the name is none, or this backend does not run on this device.
    """
    if name == "auto":
        reasons = {one: BACKENDS[one].device_reason(device) for one in ("cusparselt", "cutlass")}
        for one, reason in reasons.items():
            if reason is None:
                return BACKENDS[one]
        return "; ".join(str(reason) for reason in reasons.values())
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r}: expected 'auto', {', '.join(map(repr, BACKENDS))}")
    if (reason := BACKENDS[name].device_reason(device)) is not None:
        raise BackendError(
            f"backend={name!r}: {reason}. Pass backend='auto' to stay masked-dense there, or 'reference' for the same numbers"
        )
    return BACKENDS[name]


@functools.lru_cache(maxsize=256)
def _plain_form(columns: int, device: torch.device) -> MetadataForm:
    """Of `to_metadata`: row by row."""
    return form_of_order(torch.arange(4)[None], columns // WORD, 1, device)


def backend_or_reference(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that was wanted where it runs, else the reference, as for a copy on the CPU: it comes back with the GPU."""
    own = BACKENDS[wanted]
    return wanted if own.device_reason(device) is None and own.dtype_reason(dtype) is None else "reference"


def _padded(dense: Float[Tensor, "C N"]) -> Float[Tensor, "C N8"]:
    """Columns completed to what the libraries take; rows or columns contiguous."""
    missing = -dense.shape[1] % DENSE_MULTIPLE
    if missing:
        dense = torch.nn.functional.pad(dense.t(), (0, 0, 0, missing)).t()
    return dense if dense.is_contiguous() or dense.t().is_contiguous() else dense.contiguous()
