"""Tables of layers on the terminal: one row for layers that differ only by a number, and a limit on rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.containers import Lines
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bisparse.errors import printable

__all__ = ["SHOWN", "grouped", "natural", "print_left_dense", "print_table", "table"]

SHOWN = 20
"""Rows of a table that are printed; --json lists all layers."""


class _Name(Text):
    """A layer's name, which breaks at its dots where a terminal is too narrow for it."""

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        lines = [""]
        for part in re.findall(r"[^.]*\.|[^.]+", self.plain):
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("")
            lines[-1] += part
        return Lines(folded for line in lines for folded in Text(line).wrap(console, width, **options))


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """A plain table; columns whose heading starts with a space are right-aligned numbers. The first column contains names."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title or None, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column.strip(), justify="right" if column.startswith(" ") else "left", overflow="fold")
    for row in rows:
        name, *cells = map(printable, row)
        made.add_row(_Name(name), *map(escape, cells))
    return made


def print_table(console: Console, columns: Iterable[str], rows: Sequence[Sequence[str]], noun: str = "rows") -> None:
    """Print the first `SHOWN` rows of a table, and how many there are beyond."""
    console.print(table(columns, rows[:SHOWN]))
    if len(rows) > SHOWN:
        console.print(f"... and {len(rows) - SHOWN:,} more {noun}; --json lists all layers.")


def grouped(items: Iterable[Any], name: Callable[[Any], str], alike: Callable[[Any], object]) -> list[tuple[str, list[Any]]]:
    """Layers grouped by name with the numbers replaced: ``encoder.layer.*.output.dense``."""
    groups: dict[object, list[Any]] = {}
    for item in items:
        groups.setdefault((re.sub(r"\d+", "*", name(item)), alike(item)), []).append(item)
    return [(name(group[0]) if len(group) == 1 else re.sub(r"\d+", "*", name(group[0])), group) for group in groups.values()]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them: layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def print_left_dense(console: Console, left: Iterable[Any], heading: str = "left dense") -> None:
    """Print the layers left dense, or left out of another job, each group with its reason."""
    rows = [
        (name, str(len(group)), group[0].reason) for name, group in grouped(left, lambda one: one.name, lambda one: one.reason)
    ]
    if rows:
        console.print()
        print_table(console, (heading, " n", "why"), rows)
