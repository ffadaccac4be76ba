"""Short digests of tensors and other values, to tell whether two jobs have the same data and weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "saved_tensors", "stable_repr"]

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by element size in bytes."""


def fingerprint(*values: Any) -> str:
    """A digest of all bits of tensors and arrays, also in containers and objects; of functions, the code; else the `repr`.

    A tensor is digested by the sums of its bits, as integers, along its first and its other axes: one pass over the tensor, on
    its own device. Different tensors have different digests unless they were made to collide.
    """
    digest = hashlib.sha256()
    for value in values:
        for part in _parts(value, ()):
            digest.update(part)
    return digest.hexdigest()[:32]


def _parts(value: Any, inside: tuple[int, ...]) -> Iterator[bytes]:
    """What a value's digest is made of. The `repr` of containers and arrays leaves out most of a large tensor."""
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)}{value.dtype}".encode()
        for sums in _sums(value.detach()):
            yield sums.cpu().numpy().tobytes()
    elif hasattr(type(value), "__array_interface__") and (array := np.asarray(value)).dtype != object:  # pictures too
        yield f"{array.shape}{array.dtype}".encode() + array.tobytes()
    elif id(value) in inside:
        yield b"itself"
    elif isinstance(value, Mapping | list | tuple):
        yield f"{type(value).__name__}{len(value)}".encode()
        for one in value.items() if isinstance(value, Mapping) else value:
            yield from _parts(one, (*inside, id(value)))
    elif isinstance(value, FunctionType):
        yield f"{value.__qualname__}{_code(value.__code__)}".encode()
    elif isinstance(own := getattr(value, "__dict__", None), dict) and own and not callable(value):
        yield type(value).__name__.encode()
        yield from _parts(own, (*inside, id(value)))
    else:
        yield stable_repr(value).encode()


def _code(code: CodeType) -> str:
    constants = [_code(one) if isinstance(one, CodeType) else stable_repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()}{code.co_names}{constants}"


def saved_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model that its state_dict has; others, such as caches, may change as it runs."""
    own = {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}
    return [*model.parameters(), *(buffer for buffer in model.buffers() if id(buffer) not in own)]


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
