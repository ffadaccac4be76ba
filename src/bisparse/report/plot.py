"""The plot of mask diversity against retained score of structures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bisparse._solve import solve
from bisparse.arguments import check_flag
from bisparse.atomic_file import PICTURE, atomic_file, check_output_file
from bisparse.diversity import mask_diversity
from bisparse.errors import install_extra
from bisparse.pattern import Paired, Pattern, Sequential, Structure, parse_pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GAUSSIAN_RETAINED",
    "STRUCTURES",
    "Point",
    "diversity_points",
    "diversity_svg",
    "plot_diversity",
    "retained_on_gaussian",
]

STRUCTURES = (
    "4:8-seq", "2:4-seq", "4:8-paired", "2:4-T", "4:8-T", "2:4", "8:16-T", "4:8", "16:32-T", "8:16", "50%",
)  # fmt: skip
"""What the plot compares by default, all at density 1/2."""

GAUSSIAN_RETAINED = {
    "50%": 0.7965, "16:32": 0.7890, "8:16": 0.7818, "4:8": 0.7683, "2:4": 0.7445, "1:2": 0.7071,
    "32:64-T": 0.7890, "16:32-T": 0.7817, "8:16-T": 0.7678, "4:8-T": 0.7429, "2:4-T": 0.7028,
    "2:4-seq": 0.6781, "4:8-seq": 0.6461, "4:8-paired": 0.6756,
}  # fmt: skip
"""Fraction of the total |w| that each structure's best mask keeps of Gaussian weights; `benchmarks/quality.py` measures it."""

WEIGHTS_ACROSS = 1024
"""Side of the tensor whose diversity is shown. Structures do not depend on it, and unstructured masks hardly."""

FAMILIES = {
    "unstructured": ("#111111", "D"),
    "N:M": ("#0b66c3", "o"),
    "N:M transposable": ("#d1441a", "s"),
    "N:M paired": ("#7a4fc2", "P"),
    "N:M sequential": ("#1f8a5b", "^"),
}
LIGHT = {"paper": "#ffffff", "ink": "#20242e", "faint": "#7a8090", "line": "#d9dce3", "band": "#f1f2f5"}
DARK = {"paper": "#14161d", "ink": "#e9e7e1", "faint": "#9aa0b0", "line": "#343946", "band": "#1d2029"}
DARK_FAMILIES = {"#111111": "#f2f0ea", "#0b66c3": "#6cb2ff", "#d1441a": "#ff8d66", "#7a4fc2": "#b79bff", "#1f8a5b": "#5fd0a0"}


@dataclass(frozen=True)
class Point:
    """One structure on the plot."""

    structure: Structure
    retained: float
    exact: float
    """log2 of the number of masks, per weight."""
    paper: float
    """The same by the paper's formula."""

    @property
    def family(self) -> str:
        """What kind of structure it is."""
        match self.structure:
            case Pattern(transposable=True):
                return "N:M transposable"
            case Pattern():
                return "N:M"
            case Sequential():
                return "N:M sequential"
            case Paired():
                return "N:M paired"
            case _:
                return "unstructured"


