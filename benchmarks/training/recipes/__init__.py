"""Training experiments on toy models: the recipes that the benchmarks run. No part of the library."""

from recipes.recipe import Recipe, RecipeError
from recipes.run import Outcome, RunError, run_recipe

__all__ = ["Outcome", "Recipe", "RecipeError", "RunError", "run_recipe"]
