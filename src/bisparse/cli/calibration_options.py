"""Options of commands that take calibration data, and what their values mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from bisparse.pruning import BlockReconstruction, Method

__all__ = [
    "BlockEpochs",
    "Calibration",
    "Damping",
    "Device",
    "Length",
    "Order",
    "Resume",
    "Sequences",
    "TextField",
    "TextFiles",
    "parse_device",
    "parse_method",
    "parse_order",
    "parse_reconstruction",
]

Calibration = Annotated[
    list[Path] | None,
    # Checked here, before a model is loaded.
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Text to calibrate on: a running text for causal models, a sample a line for others; or JSON lines (.jsonl) with "
        "texts or conversations. May be repeated; each file gives as many samples.",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field", metavar="NAME", help='The field of JSON lines to read. By default "text", "messages" or "conversations".'
    ),
]
Sequences = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens a sample.")]
Order = Annotated[str, typer.Option(help="sequential: layers see those pruned before them; parallel: the dense network.")]
BlockEpochs = Annotated[
    int, typer.Option(min=0, help="After its layers, fit each block as a whole, in at most so many passes over the samples.")
]
Damping = Annotated[float | None, typer.Option(help="Ridge of the least squares; by default chosen by held-out data.")]
Device = Annotated[str | None, typer.Option(help="Run transformer blocks there, one at a time, such as cuda.")]
Resume = Annotated[Path | None, typer.Option(help="A folder to go on from, should the job be interrupted.")]


@dataclass(frozen=True)
class TextFiles:
    """The calibration data that were asked for."""

    paths: Sequence[Path] | None
    """None: those that come with the model."""
    field: str | None
    sequences: int
    length: int


def parse_method(name: str, damping: float | None = None) -> Method:
    """A method by its name in `bisparse.pruning.METHODS`, with the damping of its least squares where one is given."""
    from dataclasses import fields, is_dataclass

    from bisparse.pruning import METHODS
    from bisparse.pruning import parse_method as by_name

    try:
        if damping is None or name not in METHODS:
            return by_name(name)
        kind = METHODS[name]
        settings: set[str] = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
        found = next((setting for setting in ("refit_damping", "damping") if setting in settings), None)
        if found is None:
            raise typer.BadParameter(f"{name} has no damping; name another method, such as adaprune", param_hint="--damping")
        return by_name(name, **{found: damping})
    except typer.BadParameter:
        raise
    except ValueError as error:
        hint = "--damping" if "damping=" in str(error) else "--method"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def parse_device(name: str | None) -> str | None:
    """A device that is there."""
    from bisparse.device import usable_device

    if name is not None:
        try:
            usable_device(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--device") from error
    return name


def parse_order(order: str) -> Literal["sequential", "parallel"]:
    """The order of calibration."""
    if order == "sequential":
        return "sequential"
    if order == "parallel":
        return "parallel"
    raise typer.BadParameter(f"{order!r} is not one of sequential, parallel", param_hint="--order")


def parse_reconstruction(epochs: int, order: str) -> BlockReconstruction | None:
    """How blocks are fitted as a whole; None where they are not."""
    if epochs == 0:
        return None
    if order != "sequential":
        raise typer.BadParameter("blocks are fitted in the order sequential only", param_hint="--block-epochs")
    from bisparse.pruning import BlockReconstruction

    return BlockReconstruction(epochs=epochs)
