"""ResNet-20 on Fashion-MNIST: what sparse training costs in accuracy.

    python benchmarks/training/resnet.py --data FOLDER [--budget reduced|long|full] [--names GLOB ...]

Studies: dense; static 2:4, 2:4-T, 4:8-T from the dense model; dynamic from scratch by STE, SR-STE and masked decay at 2:4,
2:4-T, 4:8-T, 16:32-T; exact against greedy masks; a refresh every 1, 10, 40, 100 steps; and the paper's first claim, that
accuracy follows mask diversity: unstructured, 4:8, 2:4, 4:8-T, 2:4-T, 4:8-seq. Rows go to results/training-resnet.jsonl; those
there are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from experiment import parser, run_folder, run_grid, seeds
from recipes.recipe import DataRecipe, ModelRecipe, SparsityRecipe, TrainingRecipe

from recipes import Recipe

BUDGETS = {
    "full": (
        DataRecipe("fashion-mnist", train=60000, test=10000, side=28),
        TrainingRecipe(epochs=5, batch=128, lr=0.1, precision="bfloat16"),
    ),
    # A quarter of the pixels and 8,000 of the images: an experiment in under a minute on one core.
    "reduced": (DataRecipe("fashion-mnist", train=8000, test=10000, side=14), TrainingRecipe(epochs=3, batch=64, lr=0.1)),
    # All images and five times the steps: about a minute on one core with AMX. For a choice of the runs, by --names.
    "long": (
        DataRecipe("fashion-mnist", train=60000, test=10000, side=14),
        TrainingRecipe(steps=2000, batch=64, lr=0.1, precision="bfloat16"),
    ),
    "smoke": (DataRecipe("fashion-mnist", train=256, test=200, side=7), TrainingRecipe(epochs=1, batch=64, lr=0.1)),
}
METHODS = {"STE": "ste", "SR-STE": "sr-ste", "masked decay": "masked-decay"}
DYNAMIC = ("2:4", "2:4-T", "4:8-T", "16:32-T")
TOTAL_DECAYS = (1, 3, 5, 10)
"""Lambda times the sum of learning rates; the default of `sparsify_` is one of them."""
DIVERSITY = ("50%", "4:8", "2:4", "4:8-T", "2:4-T", "4:8-seq")


def grid(base: Recipe, runs: Path, count: int) -> Iterator[tuple[str, Recipe]]:
    """The most telling runs first, all seeds of one before the next."""
    dense = replace(base, name="dense")
    for recipe in seeds(dense, count):
        yield "dense", recipe

    def dynamic(name: str, **settings: object) -> list[Recipe]:
        return seeds(replace(base, name=name, sparsity=SparsityRecipe(**settings)), count)  # type: ignore[arg-type]

    for pattern in ("4:8-T", "2:4", "2:4-T", "16:32-T"):
        for recipe in dynamic(f"dynamic masked decay {pattern}", pattern=pattern):
            yield "dynamic", recipe
    for pattern in ("4:8-T", "2:4-T", "16:32-T"):
        for recipe in dynamic(f"fixed random mask {pattern}", pattern=pattern, mode="static"):
            yield "control", recipe
        for total in TOTAL_DECAYS:
            for recipe in dynamic(f"total decay {total} {pattern}", pattern=pattern, total_decay=float(total)):
                yield "total decay", recipe
    for refresh in (1, 10):
        for recipe in dynamic(f"total decay 3, refresh {refresh} 4:8-T", pattern="4:8-T", total_decay=3.0, refresh=refresh):
            yield "total decay", recipe
    for share in (0.1, 0.25, 0.5):
        for recipe in dynamic(f"total decay 3, frozen from {share} 4:8-T", pattern="4:8-T", total_decay=3.0, frozen_from=share):
            yield "total decay", recipe
    for pattern in ("2:4", "2:4-T", "4:8-T"):
        for recipe in seeds(replace(base, name=f"static {pattern}"), count):
            start = str((runs / run_folder(replace(dense, seed=recipe.seed))).resolve())
            how = SparsityRecipe(pattern, mode="static")
            yield "static", replace(recipe, model=replace(recipe.model, start=start), sparsity=how)
    for recipe in seeds(replace(base, name="dense, trained on"), count):
        start = str((runs / run_folder(replace(dense, seed=recipe.seed))).resolve())
        yield "static", replace(recipe, model=replace(recipe.model, start=start))
    for pattern in DIVERSITY:
        if pattern not in DYNAMIC:
            for recipe in dynamic(f"dynamic masked decay {pattern}", pattern=pattern):
                yield "dynamic", recipe
    for recipe in dynamic("greedy 4:8-T", pattern="4:8-T", solver="greedy") + dynamic(
        "greedy 2:4-T", pattern="2:4-T", solver="greedy"
    ):
        yield "greedy", recipe
    for refresh in (1, 10, 100):
        for recipe in dynamic(f"refresh {refresh} 4:8-T", pattern="4:8-T", refresh=refresh):
            yield "refresh", recipe
    for method in ("STE", "SR-STE"):
        for pattern in DYNAMIC:
            for recipe in dynamic(f"dynamic {method} {pattern}", pattern=pattern, method=METHODS[method]):
                yield "dynamic", recipe


def main() -> None:
    arguments = parser(__doc__ or "", "training-resnet.jsonl")
    arguments.add_argument("--data", default="", help="folder of the four idx.gz files")
    arguments.add_argument("--budget", choices=BUDGETS, default="reduced")
    arguments.add_argument("--only", nargs="*", help="studies: dense, static, dynamic, control, total decay, greedy, refresh")
    arguments.add_argument("--names", nargs="*", default=["*"], help="globs of runs, such as 'dynamic * 4:8-T'")
    arguments.add_argument("--width", type=int, default=16)
    chosen = arguments.parse_args()
    data, training = BUDGETS[chosen.budget]
    base = Recipe(
        "", model=ModelRecipe("resnet20", width=chosen.width), data=replace(data, folder=chosen.data), training=training
    )
    runs = chosen.runs / f"resnet-{chosen.budget}"
    wanted = [
        (study, recipe)
        for study, recipe in grid(base, runs, chosen.seeds)
        if (not chosen.only or study in chosen.only) and any(fnmatchcase(recipe.name, glob) for glob in chosen.names)
    ]
    if chosen.dry_run:
        print("\n".join(f"{study}: {recipe.name}, seed {recipe.seed}" for study, recipe in wanted), f"\n{len(wanted)} runs")
        return
    run_grid(wanted, chosen.results, runs, curve_every=10)


if __name__ == "__main__":
    main()
