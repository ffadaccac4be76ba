"""A recipe: model, data, training and sparsity, read from TOML and checked before anything runs.

::

    name = "resnet20 4:8-T"
    seed = 0

    [model]
    kind = "resnet20"            # "resnet20", "gpt" or "mlp"

    [data]
    kind = "fashion-mnist"       # "fashion-mnist", "python-text" or "blobs"
    train = 10000                # images, or bytes of text

    [training]
    epochs = 3
    batch = 128
    optimizer = "sgd"
    lr = 0.1

    [sparsity]                   # left out: dense
    pattern = "4:8-T"
    refresh = 40
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bisparse.pattern import parse_pattern
from bisparse.training.optimizer import DEFAULT_DECAY, DEFAULT_DECAY_ADAM

__all__ = ["DataRecipe", "ModelRecipe", "Recipe", "RecipeError", "SparsityRecipe", "TrainingRecipe", "read_recipe"]

MODELS = ("resnet20", "gpt", "mlp")
DATA = ("fashion-mnist", "python-text", "blobs")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")
LARGEST_SEED = 1 << 32
SOLVERS = ("exact", "greedy", "sinkhorn", "two-approximation", "flow")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the entry and what it may be."""


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained."""

    kind: str = "resnet20"
    width: int = 16
    """Channels of ResNet-20's first stage; embedding size of the GPT; hidden units of the MLP."""
    layers: int = 4
    """Blocks of the GPT."""
    heads: int = 4
    """Attention heads of the GPT."""
    start: str = ""
    """Folder of a run whose final dense weights are the start, as static sparsity needs; relative to the recipe."""


@dataclass(frozen=True)
class DataRecipe:
    """What it is trained on."""

    kind: str = "fashion-mnist"
    folder: str = ""
    """Where Fashion-MNIST's idx.gz files lie; by default where Debian's dataset-fashion-mnist puts them."""
    train: int = 60000
    """Images; bytes for text; points for blobs."""
    test: int = 10000
    side: int = 28
    """Images are averaged down to this side: 28, 14 or 7."""
    context: int = 128
    """Bytes a sequence of text has."""


@dataclass(frozen=True)
class TrainingRecipe:
    """How."""

    epochs: float = 1.0
    steps: int = 0
    """Optimizer steps; if given, instead of epochs."""
    batch: int = 128
    accumulate: int = 1
    """Batches an optimizer step sums over."""
    optimizer: str = "sgd"
    lr: float = 0.1
    """The largest, reached after `warmup`; a cosine to zero follows."""
    warmup: float = 0.1
    """Share of the steps."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 0.0
    """Largest norm of the gradient; 0 for no clipping."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0: at the end only."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints, from which a killed run goes on."""
    threads: int = 1
    precision: str = "float32"
    """"bfloat16": forward and backward under autocast; weights, optimizer and masks stay float32."""


@dataclass(frozen=True)
class SparsityRecipe:
    """Which weights are zero, and how that is decided; the arguments of `bisparse.sparsify_`."""

    pattern: str = "4:8-T"
    mode: str = "dynamic"
    method: str = "masked-decay"
    solver: str = "exact"
    refresh: int = 40
    decay: float | None = None
    """Left out: what `bisparse.sparsify_` takes for the recipe's optimizer, which is then written down here."""
    dense_first: float = 0.0
    """Share of the steps that are dense at the start."""
    frozen_from: float = 1.0
    """Share of the steps after which masks stay as they are."""
    dense_last: float = 0.0
    """Share of the steps that are dense at the end."""
    mvue: bool = False
    patterns: dict[str, str] = field(default_factory=dict)
    """Patterns of single layers by glob."""
    measure: bool = True
    """Measure flip rates; off where the time of the mask search is what is measured."""


