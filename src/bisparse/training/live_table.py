"""`LiveTable`: a line per mask refresh for loops without a logger, and a picture of how the masks settled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bisparse.atomic_file import PICTURE, atomic_file, check_output_file
from bisparse.errors import install_extra
from bisparse.training.metrics import mean_change

if TYPE_CHECKING:
    from bisparse.training.sparsity import Sparsity

__all__ = ["LiveTable"]

HEAD_EVERY = 20
"""Lines between two heads."""
WIDTH = 10


class LiveTable:
    """Prints a line per measured refresh: steps, flip rate, score kept, and the mean of what `add` was given since the last line.

    ::

        table = LiveTable()
        sparsity.on_refresh.append(table)
        for inputs, labels in data:
            ...
            table.add(loss=loss)
        table.plot("masks.svg")

    Numbers are means over layers, weighted by size; see `MaskChange`. `rows` keeps all lines.

    Args:
        file: where to print; by default standard output.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.rows: list[dict[str, float]] = []
        """One per line, by column."""
        self._file = file
        self._given: dict[str, list[float]] = {}
        self._columns: list[str] = []

    def add(self, **numbers: float) -> None:
        """Numbers of a step, such as its loss; each becomes a column. A tensor is read, which waits for a GPU."""
        for name, number in numbers.items():
            self._given.setdefault(name, []).append(float(number))

    def __call__(self, sparsity: Sparsity) -> None:
        """Print a line; called by `Sparsity.on_refresh`."""
        if not sparsity.changes:
            return
        change = mean_change(sparsity.changes.values())
        row = {"step": change.step, "flip rate": change.flip_rate, "kept": change.retained, "tiles": change.changed_tiles}
        self.rows.append(row | {name: sum(own) / len(own) for name, own in self._given.items() if own})
        self._given = {name: [] for name in self._given}
        columns = list(self.rows[-1])
        if columns != self._columns or len(self.rows) % HEAD_EVERY == 1:
            self._columns = columns
            self._print([f"of {sparsity.steps}" if name == "step" and sparsity.steps else name for name in columns])
        self._print([f"{value:.0f}" if name == "step" else f"{value:.4g}" for name, value in self.rows[-1].items()])

    def _print(self, cells: Sequence[str]) -> None:
        print(" ".join(f"{cell:>{max(WIDTH, len(name))}}" for cell, name in zip(cells, self._columns, strict=True)),
              file=self._file or sys.stdout, flush=True)  # fmt: skip

    def plot(self, path: str | Path) -> Path:
        """Draw flip rate and score kept over the steps so far.

        Args:
            path: the picture to write: .svg, .png or .pdf.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there are no lines yet, another suffix, or a file that is no picture.
        """
        path = Path(path)
        if path.suffix.lower() not in (".svg", ".png", ".pdf"):
            raise ValueError(f"{path}: a picture is written as .svg, .png or .pdf")
        if not self.rows:
            raise ValueError("no refresh has been measured yet: add the table to sparsity.on_refresh before training")
        check_output_file(path, replaces=PICTURE)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"pictures need matplotlib; {install_extra('report')}") from error
        figure = Figure(figsize=(8, 3), layout="constrained")
        steps = [row["step"] for row in self.rows]
        for place, name in enumerate(("flip rate", "kept"), 1):
            axes = figure.add_subplot(1, 2, place)
            axes.plot(steps, [row[name] for row in self.rows], color="#2563eb", linewidth=1.5)
            axes.set(xlabel="optimizer steps", ylabel={"kept": "fraction of the score kept"}.get(name, name))
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=150)
        return path
