"""A training experiment as a value: model, data, training and sparsity. It also identifies its row in the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bisparse.training.decay import DEFAULT_DECAY, DEFAULT_DECAY_ADAM

__all__ = ["DataRecipe", "ModelRecipe", "Recipe", "RecipeError", "SparsityRecipe", "TrainingRecipe"]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says why."""


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
    """Folder of a run whose final dense weights are the start, as static sparsity needs."""


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
    rule: str = ""
    """Instead of the method and its decay: a rule by its name in `bisparse.training.RULES`."""
    solver: str = "exact"
    refresh: int = 40
    decay: float | None = None
    """Lambda. Left out: Zhou et al.'s, or what a sweep with AdamW gave, which is then written down here."""
    total_decay: float = 0.0
    """Instead: the decay over the whole run, lambda times the sum of learning rates."""
    dense_first: float = 0.0
    """Share of the steps that are dense at the start."""
    frozen_from: float = 1.0
    """Share of the steps after which masks stay as they are."""
    dense_last: float = 0.0
    """Share of the steps that are dense at the end."""
    mvue: bool = False
    patterns: dict[str, str] = field(default_factory=dict)
    """Patterns of single layers by glob."""
    scale_lr: bool = False
    """Divide the learning rate of sparse weights by their density (`bisparse.training.parameter_groups`)."""
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
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """The inverse of `as_dict`; entries that are missing (older rows) have their defaults."""
        tables = {"model": ModelRecipe, "data": DataRecipe, "training": TrainingRecipe, "sparsity": SparsityRecipe}
        nested = {key: table(**content[key]) for key, table in tables.items() if content.get(key) is not None}
        return cls(**{**content, **nested})
