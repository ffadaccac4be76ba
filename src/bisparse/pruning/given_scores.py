"""Prunes by the caller's scores: keeps the mask of largest total score, and leaves kept weights unchanged. Needs no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Real
from torch import Tensor

from bisparse.layers import Layer, by_layer
from bisparse.pruning.fingerprint import fingerprint
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.tiles import to_matrices

__all__ = ["GivenScores", "Scores", "methods_of"]

Scores: TypeAlias = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor]
"""Scores of the weight's shape, by the name of the layer or its parameter, or as a function of a layer's name and weight."""


@dataclass(frozen=True, repr=False, eq=False)
class GivenScores(Method):
    """Keep the weights of one layer with the largest total of the given scores."""

    scores: Real[Tensor, "B O I"]

    def __repr__(self) -> str:
        return f"scores({fingerprint(self.scores)})"

    @property
    def name(self) -> str:
        return "scores"

    def prune(self, problem: LayerProblem) -> Pruned:
        return Pruned(problem.solve(self.scores))


def methods_of(layers: Sequence[Layer], scores: Scores) -> list[Method]:
    """A `GivenScores` method per layer.

    Raises:
        ValueError: scores of a layer that is not pruned, a layer without scores, or scores that are not a tensor of the weight's
            shape.
    """
    if isinstance(scores, str):
        raise ValueError(f"scores={scores!r:.60}: scores are a dict or a function; a method by its name is method={scores!r:.60}")
    if not isinstance(scores, Mapping) and not callable(scores):
        raise ValueError(f"scores={scores!r:.60}: expected a dict {{layer name: tensor}} or a function (name, weight) -> tensor")
    if isinstance(scores, Mapping):
        scores = by_layer("scores", scores, [layer.name for layer in layers])
    return [GivenScores(_of_layer(layer, scores)) for layer in layers]


def _of_layer(layer: Layer, scores: Scores) -> Tensor:
    weight = layer.weight.detach()
    found = scores[layer.name] if isinstance(scores, Mapping) else scores(layer.name, weight.clone())
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"{layer.name}: scores= gives {given}; expected a tensor of the weight's shape {tuple(weight.shape)}")
    matrices: Tensor = to_matrices(found.detach().to(weight.device), layer.layout)
    return matrices
