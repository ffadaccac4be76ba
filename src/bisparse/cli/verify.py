"""`bisparse verify`: checks whether W and W^T of every layer of a checkpoint obey the pattern."""

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
    Layouts,
    Threads,
    command,
    parse_layout_options,
    parse_pattern_option,
    parse_source,
    print_json,
    progress_bar,
    set_threads,
    to_stdout,
)
from bisparse.cli.tables import SHOWN, grouped, natural, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from bisparse.pattern import Structure
    from bisparse.verification import Verification, Violation

__all__ = ["verify"]


@command
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint: a folder, a safetensors, torch, TorchScript or ONNX file under any name, or a model in "
            "the local Hugging Face cache, org/name."
        ),
    ],
    pattern: Annotated[
        str | None, typer.Option("--pattern", "-p", help="By default, each layer's pattern in bisparse.json.")
    ] = None,
    include: Included = None,
    exclude: Excluded = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Also fail if a layer could not be checked (--exclude accepts one), or if bisparse.json is wrong."
        ),
    ] = False,
    layout: Layouts = None,
    key: Key = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check that every layer obeys its pattern, on the GEMM operand W and, for transposable patterns, on W^T.

    Weights of any dtype are read. Layers whose zeros cannot be read from the file, such as packed ones, are listed as not
    checked, with the reason. Exit code 1 if a layer breaks its pattern (its first violation is shown) or none could be checked.
    """
    from bisparse.checkpoint import verify_checkpoint

    path = parse_source(path, "PATH")
    structure = None if pattern is None else parse_pattern_option(pattern)
    layouts = parse_layout_options(layout)
    set_threads(threads)
    with progress_bar(show=not as_json) as progress:
        result = verify_checkpoint(path, structure, include=include, exclude=exclude, layouts=layouts, key=key, progress=progress)
    passed = bool(result) and not (strict and (result.unchecked or result.contradicted))
    if as_json:
        print_json(_as_dict(result, passed))
    else:
        _print(result)
    if not passed:
        raise typer.Exit(1)


def _as_dict(result: Verification, passed: bool) -> dict[str, object]:
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
    reasons = {
        key: [asdict(one) for one in ones] for key, ones in (("unchecked", result.unchecked), ("left_out", result.left_out))
    }
    return {
        "ok": passed,
        **totals,
        "checked": [one.layer for one in result.layers],
        **reasons,
        "contradicted": result.contradicted,
        "layers": layers,
    }


def _columns(violation: Violation, pattern: Structure) -> list[int] | None:
    """First and last column of the violated group, on its side (W or W^T); None for the whole matrix."""
    m = getattr(pattern, "m", None)
    return None if m is None else [violation.group * m, violation.group * m + m - 1]


def _print(result: Verification) -> None:
    console = to_stdout()
    broken = [one for one in result.layers if not one]
    if broken:
        _print_broken(console, broken)
    if result.unchecked:
        rows = grouped(result.unchecked, lambda one: one.name, lambda one: one.reason)
        print_table(console, ("not checked", " n", "why"), [(name, str(len(group)), group[0].reason) for name, group in rows])
        console.print()
    for wrong in result.contradicted[:SHOWN]:
        console.print(f"bisparse.json is wrong: {wrong}", style="yellow", markup=False, soft_wrap=True)
    if len(result.contradicted) > SHOWN:
        console.print(f"... and {len(result.contradicted) - SHOWN:,} more statements; --json lists them all.", style="yellow")
    console.print(_verdict(result, broken))


def _verdict(result: Verification, broken: list[Verification]) -> str:
    count, total = len(result.layers), len(result.layers) + len(result.unchecked)
    if not count:
        return f"[bold red]No layer was checked[/]: the zeros of all {total} layers are unknown."
    not_checked = f" {len(result.unchecked)} of {total} layers were not checked." if result.unchecked else ""
    if broken:
        patterns = ", ".join(dict.fromkeys(str(one.pattern) for one in result.layers))
        checked = "checked layers" if result.unchecked else "layers"
        return (
            f"[bold red]{patterns} is broken[/] in {len(broken)} of {count} {checked}: "
            f"{result.violations:,} of {result.groups:,} groups, density {result.density:.4f}.{not_checked}"
        )
    held = []
    for side, both in (("W and W^T", True), ("W", False)):
        own = [one for one in result.layers if getattr(one.pattern, "transposable", False) == both]
        if own:
            names = ", ".join(dict.fromkeys(str(one.pattern) for one in own))
            many = f"all {len(own)} layers" if len(own) == total else f"{len(own)} of {total} layers"
            held.append(f"[bold green]{names} holds[/] on {side} of {many}")
    return f"{'; '.join(held)}: {result.groups:,} groups, density {result.density:.4f}.{not_checked}"


def _print_broken(console: Console, broken: list[Verification]) -> None:
    """One row for layers of one name but for a number, in the order of these numbers, with the first violation of the first."""
    rows = []
    broken = sorted(broken, key=lambda one: natural(one.layer))
    for name, group in grouped(broken, lambda one: one.layer, lambda one: one.pattern):
        first = group[0].first
        assert first is not None
        columns = _columns(first, group[0].pattern)
        where = f"{first.side}, " + (f"matrix {first.matrix}, " if first.matrix else "") + f"row {first.row}"
        place = f"columns {columns[0]} to {columns[1]}" if columns else "the whole matrix"
        layer = f"{first.layer}: " if len(group) > 1 else ""
        counts = (f"{sum(one.violations for one in group):,}", f"{sum(one.groups for one in group):,}")
        found = f"{layer}{where}, {place}: keeps {first.kept}"
        rows.append((name, str(len(group)), str(group[0].pattern), *counts, found))
    print_table(console, ("layer", " n", "pattern", " groups broken", " of", "the first"), rows)
    console.print()
