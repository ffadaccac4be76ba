"""The command line: one function a command; it parses, calls and prints."""

from __future__ import annotations

import typer

__all__ = ["app", "run"]

app = typer.Typer()


def run() -> None:
    """Run the command line on this process's arguments."""
    app()
