"""`bisparse verify`: do W and W^T of every layer obey the pattern; any checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bisparse.cli.console import (
    AsJson,
    Excluded,
    Included,
    Key,
    Threads,
    command,
    parse_pattern_option,
    print_json,
    progress_bar,
    set_threads,
    table,
    to_stdout,
)

if TYPE_CHECKING:
    from bisparse.pattern import Structure
    from bisparse.solution import Verification, Violation

__all__ = ["verify"]

SHOWN = 20
"""Broken layers listed, unless --json."""


@command
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            exists=True, help="A checkpoint: a folder, or a file of safetensors, torch, TorchScript or ONNX, whatever its name."
        ),
    ],
    pattern: Annotated[
        str | None, typer.Option("--pattern", "-p", help="By default what bisparse.json says of each layer.")
    ] = None,
    include: Included = None,
    exclude: Excluded = None,
    key: Key = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check that every layer obeys its pattern, as the GEMMs see W and, for transposable patterns, W^T.

    Exit code 1 if one does not; the first violation of each such layer is named.
    """
    from bisparse.checkpoint import verify_checkpoint

    structure = None if pattern is None else parse_pattern_option(pattern)
    set_threads(threads)
    with progress_bar(show=not as_json) as progress:
        result = verify_checkpoint(path, structure, include=include, exclude=exclude, key=key, progress=progress)
    if as_json:
        print_json(_as_dict(result))
    else:
        _print(result)
    if not result:
        raise typer.Exit(1)


def _as_dict(result: Verification) -> dict[str, object]:
    layers = [
        {
            "name": one.layer,
            "ok": bool(one),
            "pattern": str(one.pattern),
            "groups": one.groups,
            "violations": one.violations,
            "density": one.density,
            "first": None if one.first is None else {**asdict(one.first), "columns": _columns(one.first, one.pattern)},
        }
        for one in result.layers
    ]
    totals = {"pattern": str(result.pattern), "groups": result.groups, "violations": result.violations, "density": result.density}
    return {"ok": bool(result), **totals, "layers": layers}


def _columns(violation: Violation, pattern: Structure) -> list[int] | None:
    """First and last column of the group, on its side."""
    m = getattr(pattern, "m", None)
    return None if m is None else [violation.group * m, violation.group * m + m - 1]


def _print(result: Verification) -> None:
    console = to_stdout()
    broken = [one for one in result.layers if not one]
    patterns = ", ".join(dict.fromkeys(str(one.pattern) for one in result.layers))
    held = []
    for side, both in (("W and W^T", True), ("W", False)):
        own = [one for one in result.layers if getattr(one.pattern, "transposable", False) == both]
        if own:
            names = ", ".join(dict.fromkeys(str(one.pattern) for one in own))
            many = f"all {len(own)} layers" if len(own) == len(result.layers) else f"{len(own)} of {len(result.layers)} layers"
            held.append(f"[bold green]{names} holds[/] on {side} of {many}")
    if not broken:
        console.print(f"{'; '.join(held)}: {result.groups:,} groups, density {result.density:.4f}.")
        return
    rows = []
    for one in broken[:SHOWN]:
        first = one.first
        assert first is not None
        columns = _columns(first, one.pattern)
        where = f"{first.side}, " + (f"matrix {first.matrix}, " if first.matrix else "") + f"row {first.row}"
        place = f"columns {columns[0]} to {columns[1]}" if columns else "the whole matrix"
        rows.append(
            (one.layer, str(one.pattern), f"{one.violations:,}", f"{one.groups:,}", f"{where}, {place}: keeps {first.kept}")
        )
    console.print(table(("layer", "pattern", " groups broken", " of", "the first"), rows))
    if len(broken) > SHOWN:
        console.print(f"... and {len(broken) - SHOWN} more layers; --json lists them all.")
    console.print()
    console.print(
        f"[bold red]{patterns} is broken[/] in {len(broken)} of {len(result.layers)} layers: "
        f"{result.violations:,} of {result.groups:,} groups, density {result.density:.4f}."
    )
