"""`RunDecay`: the decay of pruned weights over a dynamic run, layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch.optim import Optimizer

from bisparse.training.decay import Decay, TotalDecay, decay_rate, is_total
from bisparse.training.gradient_rules import decay_pruned
from bisparse.training.optimizer import Held, divides_gradients, learning_rate

__all__ = ["RunDecay"]


class RunDecay:
    """Adds masked decay to gradients, or takes SR-STE's step on the weights, with each layer's own lambda.

    A total of masked decay with optimizers that divide gradients by their size, such as Adam, is a step on the weights, too.

    Args:
        method: the method of the run; "ste" and "s-ste" do not decay.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self.done: dict[str, TotalDecay] = {}
        """By layer name, what a total decay has done so far."""
        self._rates: dict[str, float] = {}
        self.start: int | None = None
        """The step at which the run of a trainer began whose callback set the number of steps; None if that was given."""

    def warn_if_over(self, decays: Iterable[Decay | None], step: int, steps: int | None) -> None:
        """Warn if the given number of steps is done, so that a total decay has nothing left for those to come."""
        over = steps is not None and step >= steps and self.start is None and self.method in ("masked-decay", "sr-ste")
        if over and any(is_total(one, steps) and one != 0 for one in decays):
            warnings.warn(
                f"the run of steps={steps} is over, so pruned weights do not decay any more: pass the steps of all runs together "
                "to sparsify_, or set a fixed lambda, sparsity.decay = FixedDecay(2e-4)",
                stacklevel=3,
            )

    def add(
        self, held: Iterable[Held], optimizer: Optimizer, given: Decay | None, step: int, steps: int | None, *, first: bool
    ) -> None:
        """Decay the pruned weights of layers that have gradients.

        Args:
            given: the decay of layers that have none of their own; None: the default.
            step: optimizer steps done, of `steps`; None if their number is not known.
            first: False when a closure is evaluated again in the same step, which continues with the same lambda.
        """
        if not (self.method == "masked-decay" or (self.method == "sr-ste" and first)):
            return
        held = list(held)
        adaptive = self.method == "masked-decay" and any("betas" in group for group in optimizer.param_groups)
        divides = self.method == "masked-decay" and divides_gradients(optimizer)
        for one in held if first else ():
            self._rates[one.layer.name] = decay_rate(
                one.layer.decay_or(given),
                self.done,
                one.layer.name,
                step,
                steps,
                learning_rate=float(learning_rate(one.group)),
                adaptive=adaptive,
            )
        inside: list[Held] = []
        outside: list[Held] = []
        for one in held:
            # Adam would divide a total by the size of the gradients: it is outside of the moments, as AdamW's weight decay.
            total = divides and is_total(one.layer.decay_or(given), steps)
            (outside if total else inside).append(one)
        decay_pruned(self.method, self._rates, inside, optimizer)
        if first:
            decay_pruned("sr-ste", self._rates, outside, optimizer)
