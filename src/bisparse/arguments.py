"""Checks of arguments that many functions take, before anything is done with them."""

from __future__ import annotations

import difflib
import json
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_count",
    "check_dense",
    "check_flag",
    "check_function",
    "check_json",
    "check_number",
    "entry_of",
    "is_number",
    "listed",
]

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


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a setting that is not one of the choices."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r:.60}: expected one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse a setting that is not a whole number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r:.60}: expected a whole number >= {least}")


MAX_INT = 1 << 63
"""Integers as large do not fit torch's own; a float of the same size does."""


def check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None, unit: str = "") -> None:
    """Refuse a setting that is not a finite number above `above` and >= `least`."""
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise ValueError(f"{name}={_digits(value)}: an integer of more than 63 bits; expected a number that torch can hold")
    numeric = (
        isinstance(value, int | float) and not isinstance(value, bool) and -sys.float_info.max <= value <= sys.float_info.max
    )
    if not numeric or (above is not None and value <= above) or (least is not None and value < least):
        bound = "" if above is None and least is None else f" > {above:g}" if above is not None else f" >= {least:g}"
        raise ValueError(f"{name}={value!r:.60}: expected a finite number{bound}{unit and f', {unit}'}")


def _digits(number: int) -> str:
    """An integer as text, in hexadecimal where it is too long for Python to write in decimal."""
    return f"{number:#x}"[:40]


def check_function(name: str, value: object) -> None:
    """Raise TypeError for an optional function that is something else; a tensor would count as true or false."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, not {type(value).__name__}")


def check_json(name: str, value: object) -> None:
    """Raise ValueError unless JSON can hold an argument, which is written at the end of a job."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON values, such as texts and finite numbers: {error}") from error


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
