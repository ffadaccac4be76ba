"""HTML pages made from `read_figures` and the templates: one file that needs no network, with scripts for sorting only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bisparse.apart import check_apart
from bisparse.atomic_file import WEB_PAGE, atomic_file, check_output_file
from bisparse.diversity import Hardware, MaskDiversity, hardware, mask_diversity
from bisparse.errors import install_extra
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured, parse_pattern
from bisparse.pruning.violation import CONFIDENCE
from bisparse.report.figures import FITTING_M, Progress, PrunedFigures, read_figures
from bisparse.report.lines import lines_of_history
from bisparse.report.plot import STRUCTURES, diversity_svg, retained_on_gaussian
from bisparse.report.svg import chart_of_errors, chart_of_layers, picture_of_tile

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["Task", "write_comparison", "write_report"]

TILES_SHOWN = 8
TILE_SIDE = 32
"""Rows and columns of a sample that are drawn, at most, unless M is larger."""
LAYERS_COMPARED = 3
"""Layers whose tiles a comparison draws."""
MATRIX = (1024, 1024)
"""The matrix whose masks are counted in words."""


@dataclass(frozen=True)
class Task:
    """A measurement of the dense model and of each pruned one, shown in a comparison."""

    name: str
    dense: float
    scores: tuple[float, ...]
    """One score per folder, in their order."""
    note: str = ""
    """A sentence about the measurement."""
    digits: int = 3

    def text(self, score: float) -> str:
        """The score as shown."""
        return f"{score:.{self.digits}f}"


@dataclass(frozen=True)
class _Compared:
    pruned: PrunedFigures
    hardware: Hardware
    masks: MaskDiversity
    transposable: bool


@dataclass(frozen=True)
class _Row:
    name: str
    size: int
    shape: tuple[int, ...]
    shares: tuple[float | None, ...]


def write_report(
    pruned: str | Path | PrunedFigures, output: str | Path, against: str | Path | None = None, *, progress: Progress | None = None
) -> Path:
    """Write a page about a pruned checkpoint: one HTML file that needs no network.

    It shows the retained score and the gap of each layer, pictures of real tiles, a new verification of W and W^T, the layers
    left dense with reasons, and the properties of the structure for masks and hardware. If the report of a training run was saved
    with the model, it shows how the masks of the run evolved.

    Args:
        pruned: a folder with a `bisparse.json`, or the result of `read_figures`.
        output: the HTML file; replaced if it is there.
        against: the dense checkpoint; adds the change of each layer's weights.
        progress: called with the layer's name, the bytes read so far and those there are.

    Raises:
        CheckpointError: the folder or the dense checkpoint cannot be read, do not belong together, or overlap the output.
        ImportError: the extra `report` is not installed.
        ValueError: the output is a folder, a device, a pipe, or a file that is no web page.
    """
    read = None if isinstance(pruned, PrunedFigures) else pruned
    check_apart(output, {"pruned checkpoint": read, "dense checkpoint": against})
    check_output_file(output, replaces=WEB_PAGE)
    environment = _environment()
    figures = pruned if isinstance(pruned, PrunedFigures) else read_figures(pruned, against, progress)
    report, structure = figures.report, figures.structure
    gaussian = retained_on_gaussian(structure)
    pictures = [
        picture_of_tile(sample, structure, max(TILE_SIDE, getattr(structure, "m", 0))) for sample in figures.samples[:TILES_SHOWN]
    ]
    errors = [(layer.error_before, layer.error) for layer in report if None not in (layer.error_before, layer.error)]
    html = environment.get_template("report.html.jinja").render(
        pruned=figures,
        source=figures.sidecar.source or figures.folder,
        meaning=_meaning(figures),
        transposable=_transposable(structure),
        forward_pattern=report.pattern.removesuffix("-T"),
        gaussian=gaussian,
        kept_weights=sum(round(layer.density * layer.size) for layer in report),
        charts=[chart_of_layers([figures], [gaussian], narrow=narrow) for narrow in (False, True)],
        error_charts=[chart_of_errors(figures, narrow=narrow) for narrow in (False, True)],
        history_charts=list(zip(*(lines_of_history(report.history, narrow=narrow) for narrow in (False, True)), strict=True)),
        mean_errors=[fmean(side) for side in zip(*errors, strict=True)],
        mixed=len({layer.pattern for layer in report}) > 1,
        has_output_error=any(layer.error is not None for layer in report),
        has_violation=any(layer.violated_groups is not None for layer in report),
        unstructured=any(isinstance(parse_pattern(layer.pattern), Unstructured) for layer in report),
        fitting_m=FITTING_M,
        confidence=CONFIDENCE,
        has_damping=any(layer.damping is not None for layer in report),
        hero=pictures[len(pictures) // 2] if pictures else None,
        pictures=pictures,
        diversity=_diversity([structure]),
        masks=mask_diversity(structure, MATRIX),
        masks_paper=mask_diversity(structure, MATRIX, "paper"),
        hardware=hardware(structure),
        left_dense=_by_reason([figures]),
    )
    return _write(output, html)


def write_comparison(
    pruned: Sequence[str | Path],
    output: str | Path,
    against: str | Path | None = None,
    *,
    tasks: Sequence[Task] = (),
    progress: Progress | None = None,
) -> Path:
    """Write a page that compares several pruned checkpoints of one model.

    Args:
        pruned: folders with a `bisparse.json` each.
        output: the HTML file; replaced if it is there.
        against: the dense checkpoint.
        tasks: scores of the models, one column per task.
        progress: as for `write_report`, folder after folder.

    Raises:
        ValueError: no folder, or a task without a score for each folder; otherwise as `write_report`.
    """
    if not isinstance(pruned, Sequence) or not pruned:
        raise ValueError("write_comparison needs a list of at least one pruned folder")
    for task in tasks:
        if len(task.scores) != len(pruned):
            raise ValueError(
                f"task {task.name!r} has {len(task.scores)} scores for {len(pruned)} folders: expected one per folder"
            )
    for folder in pruned:
        check_apart(output, {"pruned checkpoint": folder, "dense checkpoint": against})
    check_output_file(output, replaces=WEB_PAGE)
    environment = _environment()
    figures = [read_figures(folder, against, progress) for folder in pruned]
    compared = [
        _Compared(one, hardware(one.structure), mask_diversity(one.structure, MATRIX), _transposable(one.structure))
        for one in figures
    ]
    gaussian = [retained_on_gaussian(one.structure) for one in figures]
    shares = [share for one in figures for layer in one.report if (share := layer.retained) is not None]
    low, high = min(shares, default=0.0), max(shares, default=1.0)
    html = environment.get_template("comparison.html.jinja").render(
        compared=compared,
        source=figures[0].sidecar.source or figures[0].folder,
        tasks=tasks,
        charts=[chart_of_layers(figures, gaussian, narrow=narrow) for narrow in (False, True)],
        methods=len({one.report.method for one in figures}) > 1,
        layers=_rows(figures),
        heat=lambda share: 4 + 40 * (share - low) / (high - low) if high > low else 4,
        rows_of_tiles=_rows_of_tiles(figures),
        diversity=_diversity([one.structure for one in figures]),
        left_dense=_by_reason(figures),
        notes=list(dict.fromkeys(note for one in figures for note in one.report.notes)),
    )
    return _write(output, html)


def _environment() -> Environment:
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"reports need {error.name}, which is not installed; {install_extra('report')}", name=error.name
        ) from error
    from bisparse import __version__

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bisparse.report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "gap": _gap, "seconds": _seconds, "breaks": _breaks}
    environment.globals["version"] = __version__
    return environment


def _breaks(name: str) -> Any:
    """A dotted name, escaped, that may be broken after its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _percent(share: float, digits: int = 1, tight: bool = False) -> str:
    return f"{100 * share:.{digits}f}" + ("" if tight else " %")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def _gap(gap: float | None) -> str:
    if gap is None:
        return "–"
    return "0" if gap == 0 else f"{gap:.0e}".replace("e-0", "e-") if gap < 1e-4 else f"{100 * gap:.2f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def _transposable(structure: Structure) -> bool:
    return isinstance(structure, Pattern) and structure.transposable


