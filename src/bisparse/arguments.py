"""Checks of arguments that many functions take, before anything is done with them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_dense"]


def check_dense(name: str, tensor: object) -> None:
    """Raise unless an argument is a tensor with real numbers in memory: not sparse, complex, or on the meta device.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor without real numbers.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no numbers; load it first")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is stored as {tensor.layout}: pass its dense form, tensor.to_dense()")
    if tensor.is_complex():
        raise ValueError(f"{name} is complex ({tensor.dtype}); expected real numbers")
