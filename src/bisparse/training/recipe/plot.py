"""The curve of a run as a picture, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bisparse.training.recipe.run import Outcome

__all__ = ["plot_outcome"]


def plot_outcome(outcome: Outcome, path: Path) -> bool:
    """Loss and flip rate over the optimizer steps; False, and no file, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss_axis, flip_axis = figure.subplots(1, 2)
    steps = [row["step"] for row in outcome.curve]
    loss_axis.plot(steps, [row["loss"] for row in outcome.curve], color="0.6", linewidth=0.8, label="training")
    tested = [row for row in outcome.curve if "test_loss" in row]
    loss_axis.plot([row["step"] for row in tested], [row["test_loss"] for row in tested], "o-", label="test")
    loss_axis.set(xlabel="optimizer steps", ylabel="loss (nats)", title=outcome.name)
    loss_axis.legend()
    flips = [row for row in outcome.curve if row.get("flip_rate", 0) > 0]
    flip_axis.plot([row["step"] for row in flips], [row["flip_rate"] for row in flips], ".-")
    flip_axis.set(xlabel="optimizer steps", ylabel="flip rate", title=f"test accuracy {outcome.test_accuracy:.4f}")
    if flips:
        flip_axis.set_yscale("log")
    figure.savefig(path, dpi=110)
    return True
