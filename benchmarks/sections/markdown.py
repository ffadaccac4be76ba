"""Markdown tables and the format of their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first columns are text, the others numbers."""
    marks = ["---" if column < text_columns else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)) + "\n"


def verdict(holds: bool) -> str:
    return "met" if holds else "**missed**"


def figure(value: float, digits: int = 3) -> str:
    """Rounded to that many significant digits, or to a whole number if that has more; without exponents."""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.6f}".rstrip("0")


def percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def provenance(rows: list[dict[str, Any]]) -> str:
    versions = "; ".join(dict.fromkeys(", ".join(f"{name} {one}" for name, one in row["versions"].items()) for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    days = sorted({row["date"][:10] for row in rows})
    return f"{versions}; commit {commits}; {days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}.\n"
