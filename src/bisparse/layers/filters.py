"""Filters that select layers by name, and checks of whether a pattern fits the sides of their matrices."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from bisparse.pattern import Pattern, Structure, parse_pattern
from bisparse.tiles import DIMENSIONS, Layout, LayoutKind, check_layout

__all__ = [
    "Filter",
    "NameFilter",
    "first_match",
    "matches",
    "matches_name",
    "matrix_sides",
    "parse_patterns",
    "remainder_reason",
    "sides",
]

Filter = str | Callable[[str, nn.Module], bool] | Iterable[str]
"""A layer name, a glob, ``"re:..."``, a list of these, or a function of (name, module)."""

NameFilter = str | Iterable[str]
"""A layer name, a glob, ``"re:..."``, or a list of these; for files, which have no modules."""

T = TypeVar("T")

_NO_MODULE = nn.Identity()


def matches(chosen: Filter, name: str, module: nn.Module) -> bool:
    """Whether a filter matches a layer: exact name, glob, ``re:`` pattern (matched from the start), or function."""
    if isinstance(chosen, str):
        if chosen.startswith("re:"):
            try:
                return re.match(chosen[3:], name) is not None
            except re.error as error:
                raise ValueError(f"{chosen!r} is not a regular expression: {error}") from error
        return name == chosen or fnmatch.fnmatchcase(name, chosen)
    if callable(chosen):
        return bool(chosen(name, module))
    return any(matches(one, name, module) for one in _several(chosen))


def _several(chosen: Iterable[Any]) -> Iterable[Any]:
    """The filters of a list, checked; an iterator would be used up after the first layer."""
    if isinstance(chosen, Tensor | Iterator) or not isinstance(chosen, Iterable):
        raise TypeError(
            f"{chosen!r:.60} selects no layers: expected a name, a glob, 're:...', a list of these, or a function (name, module)"
        )
    return chosen


def parse_patterns(patterns: Mapping[str, str | Structure] | None) -> dict[str, Structure]:
    """Parse the patterns of single layers, by name or glob.

    Raises:
        ValueError: not a mapping of texts, or a text that is not a pattern.
    """
    if patterns is not None and not (isinstance(patterns, Mapping) and all(isinstance(one, str) for one in patterns)):
        raise ValueError(f"patterns={patterns!r:.60}: expected a mapping from layer names or globs to patterns")
    return {name: parse_pattern(one) for name, one in (patterns or {}).items()}


def matches_name(chosen: NameFilter, layer: str, parameter: str) -> bool:
    """Whether a filter matches a layer, by the layer's name or its parameter's."""
    filters = (chosen,) if isinstance(chosen, str) else tuple(_several(chosen))
    return matches(filters, layer, _NO_MODULE) or matches(filters, parameter, _NO_MODULE)


def first_match(choices: Mapping[str, T] | None, layer: str, parameter: str) -> tuple[str | None, T | None]:
    """The first filter of a mapping that matches a layer, and its value; (None, None) if there is none."""
    if choices is not None and not isinstance(choices, Mapping):
        raise TypeError(f"{choices!r:.60}: expected a mapping from layer names or globs")
    for one, value in (choices or {}).items():
        if matches_name(one, layer, parameter):
            return one, value
    return None, None


def matrix_sides(weight: Tensor, layout: Layout) -> tuple[int, int]:
    """Sides (O, I) of the GEMM matrices of a weight."""
    return sides(tuple(weight.shape), layout)


def sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """Sides (O, I) of the GEMM matrices of a weight of this shape."""
    check_layout(layout)
    if len(shape) not in DIMENSIONS[layout.kind]:
        raise ValueError(f"a weight of shape {tuple(shape)} cannot have the layout '{layout.kind}'")
    match layout.kind:
        case LayoutKind.TRANSPOSED:
            return shape[1], shape[0]
        case LayoutKind.EXPERTS:
            return shape[1], shape[2]
        case LayoutKind.EXPERTS_TRANSPOSED:
            return shape[2], shape[1]
        case LayoutKind.CONV:
            return shape[0] // layout.groups, shape[1]
        case LayoutKind.CONV_LAST:
            return shape[0] // layout.groups, shape[-1]
        case LayoutKind.CONV_TRANSPOSED:
            return shape[1], shape[0] // layout.groups
        case _:
            return shape[0] // layout.parts, shape[1]


def remainder_reason(matrix: tuple[int, int], pattern: Structure, remainder: str, name: str) -> str | None:
    """Why a layer whose GEMM matrix has these sides (O, I) stays dense for a pattern; None if it is pruned.

    Raises:
        ValueError: ``remainder="error"`` and M does not divide the sides.
    """
    m = getattr(pattern, "m", None)
    if m is None or remainder == "pad":
        return None
    rows, columns = matrix
    transposable = isinstance(pattern, Pattern) and pattern.transposable
    if columns % m == 0 and (not transposable or rows % m == 0):
        return None
    problem = f"{m} does not divide the sides of its {rows} x {columns} matrix"
    if remainder == "error":
        raise ValueError(f"{name}: {problem}; pass remainder='pad' or 'dense', or exclude the layer")
    return problem
