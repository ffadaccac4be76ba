"""`GradientRule`: how weights off the mask are updated, and when a mask may change, as one value.

A rule is passed to ``sparsify_(rule=...)`` by name or as a value, so that rules can be compared with everything else equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bisparse.training.decay import AnnealedDecay, FixedDecay
from bisparse.training.layer import SparseLayer
from bisparse.training.mask_search import Score

__all__ = ["RULES", "GradientRule", "StickyScore", "parse_rule"]

METHODS = ("ste", "sr-ste", "masked-decay", "s-ste")


@dataclass(frozen=True)
class GradientRule:
    """How pruned weights are updated in a dynamic run.

    >>> sparsify_(model, "4:8-T", rule="ast", steps=1000)  # doctest: +SKIP
    >>> GradientRule("masked-decay", decay=3.0, margin=0.1)
    GradientRule(method='masked-decay', decay=3.0, margin=0.1)
    """

    method: str = "masked-decay"
    """"ste", "sr-ste", "masked-decay" or "s-ste"; see `sparsify_`."""
    decay: float | FixedDecay | AnnealedDecay | None = None
    """Total decay over the run, or lambda itself; None: the default of the method and the optimizer."""
    margin: float = 0.0
    """Hysteresis: a new mask must gain more than this fraction of the scores that it gives up. Scores of kept weights are
    multiplied by 1 + margin before the search, so that the exact solver takes the cost of changes into account."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"GradientRule(method={self.method!r}): expected one of {', '.join(map(repr, METHODS))}")
        if isinstance(self.margin, bool) or not isinstance(self.margin, int | float) or not 0 <= self.margin < float("inf"):
            raise ValueError(f"GradientRule(margin={self.margin!r}): expected a number that is 0 or more")
        if self.method == "s-ste" and (self.margin or self.decay is not None):
            raise ValueError("GradientRule('s-ste') takes neither margin nor decay: its mask follows from the weights")
        if self.method == "ste" and self.decay is not None:
            raise ValueError("GradientRule('ste') takes no decay: use 'masked-decay' or 'sr-ste'")


RULES: dict[str, GradientRule] = {
    "ste": GradientRule("ste"),
    "sr-ste": GradientRule("sr-ste"),
    "masked-decay": GradientRule("masked-decay"),
    "s-ste": GradientRule("s-ste"),
    "ast": GradientRule("masked-decay", decay=AnnealedDecay(4e-4)),
    "hysteresis": GradientRule("masked-decay", margin=0.1),
}
"""Rules by name. "ast": decay that grows linearly over the run (Huang et al. 2024), with Zhou et al.'s 2e-4 as mean."""


def parse_rule(rule: str | GradientRule) -> GradientRule:
    """The rule of this name; a `GradientRule` is returned unchanged.

    Raises:
        ValueError: there is no rule of this name.
    """
    if isinstance(rule, GradientRule):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, RULES))}, or a GradientRule")
    return RULES[rule]


class StickyScore:
    """Scores raised by a margin for weights of the current mask. Equal to the plain scores until `layers` is set."""

    def __init__(self, score: Score, margin: float) -> None:
        self.score, self.margin = score, margin
        self.layers: Mapping[str, SparseLayer] = {}

    def __call__(self, name: str, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        scores, layer = self.score(name, weight), self.layers.get(name)
        if layer is None or not layer.active or _all_kept(layer):
            return scores
        mask = layer.mask.to(scores.device)
        wide = torch.promote_types(scores.dtype, torch.float32)  # 1 + margin may be 1 in bfloat16
        return scores.to(wide) * (1 + self.margin * mask.to(wide))


def _all_kept(layer: SparseLayer) -> bool:
    """Whether the layer is in a dense phase, in which there is no mask to prefer."""
    own = layer.parametrization
    return own is not None and own.dense