def _meaning(figures: PrunedFigures) -> str:
    match figures.structure:
        case Pattern(n, m, transposable=True):
            text = f"At most {n} of every {m} weights are kept, along the rows of each weight matrix and along its columns."
        case Pattern(n, m):
            text = f"At most {n} of every {m} weights are kept, along the rows of each weight matrix."
        case Sequential(n, m):
            text = f"At most {n} of every {m} weights are kept, and the zeros are adjacent."
        case Paired(n, m):
            text = f"At most {n} of every {m} weights are kept, in adjacent pairs."
        case structure:
            text = f"At most {100 * structure.density:g} % of each weight matrix is kept."
    gap = figures.report.gap
    if gap is not None and gap < 1e-6:
        text += " Each mask is proved to be the best for its scores."
    return text


def _diversity(structures: Sequence[Structure]) -> Any:
    from markupsafe import Markup

    # Ours from end to end: numbers, and patterns that the parser has read.
    return Markup(diversity_svg(STRUCTURES, highlight=structures))


def _by_reason(figures: Sequence[PrunedFigures]) -> list[tuple[str, list[str]]]:
    """Layers left dense, grouped by their reason, largest group first."""
    groups: dict[str, dict[str, None]] = {}
    for one in figures:
        for skipped in one.report.left_dense:
            groups.setdefault(skipped.reason, {})[skipped.name] = None
    return sorted(((reason, list(names)) for reason, names in groups.items()), key=lambda group: -len(group[1]))


def _rows(figures: Sequence[PrunedFigures]) -> list[_Row]:
    layers = {layer.name: layer for one in figures for layer in one.report}
    by_name = [{layer.name: layer.retained for layer in one.report} for one in figures]
    return [_Row(name, layer.size, layer.shape, tuple(one.get(name) for one in by_name)) for name, layer in layers.items()]


def _rows_of_tiles(figures: Sequence[PrunedFigures]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """The sample tiles of a few layers that all folders have, cropped to the same size."""
    samples = [{sample.layer: sample for sample in one.samples} for one in figures]
    common = [name for name in samples[0] if all(name in one for one in samples)]
    step = max(1, math.ceil(len(common) / LAYERS_COMPARED))
    pairs = list(zip(figures, samples, strict=True))
    several = len({one.report.method for one in figures}) > 1
    return [
        (
            name,
            [
                (
                    f"{one.structure}, {one.report.method}" if several else str(one.structure),
                    picture_of_tile(own[name], one.structure, TILE_SIDE),
                )
                for one, own in pairs
            ],
        )
        for name in common[::step]
    ]


def _write(output: str | Path, html: str) -> Path:
    """Write the file atomically."""
    with atomic_file(output) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(output)