def retained_on_gaussian(pattern: str | Structure) -> float:
    """Fraction of the total score that the best mask keeps of |N(0,1)| scores, the expectation for weights without structure.

    From `GAUSSIAN_RETAINED`; other structures are measured on 512 x 512 scores (to about 0.001).
    """
    structure = parse_pattern(pattern)
    if (known := GAUSSIAN_RETAINED.get(str(structure))) is not None:
        return known
    scores = torch.randn(512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").abs()
    return solve(scores, structure).retained


def diversity_points(structures: Iterable[str | Structure] = STRUCTURES) -> list[Point]:
    """Diversity, by both methods, and retained score of each structure."""
    return [_point(structure) for structure in dict.fromkeys(map(parse_pattern, structures))]


@cache
def _point(structure: Structure) -> Point:
    size = (WEIGHTS_ACROSS, WEIGHTS_ACROSS)
    exact, paper = (mask_diversity(structure, size, method).log2_per_weight for method in ("exact", "paper"))
    return Point(structure, retained_on_gaussian(structure), exact, paper)


def plot_diversity(
    path: str | Path,
    structures: Iterable[str | Structure] = STRUCTURES,
    *,
    highlight: Sequence[str | Structure] = (),
    dark: bool = False,
) -> Path:
    """Draw the number of masks a structure allows against the score its best mask keeps, and save the picture.

    Args:
        path: its suffix chooses the format: .png, .svg or .pdf.
        structures: what to compare.
        highlight: structures to mark, added where they are missing.
        dark: light ink on a dark page.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a format that matplotlib does not write, or `path` is a folder, a device, or a file that is no picture.
    """
    path = Path(path)
    check_flag("dark", dark)
    formats = (".png", ".svg", ".pdf")
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path}: a picture is written as {', '.join(formats)}; '{path.suffix}' is none of these")
    check_output_file(path, replaces=PICTURE)
    figure = _draw(
        structures,
        highlight,
        DARK if dark else LIGHT,
        DARK_FAMILIES if dark else {},
        "What a structure allows, and what it keeps",
    )
    kind = path.suffix.lower().removeprefix(".")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return path


def diversity_svg(structures: Iterable[str | Structure] = STRUCTURES, *, highlight: Sequence[str | Structure] = ()) -> str:
    """The same picture as an SVG element whose colours are the page's CSS variables (--ink, --plot-0, ...)."""
    _check_matplotlib()
    return _svg(tuple(map(parse_pattern, structures)), tuple(map(parse_pattern, highlight)))


@lru_cache(maxsize=16)  # pages about the same patterns show the same picture
def _svg(structures: tuple[Structure, ...], highlight: tuple[Structure, ...]) -> str:
    import matplotlib as mpl

    figure = _draw(structures, highlight, LIGHT, {})
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bisparse"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    names = {colour: f"--{name}" for name, colour in LIGHT.items()}
    names |= {colour: f"--plot-{index}" for index, (colour, _) in enumerate(FAMILIES.values())}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"plots are drawn by matplotlib, which is not installed; {install_extra('report')}") from error


