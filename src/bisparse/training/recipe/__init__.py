"""Recipes: an experiment as a TOML file, which is also the record of what was run."""

from bisparse.training.recipe.recipe import Recipe, RecipeError, read_recipe
from bisparse.training.recipe.run import Outcome, RunError, run_recipe

__all__ = ["Outcome", "Recipe", "RecipeError", "RunError", "read_recipe", "run_recipe"]
