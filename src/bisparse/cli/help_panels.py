"""How `--help` looks: options of long commands in panels, and no type next to a flag."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

__all__ = ["PANELS", "PaneledCommand"]

PANELS = {
    "What to prune": (
        "pattern", "to", "to_dense", "budget", "include", "exclude", "key", "layer_pattern", "layout", "remainder", "regrow",
    ),
    "How": (
        "solver", "method", "block_epochs", "network_epochs", "network_sequences", "expert_floor", "damping", "order", "device",
        "threads",
    ),
    "Calibration data": ("calibration", "text_field", "sequences", "length"),
    "Afterwards": ("quantize", "export", "evaluate", "eval_tokens"),
}  # fmt: skip
"""Panels by their titles, each with the parameters in it; all other options are in the last one."""
LONG = 15
"""Parameters from which on a command's options are in panels."""


class PaneledCommand(TyperCommand):
    """A command whose options are in `PANELS` if it has many."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if self.help:  # whose lines the terminal breaks
            self.help = re.sub(r"(?<!\n)\n(?!\n)", " ", self.help)
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        parameters = super().get_params(ctx)
        panels = {name: title for title, names in PANELS.items() for name in names}
        order = {name: number for number, name in enumerate(panels)}
        for one in parameters:
            if getattr(one, "is_flag", False):
                one.metavar = ""
            if len(parameters) >= LONG and hasattr(one, "rich_help_panel") and one.param_type_name == "option":
                one.rich_help_panel = panels.get(str(one.name))
        if len(parameters) < LONG:
            return parameters
        return sorted(parameters, key=lambda one: order.get(str(one.name), len(order)) if one.param_type_name == "option" else -1)
