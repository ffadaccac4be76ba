"""Checks of arguments that many functions take, before anything is done with them."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["check_dense", "check_flag", "check_function", "entry_of", "is_number", "listed"]

T = TypeVar("T")


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


def check_flag(name: str, value: object) -> None:
    """Raise ValueError for a setting that is neither True nor False, such as "no", which counts as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.60}: expected True or False")


def listed(batches: Iterable[T]) -> list[T]:
    """Calibration batches as a list; a tensor is one batch per entry of its first dimension, as torch iterates over it.

    Raises:
        ValueError: a tensor that is not stored by strides.
    """
    if isinstance(batches, Tensor):
        check_dense("batches", batches)
    return list(batches)


def check_function(name: str, value: object) -> None:
    """Raise TypeError for an optional function that is something else; a tensor would count as true or false."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, not {type(value).__name__}")


def is_number(value: object) -> bool:
    """Whether a value is one real number, which can be compared: neither a bool nor a tensor."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def entry_of(key: str | int, entries: Sequence[T], names: Mapping[str, T]) -> T:
    """An entry of a report: by its number in the order of the report, as in a list, or by name.

    Raises:
        IndexError, KeyError: there is none.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        return entries[key]
    if isinstance(key, str) and key in names:
        return names[key]
    close = difflib.get_close_matches(str(key), names, n=3) or list(names)[:3]
    raise KeyError(f"{key!r} is no layer of the report; its {len(entries)} layers are named like {', '.join(close) or 'none'}")
