"""Pictures of the benchmark pages, drawn from the same rows as the tables next to them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from record import newest, read_rows
from sections.pruning import curves_of_law
from sections.speed import PATTERNS
from sections.training import by_budget

Rows = list[dict[str, Any]]
SOLVERS = ("Exact", "torch greedy", "2-approximation", "Sinkhorn", "OR-tools")


def draw_plots(results: Path, folder: Path) -> None:
    """Write one SVG file per picture; none for files without rows."""
    matplotlib.rcParams.update(
        {"svg.hashsalt": "bisparse", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    )
    pictures: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
        "training-gpt": ("training-gpt.jsonl", training_curves),
        "solver-times": ("solvers.jsonl", solver_times),
        "law": ("pruning_law.jsonl", law_curves),
    }
    for name, (file, draw) in pictures.items():
        if rows := read_rows(results / file):
            draw(rows).savefig(folder / f"{name}.svg", metadata={"Date": None})


def solver_times(rows: Rows) -> Figure:
    """Milliseconds of each solver by pattern: 1024 x 1024 Gaussian scores, one thread, the device measured last."""
    timed = [row for row in rows if row["benchmark"] == "solvers" and "time_ms" in row and row["side"] == 1024]
    timed = [row for row in timed if row["input"] == "gaussian" and row["threads"] == 1 and row["device"] == timed[-1]["device"]]
    latest = newest(timed, "contender", "pattern")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(SOLVERS)
    for index, solver in enumerate(SOLVERS):
        places = [(place, latest[solver, one]["time_ms"]) for place, one in enumerate(PATTERNS) if (solver, one) in latest]
        axis.bar([place + width * (index - 2) for place, _ in places], [time for _, time in places], width, label=solver)
    axis.set(yscale="log", ylabel="milliseconds", xticks=range(len(PATTERNS)), xticklabels=PATTERNS)
    axis.legend(fontsize=7, ncols=len(SOLVERS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def law_curves(rows: Rows) -> Figure:
    """Accuracy lost against violated weights, one panel per target pattern and treatment of batch norms."""
    panels = curves_of_law(rows)
    figure = Figure(figsize=(9, 3 * ((len(panels) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).ravel()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for method, losses in curves.items():
            axis.plot([float(at.removesuffix(" %")) for at in losses], list(losses.values()), "o-", markersize=3, label=method)
        axis.axvline(10, color="grey", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="violated weights, %", ylabel="top-1 lost, points")
        axis.legend(fontsize=6)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def training_curves(rows: list[dict[str, Any]]) -> Figure:
    """Mean training loss and flip rate of the GPT runs of the longest budget."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, flips = figure.subplots(1, 2)
    rows = by_budget([row for row in rows if row["study"] == "gpt"])[-1]
    for index, name in enumerate(dict.fromkeys(row["recipe"]["name"] for row in rows)):
        curves = [row["curve"] for row in rows if row["recipe"]["name"] == name]
        style = {"linestyle": "--" if "MVUE" in name else "-", "linewidth": 1, "label": name, "color": f"C{index}"}
        points = list(zip(*curves, strict=False))
        loss.plot([p[0]["step"] for p in points], [statistics.mean(one["loss"] for one in p) for p in points], **style)
        moved = [p for p in points if all(one.get("flip_rate", 0) > 0 for one in p)]
        if moved:
            flips.plot([p[0]["step"] for p in moved], [statistics.mean(one["flip_rate"] for one in p) for p in moved], **style)
    loss.set(xlabel="optimizer steps", ylabel="training loss, nats per byte")
    flips.set(xlabel="optimizer steps", ylabel="flip rate per refresh", yscale="log")
    loss.legend(fontsize=7)
    return figure
