"""What the training experiments share: budgets, recipes as keys of rows, and a grid that goes on where it stopped."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes import Outcome, Recipe, run_recipe
from record import RESULTS, Record, read_rows

RUNS = Path("runs/experiments")


def key_of(recipe: Recipe, study: str) -> dict[str, Any]:
    """What a row is found again by: everything that decides the run."""
    content = recipe.as_dict()
    content["data"].pop("folder")
    content["training"].pop("checkpoint_every")
    content["training"].pop("threads")
    if content["model"]["start"]:
        content["model"]["start"] = Path(content["model"]["start"]).name
    return {"study": study, "recipe": content}


def run_grid(grid: Iterable[tuple[str, Recipe]], path: Path, folder: Path, *, curve_every: int = 0) -> None:
    """Run what has no row yet; a row is written when a run is finished. A killed run goes on from its own checkpoint."""
    record = Record(path)
    finished = [key_of(Recipe.from_dict(row["recipe"]), row["study"]) for row in read_rows(path)]  # older ones lack new entries
    for study, recipe in grid:
        key = key_of(recipe, study)
        if key in finished:
            continue
        start = Path(recipe.model.start)
        if recipe.model.start and not (start / "weights.pt").exists():  # its row may be older than this folder
            run_recipe(replace(recipe, name="dense", model=replace(recipe.model, start=""), sparsity=None), start)
        own = folder / run_folder(recipe)
        outcome = run_recipe(recipe, own)
        assert isinstance(outcome, Outcome)
        figures = {name: value for name, value in outcome.__dict__.items() if name not in ("curve", "name")}
        if curve_every:
            figures["curve"] = thinned(outcome.curve, curve_every)
        record.add(key, figures)
        finished.append(key)
        if recipe.sparsity is not None:
            shutil.rmtree(own)  # dense runs are starting points


def run_folder(recipe: Recipe) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in recipe.name)
    return f"{name}-seed{recipe.seed}"


def thinned(curve: list[dict[str, float]], every: int) -> list[dict[str, float]]:
    """The training loss averaged over `every` steps, with the tests and the flip rates of that stretch."""
    rows = []
    for start in range(0, len(curve), every):
        stretch = curve[start : start + every]
        row: dict[str, float] = {}
        for one in stretch:
            row |= one
        row["loss"] = sum(one["loss"] for one in stretch) / len(stretch)
        rows.append({name: round(number, 6) for name, number in row.items()})
    return rows


def seeds(recipe: Recipe, count: int) -> list[Recipe]:
    return [replace(recipe, seed=seed) for seed in range(count)]


def parser(description: str, results: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--results", type=Path, default=RESULTS / results)
    arguments.add_argument("--runs", type=Path, default=RUNS, help="checkpoints of runs that are under way, and dense weights")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--dry-run", action="store_true", help="list what would be run")
    return arguments
