"""`bisparse report`: one self-contained HTML page about a pruned checkpoint."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bisparse.cli.console import AsJson, command, fail, parse_source, print_json, to_stderr, to_stdout
from bisparse.errors import install_extra

__all__ = ["report"]


@command
def report(
    pruned: Annotated[
        Path, typer.Argument(help="A folder that bisparse wrote, or a model in the local Hugging Face cache, org/name.")
    ],
    against: Annotated[Path | None, typer.Option("--against", help="The dense checkpoint it was pruned from.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write an HTML page: retained score, gap and density of every layer, pictures of real tiles, mask diversity.

    For a model that was trained sparse and saved with its report, it also shows how the masks evolved over the run.

    Exit code 1 if a layer does not obey its pattern, as for `bisparse verify`; the page is still written and shows where.
    """
    if missing := [package for package in ("matplotlib", "jinja2") if importlib.util.find_spec(package) is None]:
        fail(f"reports need {' and '.join(missing)}; {install_extra('report')}", 2, as_json=as_json)
    pruned = parse_source(pruned, "PRUNED")
    if pruned.is_file():
        raise typer.BadParameter(f"{pruned} is a file: pass the folder that bisparse wrote", param_hint="PRUNED")
    against = None if against is None else parse_source(against, "--against")
    from bisparse.apart import check_apart
    from bisparse.atomic_file import WEB_PAGE, check_output_file
    from bisparse.checkpoint import SIDECAR
    from bisparse.checkpoint.statements import origin
    from bisparse.report import read_figures, write_report

    if not (pruned / SIDECAR).exists():
        fail(
            f"{pruned} has no {SIDECAR}, so bisparse did not write it: pass a folder that it wrote, or use `bisparse verify`",
            2,
            as_json=as_json,
        )

    check_apart(output, {"pruned checkpoint": pruned, "dense checkpoint": against})
    check_output_file(output, replaces=WEB_PAGE)
    figures = read_figures(pruned, against)
    write_report(figures, output)
    if as_json:
        layers = [layer.as_dict() for layer in figures.layers]
        print_json(
            {
                "ok": figures.holds,
                "output": str(output),
                "bytes": output.stat().st_size,
                "holds": figures.holds,
                "contradicted": figures.contradicted,
                "provenance": figures.sidecar.provenance,
                "layers": layers,
                "history": [asdict(point) for point in figures.report.history],
            }
        )
    else:
        console = to_stdout()
        for line in origin(figures.sidecar):
            console.print(line, markup=False, soft_wrap=True)
        for wrong in figures.contradicted:
            console.print(f"bisparse.json is wrong: {wrong}", style="yellow", markup=False, soft_wrap=True)
        console.print(f"Written to {output} ({output.stat().st_size / 1e6:.1f} MB)", markup=False)
    if broken := [layer.result for layer in figures.layers if not layer.holds]:
        to_stderr().print(
            f"[bold red]bisparse:[/] {len(broken)} of {len(figures.layers)} layers break their pattern, the first "
            f"{escape(broken[0].name)} its {broken[0].pattern}; the page shows where, and so does bisparse verify",
            soft_wrap=True,
        )
        raise typer.Exit(1)
