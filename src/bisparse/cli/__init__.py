"""The command line: one file per command, and one line per command here. Commands parse arguments, call the library and print.

Nothing here imports torch before a command runs, so that help and usage errors are instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bisparse.cli.bench import bench
from bisparse.cli.console import Commands, run_app, set_quiet
from bisparse.cli.convert import convert
from bisparse.cli.doctor import doctor
from bisparse.cli.evaluate import evaluate
from bisparse.cli.export import export
from bisparse.cli.help_panels import PaneledCommand
from bisparse.cli.info import info
from bisparse.cli.prune import prune
from bisparse.cli.quantize import quantize
from bisparse.cli.report import report
from bisparse.cli.verify import verify

__all__ = ["app", "run"]

app = typer.Typer(name="bisparse", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (prune, convert, quantize, export, verify, info, bench, report, doctor):
    app.command(cls=PaneledCommand)(command)
app.command(name="eval", cls=PaneledCommand)(evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bisparse {version('bisparse')}")
        raise typer.Exit


@app.callback()
def bisparse(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print no tables and no progress, only errors and --json. Goes before the command."),
    ] = False,
) -> None:
    """Sparse both ways: N:M masks, provably optimal, that hold on W and on its transpose.

    N is the number of weights KEPT of every M. Patterns: 2:4, 4:8-T (transposable), 4:8-seq, 4:8-paired, 50%.
    """
    set_quiet(quiet)


def run() -> None:
    """Run the command line on this process's arguments."""
    run_app(app)
