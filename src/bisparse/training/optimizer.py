"""What sparse training asks of an optimizer: which weights it holds, its decay, and whether it takes this step."""

from __future__ import annotations

from torch.optim import Optimizer

from bisparse.training.layer import SparseLayer

__all__ = ["DEFAULT_DECAY", "DEFAULT_DECAY_ADAM", "Attached", "default_decay", "skipped_by_scaler", "unwrapped"]

DEFAULT_DECAY = 2e-4
"""Decay where none is given: Zhou et al.'s lambda."""
DEFAULT_DECAY_ADAM = 2e-3
"""Masked decay where none is given and the optimizer divides gradients by their size, as Adam does: on a small GPT it nearly
halved the flip rate and lowered the loss at each seed (docs/benchmarks.md). What is right grows with the gradients: watch the
flip rate."""


class Attached:
    """An optimizer that is followed, and the sparse layers whose weights it holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._parameters = -1
        self._layers: list[SparseLayer] = []

    def held(self, layers: list[SparseLayer]) -> list[SparseLayer]:
        """Those of `layers` that the optimizer holds now: layers that thaw join it while it trains."""
        parameters = sum(len(group["params"]) for group in self.optimizer.param_groups)
        if parameters != self._parameters:
            held = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
            self._parameters, self._layers = parameters, [layer for layer in layers if id(layer.weight) in held]
        return self._layers


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
