"""`bisparse train`: run a recipe."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bisparse.cli.console import INTERRUPTED, AsJson, command, fail, print_json, table, to_stdout

__all__ = ["train"]


@command
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", exists=True, dir_okay=False, help="Model, data, training, sparsity.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run, new or to go on with; by default runs/ and the name.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the recipe's.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="ENTRY=VALUE", help="Instead of the recipe's: training.steps=20. May be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says: live loss and flip rate, curves, weights. A killed run goes on where it was, bit by bit."""
    from dataclasses import replace

    from bisparse.checkpoint.apart import check_apart
    from bisparse.training.recipe import RunError, read_recipe, run_recipe

    chosen = read_recipe(recipe, changes or ())
    if seed is not None:
        chosen = replace(chosen, seed=seed)
    folder = out or Path("runs") / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', chosen.name)}-seed{chosen.seed}"
    check_apart(folder, {"recipe": recipe})
    try:
        outcome = run_recipe(chosen, folder, progress=not as_json)
    except RunError as error:
        fail(str(error), 1, as_json=as_json)
    except KeyboardInterrupt:
        again = "the same command goes on from its last checkpoint, if it had come to one"
        fail(f"interrupted; {again}: {folder}", INTERRUPTED, as_json=as_json)
    assert outcome is not None
    if as_json:
        print_json({"ok": True, "folder": str(folder), **asdict(outcome)})
        return
    share = outcome.search_seconds / outcome.train_seconds if outcome.train_seconds else 0.0
    rows = [
        ("test accuracy", f"{outcome.test_accuracy:.4f}"),
        ("test loss", f"{outcome.test_loss:.4f}"),
        ("density of sparse layers", f"{outcome.density:.4f}"),
        ("last flip rate", f"{outcome.flip_rate:.5f}"),
        (
            "training",
            f"{outcome.steps} steps in {outcome.train_seconds:.1f} s, {share:.2%} of it in {outcome.refreshes} mask searches",
        ),
        ("data", outcome.data),
        ("written to", str(folder)),
    ]
    to_stdout().print(table(("", ""), rows))
