"""What sparse training asks of an optimizer: which weights it holds, its decay, and whether it takes this step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from bisparse.training.layer import SparseLayer

__all__ = [
    "DEFAULT_DECAY",
    "DEFAULT_DECAY_ADAM",
    "default_decay",
    "held_by",
    "skipped_by_scaler",
    "unwrapped",
    "why_not_followed",
]

DEFAULT_DECAY = 2e-4
"""Decay where none is given: Zhou et al.'s lambda."""
DEFAULT_DECAY_ADAM = 2e-3
"""Masked decay where none is given and the optimizer divides gradients by their size, as Adam does: on a small GPT it nearly
halved the flip rate and lowered the loss at each seed (docs/benchmarks.md). What is right grows with the gradients: watch the
flip rate."""


class Held(NamedTuple):
    """A sparse layer whose weight an optimizer holds."""

    layer: SparseLayer
    weight: Tensor
    """The parameter, looked up once."""
    group: dict[str, Any]
    """The parameter group that has it."""


def held_by(optimizer: Optimizer, layers: Iterable[SparseLayer]) -> list[Held]:
    """Those of `layers` whose weight the optimizer holds now; groups may change at any step."""
    groups = {id(held): group for group in optimizer.param_groups for held in group["params"]}
    pairs = ((layer, layer.weight) for layer in layers)
    return [Held(layer, weight, group) for layer, weight in pairs if (group := groups.get(id(weight))) is not None]


def why_not_followed(optimizer: Optimizer, method: str) -> str | None:
    """Why sparse training cannot follow an optimizer; None if it can."""
    kind = type(optimizer).__name__
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return f"{kind} has no step hooks: its __init__ must call super().__init__(params, defaults) of torch.optim.Optimizer"
    if method == "sr-ste" and any("lr" not in group for group in optimizer.param_groups):
        return f'method="sr-ste" decays by the learning rate, and a parameter group of {kind} has no "lr": use "masked-decay"'
    return None


def default_decay(optimizer: Optimizer) -> float:
    """The masked decay of an optimizer where none is given: Adam and its kin have `betas`."""
    return DEFAULT_DECAY_ADAM if any("betas" in group for group in optimizer.param_groups) else DEFAULT_DECAY


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a trainer's wrapper, such as accelerate's."""
    if not isinstance(optimizer, Optimizer) and not isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise ValueError(f"attach() needs a torch.optim.Optimizer, not {type(optimizer).__name__}")
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was told by GradScaler to skip this step; others are not called at all then."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
