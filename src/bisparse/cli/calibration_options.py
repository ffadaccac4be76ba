"""Options of commands that take calibration data, and what their values mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from bisparse.pruning import BlockReconstruction, Method, NetworkReconstruction

__all__ = [
    "NEED_DATA",
    "NEED_TEXT",
    "BlockEpochs",
    "Calibration",
    "Damping",
    "Device",
    "ExpertFloor",
    "Length",
    "NetworkEpochs",
    "NetworkSequences",
    "Order",
    "Resume",
    "Sequences",
    "TextField",
    "TextFiles",
    "fits_asked",
    "parse_device",
    "parse_expert_floor",
    "parse_method",
    "parse_order",
    "parse_reconstruction",
]

Calibration = Annotated[
    list[Path] | None,
    # Checked here, before a model is loaded.
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Text to calibrate on: continuous text for causal models, one sample per line for others; or JSON lines (.jsonl) "
        "with texts or conversations. May be repeated; every file contributes equally many samples.",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field", metavar="NAME", help='The field of JSON lines to read. By default "text", "messages" or "conversations".'
    ),
]
Sequences = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens per sample.")]
Order = Annotated[
    str, typer.Option(help="sequential: inputs of a layer come from the network pruned so far; parallel: from the dense network.")
]
BlockEpochs = Annotated[
    int, typer.Option(min=0, help="Fit each block as a whole after its layers, in at most this many passes over the samples.")
]
NetworkEpochs = Annotated[
    int,
    typer.Option(
        min=0,
        help="At the end, fit all layers together to the dense model's outputs, in at most this many passes over the samples.",
    ),
]
NetworkSequences = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of samples for the fit of --network-epochs; more give better results. By default those of --sequences.",
    ),
]
Damping = Annotated[float | None, typer.Option(help="Ridge parameter of the least squares; by default chosen on held-out data.")]
Device = Annotated[str | None, typer.Option(help="Device on which to run transformer blocks, one at a time, such as cuda.")]
ExpertFloor = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Experts stored in one parameter that get fewer routed tokens per input are calibrated on all tokens. By default 2; "
        "0: routed tokens only; inf: all tokens for each.",
    ),
]
Resume = Annotated[Path | None, typer.Option(help="A folder for the journal, from which an interrupted job continues.")]

NEED_TEXT = ("--text-field", "--sequences", "--length")
"""Options that only matter with --calibration."""
NEED_DATA = ("--calibration", *NEED_TEXT, "--order", "--damping", "--device", "--expert-floor", "--network-sequences")
"""Options that only matter to methods that use calibration data."""


@dataclass(frozen=True)
class TextFiles:
    """The calibration data as given on the command line."""

    paths: Sequence[Path] | None
    """None: the batches that come with the model."""
    field: str | None
    sequences: int
    length: int
    network_sequences: int | None = None
    """Samples to fit the network on; None: the others."""


def parse_method(name: str, damping: float | None = None) -> Method:
    """The method of this name in `bisparse.pruning.METHODS`, with the given damping of its least squares, if any."""
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
            raise typer.BadParameter(f"{name} has no damping; choose another method, such as adaprune", param_hint="--damping")
        return by_name(name, **{found: damping})
    except typer.BadParameter:
        raise
    except ValueError as error:
        hint = "--damping" if "damping=" in str(error) else "--method"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def parse_device(name: str | None) -> str | None:
    """The name of the device, if it is usable; wrong use otherwise."""
    from bisparse.device import usable_device

    if name is not None:
        try:
            usable_device(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--device") from error
    return name


def parse_order(order: str) -> Literal["sequential", "parallel"]:
    """The order of calibration, if there is one of this name; wrong use otherwise."""
    if order == "sequential":
        return "sequential"
    if order == "parallel":
        return "parallel"
    raise typer.BadParameter(f"{order!r} is not one of sequential, parallel", param_hint="--order")


def parse_expert_floor(tokens: float | None) -> float:
    """The floor of tokens per expert and input, by default that of `prune_`."""
    from bisparse.pruning.calibration.options import EXPERT_FLOOR

    return EXPERT_FLOOR if tokens is None else tokens


def parse_reconstruction(
    block_epochs: int, network_epochs: int, order: str, texts: TextFiles
) -> BlockReconstruction | NetworkReconstruction | None:
    """How blocks, and the whole network, are fitted; None for 0 epochs of both."""
    if texts.network_sequences is not None and not network_epochs:
        raise typer.BadParameter("requires --network-epochs", param_hint="--network-sequences")
    if texts.network_sequences is not None and not texts.paths:
        raise typer.BadParameter("requires --calibration", param_hint="--network-sequences")
    if block_epochs == network_epochs == 0:
        return None
    if order != "sequential":
        hint = "--block-epochs" if block_epochs else "--network-epochs"
        raise typer.BadParameter("works only with --order sequential", param_hint=hint)
    from bisparse.pruning import BlockReconstruction, NetworkReconstruction

    blocks = BlockReconstruction(epochs=block_epochs) if block_epochs else None
    return NetworkReconstruction(epochs=network_epochs, blocks=blocks) if network_epochs else blocks


def fits_asked(reconstruction: BlockReconstruction | NetworkReconstruction | None) -> dict[str, bool]:
    """The option that asked for a fit of blocks or of the network, which needs calibration data."""
    if reconstruction is None:
        return {}
    from bisparse.pruning import BlockReconstruction

    return {"--block-epochs" if isinstance(reconstruction, BlockReconstruction) else "--network-epochs": True}
