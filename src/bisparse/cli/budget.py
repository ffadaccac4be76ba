"""`bisparse prune --budget`: chooses each layer's pattern from a list, within a total."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.console import parse_pattern_option

if TYPE_CHECKING:
    from bisparse.pattern import Structure

__all__ = ["BudgetOption", "parse_patterns"]

BudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="PERCENT",
        help="Fraction of the weights that all layers together may keep, such as 50%: each layer gets the pattern with which "
        "the network loses least, measured on calibration data if given. Builds the model.",
    ),
]
DEFAULT = "4:8-T"


def parse_patterns(
    given: list[str] | None, budget: str | None, layer_patterns: list[str] | None
) -> tuple[Structure | None, dict[str, Any]]:
    """(The pattern of all layers, {}), or with a budget (None, arguments of `prune_`); wrong use if options contradict."""
    if budget is None:
        if given is not None and len(given) > 1:
            raise typer.BadParameter(f"{', '.join(given)}: several patterns need --budget", param_hint="--pattern")
        return parse_pattern_option(given[0] if given else DEFAULT), {}
    if layer_patterns:
        raise typer.BadParameter(
            "does not work with --budget, which chooses the pattern of each layer", param_hint="--layer-pattern"
        )
    if not given or all(one == "dense" for one in given):
        raise typer.BadParameter("needs patterns to choose from, such as -p 2:4-T -p 4:8-T -p dense", param_hint="--budget")
    from bisparse.pruning.budget import parse_budget

    structures = [one if one == "dense" else parse_pattern_option(one) for one in given]
    try:
        return None, {"budget": parse_budget(budget), "patterns": structures}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from error
