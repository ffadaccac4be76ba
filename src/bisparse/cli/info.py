"""`bisparse info`: shows what a pattern allows and costs, or which patterns a checkpoint already obeys."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Key,
    Layouts,
    command,
    parse_layout_options,
    parse_pattern_option,
    parse_source,
    print_json,
    progress_bar,
    refuse_given,
    to_stdout,
)
from bisparse.cli.tables import grouped, print_left_dense, print_table, table

if TYPE_CHECKING:
    from bisparse.pattern import Structure

__all__ = ["info"]


@command
def info(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN|CHECKPOINT",
            help="A pattern such as 4:8-T; or a folder or file of weights, or a model in the local Hugging Face cache, org/name.",
        ),
    ],
    size: Annotated[str, typer.Option("--size", metavar="T|RxC", help="Size of the tensor whose masks are counted.")] = "64x64",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw mask diversity against retained magnitude: .png, .svg or .pdf."),
    ] = None,
    include: Included = None,
    exclude: Excluded = None,
    layout: Layouts = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """For a pattern: number of masks (exact, and by the paper's formula), density, metadata, selectors, sparse GEMMs.

    For a checkpoint: the N:M patterns that each layer already obeys, on W only and on W and W^T.
    """
    path = _checkpoint_named(subject)
    if path is not None:
        refuse_given("requires a pattern, not a checkpoint", "--plot", "--size")
        _checkpoint(path, include, exclude, parse_layout_options(layout), key, as_json)
    else:
        structure = parse_pattern_option(subject, "PATTERN|CHECKPOINT")
        refuse_given("requires a checkpoint, not a pattern", "--include", "--exclude", "--layout", "--key")
        if plot is not None:
            _plot(structure, plot)
        _pattern(structure, _parse_size(size), as_json)


def _checkpoint_named(subject: str) -> Path | None:
    """The checkpoint of this name; None if the text can only be a pattern."""
    if re.fullmatch(r"[\d:]+(-\w+)?|[\d.]+%", subject) and not Path(subject).exists():
        return None
    named = "/" in subject or os.path.lexists(subject) or subject.endswith((".safetensors", ".pt", ".pth", ".bin"))
    try:
        return parse_source(subject, "PATTERN|CHECKPOINT")
    except typer.BadParameter:
        if named:
            raise
        return None


def _plot(structure: Structure, path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{path}: expected a file that ends in .png, .svg or .pdf", param_hint="--plot")
    from bisparse.report import plot_diversity

    plot_diversity(path, highlight=[structure])


def _parse_size(text: str) -> tuple[int, ...]:
    sides = re.split(r"[x,×]", text.replace(" ", ""))
    if not all(re.fullmatch(r"[1-9]\d{0,9}", side) for side in sides):
        raise typer.BadParameter(f"{text!r}: expected a number of weights or sides, such as 4096x4096", param_hint="--size")
    return tuple(map(int, sides))


def _pattern(structure: Structure, size: tuple[int, ...], as_json: bool) -> None:
    from bisparse.diversity import hardware, mask_diversity

    exact, paper = (mask_diversity(structure, size, method=method) for method in ("exact", "paper"))
    cost = hardware(structure)
    if as_json:
        counts = {
            one.method: {
                "log2": one.log2,
                "log2_per_weight": one.log2_per_weight,
                "scientific": one.scientific,
                "exact": one.exact,
            }
            for one in (exact, paper)
        }
        figures = {key: value for key, value in asdict(cost).items() if key != "structure"}
        print_json({"ok": True, "pattern": str(structure), "size": size, "masks": counts, **figures, "selector": cost.selector})
        return
    console = to_stdout()
    console.print(f"[bold]{structure}[/]  {_meaning(structure)}")
    rows = [("density", f"at most {structure.density:.4g}")]
    shape = " x ".join(map(str, size))
    rows.append((f"masks of {shape}", f"{exact.scientific}  ({exact.log2_per_weight:.4f} bits per weight)"))
    if paper.log2 != exact.log2:
        rows.append(
            ("  by the paper's formula", f"{paper.scientific}  ({paper.log2_per_weight:.4f} bits per weight; an overcount)")
        )
    if cost.selectors:
        rows.append(("selectors per group", f"{cost.selectors} of {cost.selector}"))
    if cost.metadata_bits_packed is not None:
        rows.append(
            (
                "metadata",
                f"{cost.metadata_bits_packed:.4g} bits per weight packed, {cost.metadata_bits_per_kept} bits per kept entry",
            )
        )
    gemms = f"{cost.sparse_gemms} of 3" + (
        "" if cost.sparse_gemms == 3 else f" ({cost.sparse_gemms_with_gradient} with MVUE gradients)"
    )
    rows.append(("sparse GEMMs per training step", gemms))
    rows.append(("today's tensor cores", ("yes. " if cost.tensor_cores else "no. ") + cost.note))
    console.print(table(("", ""), rows))


def _meaning(structure: Structure) -> str:
    from bisparse.pattern import Paired, Pattern, Sequential, Unstructured

    match structure:
        case Pattern(n, m, transposable=True):
            return f"keeps at most {n} of every {m} weights, along rows and along columns"
        case Pattern(n, m):
            return f"keeps at most {n} of every {m} weights along rows"
        case Sequential(n, m):
            return f"keeps at most {n} of every {m} weights along rows; its {m - n} zeros are adjacent"
        case Paired(n, m):
            return f"keeps at most {n} of every {m} weights along rows, in adjacent pairs"
        case Unstructured():
            return "keeps any weights, up to that fraction of each matrix"
    raise AssertionError(structure)


def _checkpoint(
    path: Path, include: list[str] | None, exclude: list[str] | None, layouts: dict[str, str], key: str | None, as_json: bool
) -> None:
    from bisparse.checkpoint import detect_patterns
    from bisparse.checkpoint.detect import cover_source
    from bisparse.checkpoint.reader import open_source
    from bisparse.checkpoint.sidecar import read_own_sidecar

    with progress_bar(show=not as_json) as progress:
        found = list(detect_patterns(path, include=include, exclude=exclude, layouts=layouts, key=key, progress=progress))
    source = open_source(path, key)
    covered = cover_source(source, include, exclude, layouts)
    sidecar = read_own_sidecar(path, source.tensors, needed=False)
    if as_json:
        layers = [
            {**asdict(one), "patterns": list(map(str, one.patterns)), "notable": list(map(str, one.notable))} for one in found
        ]
        left, unchecked = ([asdict(one) for one in ones] for ones in (covered.left_out, covered.unchecked))
        said: dict[str, Any] | None = None
        if sidecar is not None:
            said = {"pattern": sidecar.report.pattern, "method": sidecar.report.method, "created": sidecar.created}
        print_json({"ok": True, "path": str(path), "layers": layers, "left_dense": left, "unchecked": unchecked, "sidecar": said})
        return
    console = to_stdout()
    rows = []
    for name, group in grouped(found, lambda one: one.layer, lambda one: (one.shape, one.dtype, one.notable)):
        density = sum(one.density for one in group) / len(group)
        patterns = "  ".join(map(str, group[0].notable)) or "none (dense, or unstructured)"
        if group[0].too_large:
            patterns += f"; M from {group[0].too_large[0]} on is not judged, since a side is shorter"
        rows.append((name, str(len(group)), " x ".join(map(str, group[0].shape)), group[0].dtype, f"{density:.4f}", patterns))
    print_table(console, ("layer", " n", " shape", "dtype", " density", "obeys"), rows)
    print_left_dense(console, covered.unchecked, "not examined")
    print_left_dense(console, covered.left_out)
    console.print()
    for note in source.notes:
        console.print(f"Note: {note}", markup=False)
    if sidecar is not None:
        console.print(
            f"bisparse.json: pruned to {sidecar.report.pattern} by {sidecar.report.method}, {sidecar.created}", markup=False
        )
