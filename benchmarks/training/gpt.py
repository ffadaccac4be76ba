"""A small GPT on Python's documentation and library: loss curves dense, 2:4, 2:4-T, 4:8-T, 16:32-T, with and without MVUE.

    python benchmarks/training/gpt.py [--budget small|reduced|full] [--study gpt|decay|rules|total|rates]

"decay": instead, masked decay from none to too much at 4:8-T: loss and flip rate say which is right
for AdamW. "rules": each rule of `bisparse.training.RULES` that takes 4:8-T, everything else equal. "total": decay as a total over
the run, outside of Adam's moments, and a fixed mask of the initial weights. "rates": the learning rate of sparse weights divided
by their density, and dense training at other rates. Rows,
with curves and flip rates, go to results/training-gpt.jsonl; those there are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from experiment import parser, run_grid, seeds
from recipes.recipe import DataRecipe, ModelRecipe, SparsityRecipe, TrainingRecipe

from bisparse.training import RULES
from recipes import Recipe

PATTERNS = ("4:8-T", "2:4", "2:4-T", "16:32-T")
GRID_DECAY = 2e-4
"""Of the rows of the grid, which are older than the default of 2e-3 for AdamW that the study of the decay led to."""
DECAYS = (0.0, 2e-5, 2e-4, 2e-3, 2e-2, 2e-1, 2.0)
FULL = TrainingRecipe(steps=2000, batch=16, optimizer="adamw", lr=1e-3, weight_decay=0.1, clip=1.0, evaluate_every=200)
BUDGETS = {
    "full": (
        ModelRecipe("gpt", width=384, layers=6, heads=6),
        DataRecipe("python-text", train=4_000_000, test=200_000, context=256),
        FULL,
    ),
    "reduced": (
        ModelRecipe("gpt", width=128, layers=4, heads=4),
        DataRecipe("python-text", train=1_500_000, test=60_000, context=128),
        replace(FULL, steps=300, batch=8, lr=2e-3, evaluate_every=100),
    ),
    # 512,000 bytes in short steps: half a minute on one core, a minute with MVUE.
    "small": (
        ModelRecipe("gpt", width=96, layers=3, heads=3),
        DataRecipe("python-text", train=1_500_000, test=60_000, context=128),
        replace(FULL, steps=1000, batch=4, lr=2e-3, evaluate_every=200),
    ),
    "smoke": (
        ModelRecipe("gpt", width=32, layers=1, heads=2),
        DataRecipe("python-text", train=30_000, test=4_000, context=32),
        replace(FULL, steps=6, batch=4, evaluate_every=3),
    ),
}


def grid(base: Recipe, count: int, refresh: int) -> Iterator[tuple[str, Recipe]]:
    for recipe in seeds(replace(base, name="dense"), count):
        yield "gpt", recipe
    for mvue in (False, True):
        for pattern in PATTERNS:
            name = f"{pattern} with MVUE" if mvue else pattern
            how = SparsityRecipe(pattern, refresh=refresh, mvue=mvue, decay=GRID_DECAY)
            for recipe in seeds(replace(base, name=name, sparsity=how), count):
                yield "gpt", recipe


def decay_grid(base: Recipe, count: int, refresh: int, decays: Iterable[float]) -> Iterator[tuple[str, Recipe]]:
    for decay in decays:
        how = SparsityRecipe("4:8-T", refresh=refresh, decay=decay)
        for recipe in seeds(replace(base, name=f"4:8-T, decay {decay:g}", sparsity=how), count):
            yield "decay", recipe


def rules_grid(base: Recipe, count: int, refresh: int) -> Iterator[tuple[str, Recipe]]:
    for rule in RULES:
        if rule != "s-ste":  # for plain N:M alone
            how = SparsityRecipe("4:8-T", refresh=refresh, rule=rule)
            for recipe in seeds(replace(base, name=f"4:8-T, rule {rule}", sparsity=how), count):
                yield "rules", recipe


def total_grid(base: Recipe, count: int, refresh: int) -> Iterator[tuple[str, Recipe]]:
    def named(name: str, pattern: str, **how: Any) -> Iterator[tuple[str, Recipe]]:
        sparsity = SparsityRecipe(pattern, refresh=refresh, **how)
        for recipe in seeds(replace(base, name=f"{name} {pattern}", sparsity=sparsity), count):
            yield "total", recipe

    for pattern in ("4:8-T", "2:4-T", "16:32-T"):
        yield from named("fixed random mask", pattern, mode="static")
        for total in (1.0, 3.0, 5.0, 10.0) if pattern == "4:8-T" else (5.0,):
            yield from named(f"SR-STE, total {total:g}", pattern, method="sr-ste", total_decay=total)
    for share in (0.25, 0.5):
        yield from named(f"dense for {share}, then SR-STE, total 5", "4:8-T", method="sr-ste", total_decay=5.0, dense_first=share)


def rates_grid(base: Recipe, count: int, refresh: int) -> Iterator[tuple[str, Recipe]]:
    for factor in (0.7, 1.4):
        training = replace(base.training, lr=factor * base.training.lr)
        for recipe in seeds(replace(base, name=f"dense, learning rate x {factor}", training=training), count):
            yield "rates", recipe
    for pattern in ("4:8-T", "2:4-T", "16:32-T"):
        for name, how in {
            "fixed random mask": {"mode": "static"},
            "SR-STE, total 5": {"method": "sr-ste", "total_decay": 5.0},
            "SR-STE, total 10": {"method": "sr-ste", "total_decay": 10.0},
        }.items():
            sparsity = SparsityRecipe(pattern, refresh=refresh, scale_lr=True, **how)  # type: ignore[arg-type]
            for recipe in seeds(replace(base, name=f"{name}, scaled rates {pattern}", sparsity=sparsity), count):
                yield "rates", recipe


def main() -> None:
    arguments = parser(__doc__ or "", "training-gpt.jsonl")
    arguments.add_argument("--budget", choices=BUDGETS, default="reduced")
    arguments.add_argument("--steps", type=int, help="optimizer steps, instead of the budget's")
    arguments.add_argument("--study", choices=("gpt", "decay", "rules", "total", "rates"), default="gpt")
    arguments.add_argument("--decays", nargs="+", type=float, default=DECAYS, help="of the study of that name")
    chosen = arguments.parse_args()
    model, data, training = BUDGETS[chosen.budget]
    if chosen.steps:
        training = replace(training, steps=chosen.steps, evaluate_every=max(1, chosen.steps // 3))
    refresh = 40 if chosen.budget != "smoke" else 2
    if chosen.study == "decay":
        wanted = list(decay_grid(Recipe("", model=model, data=data, training=training), chosen.seeds, refresh, chosen.decays))
    elif chosen.study == "rules":
        wanted = list(rules_grid(Recipe("", model=model, data=data, training=training), chosen.seeds, refresh))
    elif chosen.study == "total":
        wanted = list(total_grid(Recipe("", model=model, data=data, training=training), chosen.seeds, refresh))
    elif chosen.study == "rates":
        wanted = list(rates_grid(Recipe("", model=model, data=data, training=training), chosen.seeds, refresh))
    else:
        wanted = list(grid(Recipe("", model=model, data=data, training=training), chosen.seeds, refresh))
    if chosen.dry_run:
        print("\n".join(f"{recipe.name}, seed {recipe.seed}" for _, recipe in wanted), f"\n{len(wanted)} runs")
        return
    run_grid(wanted, chosen.results, chosen.runs / f"gpt-{chosen.budget}", curve_every=10)


if __name__ == "__main__":
    main()
