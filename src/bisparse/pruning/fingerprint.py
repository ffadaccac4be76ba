"""Short digests of tensors and other values, to tell whether two jobs have the same data and weights."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["fingerprint", "stable_repr"]

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by element size in bytes."""


def fingerprint(*values: Any) -> str:
    """A digest of all bits of tensors, and of the `repr` of other values.

    A tensor is digested by the sums of its bits, as integers, along its first and its other axes: one pass over the tensor, on
    its own device. Different tensors have different digests unless they were made to collide.
    """
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            for sums in _sums(value.detach()):
                digest.update(sums.cpu().numpy().tobytes())
        else:
            digest.update(stable_repr(value).encode())
    return digest.hexdigest()[:32]


def stable_repr(value: Any) -> str:
    """The `repr` without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _sums(tensor: Tensor) -> list[Tensor]:
    if tensor.is_meta or tensor.numel() == 0:
        return []
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    rows = tensor.contiguous().view(-1).view(BITS[tensor.element_size()]).view(tensor.shape[0] if tensor.ndim else 1, -1)
    return [rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64)]
