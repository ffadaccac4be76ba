"""The decay of pruned weights: as a total over the run, or by a fixed lambda.

Masked decay adds ``lambda * w`` to the gradient of a pruned weight, so that a step of SGD shrinks it by ``lr * lambda``. The
relevant quantity is the total over the run, lambda times the sum of learning rates: a lambda that settles the masks of a long run
has no effect in a short one. A plain number is therefore this total, spread equally over the steps for any learning rate
schedule: ``lambda = remaining / (steps left * lr)``, but at most `MAX_OVER_PEAK` times its value at the largest rate so far.
With Adam and other optimizers that divide gradients by their size, such as RMSprop and Muon, a total is applied to the weights
themselves, outside of the moments, as AdamW applies weight decay. With SGD it is part of the gradient, so that momentum
multiplies it (by 10 at 0.9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bisparse.arguments import is_number

__all__ = [
    "DEFAULT_DECAY",
    "DEFAULT_DECAY_ADAM",
    "DEFAULT_TOTAL",
    "AnnealedDecay",
    "Decay",
    "FixedDecay",
    "TotalDecay",
    "decay_rate",
    "is_total",
]

DEFAULT_DECAY = 2e-4
"""Default lambda if the number of steps is not known: Zhou et al.'s."""
DEFAULT_DECAY_ADAM = 2e-3
"""The same of masked decay for optimizers that divide gradients by their size, such as Adam: on a small GPT it nearly halved the
flip rate and lowered the loss for each seed (docs/benchmarks)."""
DEFAULT_TOTAL = 5.0
"""Default total decay if the number of steps is known.

ResNet-20, 8,000 images of Fashion-MNIST at 14 x 14, 375 steps, 3 seeds, mean test accuracy at 4:8-T / 2:4-T / 16:32-T: total 3
85.73 / 85.42 / 85.49, 5 85.89 / 85.44 / 85.74, 10 85.98 / 85.38 / 85.81; lambda 2e-4 84.73 / 84.66 / 84.87; a fixed mask of
the random initial weights 85.58 / 85.50 / 85.62; dense 86.20. A small GPT by AdamW, 1000 steps, 3 seeds, 4:8-T, nats per byte
more than dense: total 5 outside of Adam .044 ± .017, 10 .042 ± .021, lambda 2e-3 inside .055 ± .023; a fixed mask .042 ± .021
(docs/benchmarks).
"""
MAX_OVER_PEAK = 4.0
"""Maximum factor by which a learning rate near zero (warm-up, end of a schedule) raises lambda; later steps compensate."""


@dataclass(frozen=True)
class FixedDecay:
    """The same decay factor, SR-STE's lambda, in every step, independent of the run's length; Zhou et al. use 2e-4.

    >>> sparsify_(model, "4:8-T", decay=FixedDecay(2e-4))  # doctest: +SKIP
    """

    rate: float

    def __post_init__(self) -> None:
        if not (is_number(self.rate) and 0 <= self.rate < float("inf")):
            raise ValueError(f"FixedDecay({self.rate!r}): expected a number that is 0 or more")


@dataclass(frozen=True)
class AnnealedDecay:
    """A lambda that grows linearly from `start` to `rate` over the run (AST, Huang et al. 2024); the run's length must be known.

    >>> AnnealedDecay(4e-4).at(50, 100)
    0.0002
    """

    rate: float
    start: float = 0.0

    def __post_init__(self) -> None:
        if not all(is_number(one) and 0 <= one < float("inf") for one in (self.rate, self.start)):
            raise ValueError(f"AnnealedDecay({self.rate!r}, start={self.start!r}): expected numbers that are 0 or more")

    def at(self, step: int, steps: int) -> float:
        """Lambda of step number `step` (from 0) of `steps`."""
        return self.start + (self.rate - self.start) * min(1.0, step / steps)


Decay = float | FixedDecay | AnnealedDecay
"""A total over the run, or lambda itself."""


class TotalDecay:
    """Lambda in each step of a run, such that lambda times the learning rate sums to `total`.

    Args:
        total: the sum over the run.
        steps: optimizer steps of the run.
    """

    def __init__(self, total: float, steps: int) -> None:
        self.total, self.steps = total, steps
        self.done = self.peak = 0.0

    @classmethod
    def resumed(cls, state: Sequence[float], given: object) -> TotalDecay:
        """Restore the state of an earlier run: the decay done and the largest learning rate."""
        decay = cls(float(given) if isinstance(given, float | int) else DEFAULT_TOTAL, 0)
        decay.done, decay.peak = float(state[0]), float(state[1])
        return decay

    def rate(self, step: int, learning_rate: float) -> float:
        """Lambda of step number `step` (from 0); each call counts as a step. 0 after the last step, or at learning rate 0."""
        left = self.steps - step
        if left <= 0 or learning_rate <= 0:
            return 0.0
        self.peak = max(self.peak, learning_rate)
        per_step = max(0.0, self.total - self.done) / left
        own = min(per_step / learning_rate, MAX_OVER_PEAK * per_step / self.peak)
        self.done += own * learning_rate
        return own


def is_total(given: Decay | None, steps: int | None) -> bool:
    """Whether the decay is a total over the run: a number, or the default (None), where the number of steps is known."""
    return steps is not None and not isinstance(given, FixedDecay | AnnealedDecay)


def decay_rate(
    given: Decay | None,
    totals: dict[str, TotalDecay],
    name: str,
    step: int,
    steps: int | None,
    *,
    learning_rate: float,
    adaptive: bool,
) -> float:
    """Lambda of a layer at step number `step` (from 0) of `steps`; 0 for a decay over the whole run if `steps` is None.

    Args:
        given: the decay of the layer or the run; None: the default.
        totals: by layer name, what a total decay has done so far; this step is added.
        adaptive: masked decay with Adam or one of its variants.
    """
    if given is None:
        if steps is None:
            return DEFAULT_DECAY_ADAM if adaptive else DEFAULT_DECAY
        given = DEFAULT_TOTAL
    if isinstance(given, FixedDecay):
        return given.rate
    if steps is None:
        return 0.0
    if isinstance(given, AnnealedDecay):
        return given.at(step, steps)
    decay = totals.setdefault(name, TotalDecay(given, steps))
    decay.steps = steps
    return decay.rate(step, learning_rate)