@dataclass(frozen=True)
class Recipe:
    """A whole experiment."""

    name: str
    seed: int = 0
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    training: TrainingRecipe = TrainingRecipe()
    sparsity: SparsityRecipe | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.sparsity.decay is None:
            adam = self.training.optimizer == "adamw" and self.sparsity.method == "masked-decay"
            decay = DEFAULT_DECAY_ADAM if adam else DEFAULT_DECAY
            object.__setattr__(self, "sparsity", replace(self.sparsity, decay=decay))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and dictionaries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """The inverse of `as_dict`; unknown entries and wrong types are refused by name.

        >>> Recipe.from_dict({"name": "x", "training": {"epoch": 3}})
        Traceback (most recent call last):
        bisparse.training.recipe.recipe.RecipeError: recipe: [training] has no entry 'epoch'; it has accumulate, batch, ...
        """
        tables: dict[str, type[Any]] = {
            "model": ModelRecipe, "data": DataRecipe, "training": TrainingRecipe, "sparsity": SparsityRecipe,
        }  # fmt: skip
        top = {key: value for key, value in content.items() if key not in tables}
        if not isinstance(top.get("name"), str):
            raise RecipeError(f"{source}: a recipe needs a name")
        arguments = _typed(cls, top, source, "the recipe")
        for key, table in tables.items():
            if content.get(key) is not None:
                arguments[key] = table(**_typed(table, content[key], source, f"[{key}]"))
        recipe = cls(**arguments)
        recipe._check(source)
        return recipe

    def _check(self, source: str) -> None:
        choices: list[tuple[str, str, str, tuple[str, ...]]] = [
            ("model", "kind", self.model.kind, MODELS),
            ("data", "kind", self.data.kind, DATA),
        ]
        choices.append(("training", "optimizer", self.training.optimizer, OPTIMIZERS))
        choices.append(("training", "precision", self.training.precision, PRECISIONS))
        positive = [
            ("training", "batch", self.training.batch), ("training", "accumulate", self.training.accumulate),
            ("training", "checkpoint_every", self.training.checkpoint_every), ("data", "train", self.data.train),
            ("data", "test", self.data.test), ("model", "width", self.model.width), ("training", "lr", self.training.lr),
            ("training", "threads", self.training.threads), ("model", "layers", self.model.layers),
            ("model", "heads", self.model.heads), ("data", "side", self.data.side), ("data", "context", self.data.context),
        ]  # fmt: skip
        how = self.training
        not_negative = [
            ("steps", how.steps), ("evaluate_every", how.evaluate_every), ("warmup", how.warmup),
            ("momentum", how.momentum), ("weight_decay", how.weight_decay), ("clip", how.clip),
        ]  # fmt: skip
        if not self.training.steps:
            positive.append(("training", "epochs", self.training.epochs))
        if self.sparsity is not None:
            choices.append(("sparsity", "solver", self.sparsity.solver, SOLVERS))
            try:
                parse_pattern(self.sparsity.pattern)
            except ValueError as error:
                raise RecipeError(f"{source}: [sparsity] {error}") from error
        for table, key, given, allowed in choices:
            if given not in allowed:
                raise RecipeError(f"{source}: [{table}] {key} = {given!r}: expected one of {', '.join(allowed)}")
        for table, key, number in positive:
            if not number > 0:
                raise RecipeError(f"{source}: [{table}] {key} = {number!r}: must be above 0")
        for key, number in not_negative:
            if not number >= 0:
                raise RecipeError(f"{source}: [training] {key} = {number!r}: must be 0 or more")
        for key, number in vars(how).items():
            if isinstance(number, float) and not math.isfinite(number):
                raise RecipeError(f"{source}: [training] {key} = {number!r}: must be a finite number")
        if abs(self.seed) >= LARGEST_SEED:
            raise RecipeError(f"{source}: seed = {self.seed}: must be below {LARGEST_SEED}")
        if (self.model.kind == "gpt") != (self.data.kind == "python-text"):
            raise RecipeError(f"{source}: the model 'gpt' and the data 'python-text' go together")
        if self.data.kind == "fashion-mnist" and self.data.side not in (28, 14, 7):
            raise RecipeError(f"{source}: [data] side = {self.data.side}: expected 28, 14 or 7")


def _typed(kind: type[Any], content: object, source: str, table: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{source}: {table} must be a table, not {content!r}")
    known = {entry.name: entry for entry in fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise RecipeError(f"{source}: {table} has no entry {key!r}; it has {', '.join(sorted(known))}")
        expected = str(known[key].type).removesuffix(" | None")
        if expected == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        fits = {"int": int, "float": float, "str": str, "bool": bool}.get(expected, dict)
        if not isinstance(value, fits) or (fits is int and isinstance(value, bool)):
            raise RecipeError(f"{source}: {table} {key} = {value!r}: expected {expected}")
        arguments[key] = value
    return arguments


def _change(content: dict[str, Any], change: str) -> None:
    where, found, text = change.partition("=")
    *tables, key = (part.strip() for part in where.split("."))
    if not found or not key or len(tables) > 1:
        raise RecipeError(f"{change!r} changes no entry of a recipe: expected ENTRY=VALUE, such as training.steps=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = content
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{change!r}: {name!r} is no table of the recipe")
    table[key] = value


def read_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        changes: entries to set instead of the file's, such as ``training.steps=20`` or ``seed=1``, values as in TOML; a text may
            lack its quotes.

    Raises:
        RecipeError: the file is no TOML, or it or the changes hold entries that no recipe has.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as TOML: {error}") from error
    for change in changes:
        _change(content, change)
    recipe = Recipe.from_dict(content, str(path))
    if recipe.model.start and not Path(recipe.model.start).is_absolute():
        model = ModelRecipe(**asdict(recipe.model) | {"start": str((path.parent / recipe.model.start).resolve())})
        recipe = Recipe(recipe.name, recipe.seed, model, recipe.data, recipe.training, recipe.sparsity)
    return recipe