def _draw(
    structures: Iterable[str | Structure],
    highlight: Sequence[str | Structure],
    theme: dict[str, str],
    family_colours: dict[str, str],
    title: str = "",
) -> Figure:
    _check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    marked = [parse_pattern(one) for one in highlight]
    points = diversity_points([*structures, *marked])
    colours = {family: family_colours.get(colour, colour) for family, (colour, _) in FAMILIES.items()}

    figure = Figure(figsize=(9.2, 6.0 if title else 5.6), layout="constrained", facecolor=theme["paper"])
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, loc="left", color=theme["ink"], fontsize=14, fontweight="bold", pad=14)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme["line"])
    axes.tick_params(colors=theme["faint"], labelsize=9.5, length=0, pad=6)
    axes.grid(color=theme["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    right = max(1.06, *(point.paper + 0.07 for point in points))
    left = min(point.exact for point in points) - 0.07
    axes.set_xlim(left, right)
    low, high = (edge([point.retained for point in points]) for edge in (min, max))
    axes.set_ylim(low - 0.022, high + 0.026)
    axes.yaxis.set_major_locator(MultipleLocator(0.02 if high - low > 0.05 else 0.01))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_xlabel("mask diversity: log2 of the number of masks, per weight", color=theme["ink"], fontsize=10.5, labelpad=8)
    axes.set_ylabel("kept of the total |w|, Gaussian weights", color=theme["ink"], fontsize=10.5, labelpad=8)

    # A mask is one bit per weight: a count above 2**T counts some masks twice.
    axes.axvspan(1, right, color=theme["band"], zorder=0, linewidth=0)
    axes.text(
        right - 0.012, axes.get_ylim()[0] + 0.004, "more masks than there are\n(1 bit per weight)",
        ha="right", va="bottom", fontsize=8.5, color=theme["faint"], linespacing=1.35,
    )  # fmt: skip

    obstacles: list[tuple[float, float]] = []
    for point in points:
        colour, marker = colours[point.family], FAMILIES[point.family][1]
        if abs(point.paper - point.exact) > 1e-9:
            axes.annotate(
                "", (point.exact, point.retained), (point.paper, point.retained),
                arrowprops={"arrowstyle": "-|>,head_width=.22,head_length=.45", "color": colour, "linewidth": 1, "alpha": 0.55,
                            "shrinkA": 6, "shrinkB": 7, "linestyle": (0, (4, 2))},
            )  # fmt: skip
            axes.plot(
                point.paper,
                point.retained,
                marker,
                markersize=8,
                markerfacecolor=theme["paper"],
                color=colour,
                markeredgewidth=1.4,
            )
            obstacles.append((point.paper, point.retained))
        if point.structure in marked:
            axes.plot(point.exact, point.retained, "o", markersize=21, color=colour, alpha=0.2, markeredgewidth=0)
        axes.plot(
            point.exact,
            point.retained,
            marker,
            markersize=11 if marker == "P" else 9,
            color=colour,
            markeredgecolor=theme["paper"],
        )
        obstacles.append((point.exact, point.retained))
    _legend(figure, points, colours, theme)
    _label(axes, points, obstacles, marked, colours)
    return figure


def _label(
    axes: Axes, points: list[Point], obstacles: list[tuple[float, float]], marked: list[Structure], colours: dict[str, str]
) -> None:
    """Name the points, each at the first of eight places around it that is free."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixel = renderer.points_to_pixels(1)
    taken = [
        Bbox.from_bounds(x - 7 * pixel, y - 7 * pixel, 14 * pixel, 14 * pixel) for x, y in axes.transData.transform(obstacles)
    ]
    for point in points:
        if abs(point.paper - point.exact) > 1e-9:  # the arrow between the two counts
            (x0, y0), (x1, _) = axes.transData.transform([(point.exact, point.retained), (point.paper, point.retained)])
            taken.append(Bbox([[x0, y0 - 2 * pixel], [x1, y0 + 2 * pixel]]))
    places = (
        (0, 11, "center", "bottom"), (0, -12, "center", "top"), (-12, 0, "right", "center"), (12, 0, "left", "center"),
        (-9, 9, "right", "bottom"), (9, 9, "left", "bottom"), (9, -9, "left", "top"), (-9, -9, "right", "top"),
        (0, 24, "center", "bottom"), (0, -25, "center", "top"), (-20, 20, "right", "bottom"), (20, -20, "left", "top"),
    )  # fmt: skip
    for point in sorted(points, key=lambda point: (point.structure not in marked, -point.retained)):
        best: tuple[float, Any, Bbox] | None = None
        for dx, dy, across, along in places:
            text = axes.annotate(
                str(point.structure), (point.exact, point.retained), (dx, dy), textcoords="offset points", ha=across, va=along,
                fontsize=10.5, color=colours[point.family], fontweight="bold" if point.structure in marked else "normal",
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent(renderer).padded(1.5 * pixel)
            overlap = sum(_overlap(box, other) for other in taken)
            if best is None or overlap < best[0]:
                if best is not None:
                    best[1].remove()
                best = (overlap, text, box)
            else:
                text.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[2])


def _overlap(one: Any, other: Any) -> float:
    """Area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))


def _legend(figure: Figure, points: list[Point], colours: dict[str, str], theme: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    present = {point.family for point in points}
    handles = [
        Line2D([], [], color=colours[family], marker=marker, linestyle="none", markersize=8, label=family)
        for family, (_, marker) in FAMILIES.items()
        if family in present
    ]
    handles.append(
        Line2D([], [], color=theme["faint"], marker="s", linestyle="none", markersize=8, markerfacecolor=theme["paper"],
               label="counted by the paper's formula")
    )  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, labelcolor=theme["ink"],
        columnspacing=1.4, handletextpad=0.2,
    )  # fmt: skip
