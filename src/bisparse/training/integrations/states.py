"""The state that trainers' callbacks save: that of the sparsity, and what identifies its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bisparse.training.distill import Distillation
from bisparse.training.sparsity import Sparsity

__all__ = ["joined_state", "load_joined", "set_run_length"]

DISTILL = "distill"
RUN = "run"
"""The step at which the trainer's run began, and the one at which it ends, where the callback found them."""


def set_run_length(sparsity: Sparsity, total: int | None, done: int) -> None:
    """Set the number of steps of a trainer's run, unless it was given to `sparsify_`; call it once a state is loaded.

    A run that does not continue another one begins at the current step, with all of its total decay to come.

    Args:
        total: optimizer steps of the trainer's run; None if unknown.
        done: how many of them are done; more than 0 for a run that is resumed.
    """
    decay = sparsity.run_decay
    if sparsity.steps is not None and decay.start is None:
        return
    over = sparsity.steps is not None and sparsity.step >= sparsity.steps
    if done == 0 or (over and total is not None and done < total):
        decay.start = sparsity.step - done
        decay.done.clear()
    elif decay.start is None:
        decay.start = 0
    sparsity.steps = None if total is None else decay.start + total


def joined_state(sparsity: Sparsity, distill: Distillation | None) -> dict[str, Any]:
    """The state of a sparsity, with that of its teacher under one key, and its run's steps under another."""
    start = sparsity.run_decay.start
    run = {} if start is None else {RUN: [start, sparsity.steps]}
    return sparsity.state_dict() | run | ({} if distill is None else {DISTILL: distill.state_dict()})


def load_joined(state: Mapping[str, Any], sparsity: Sparsity, distill: Distillation | None) -> None:
    """Load what `joined_state` returned.

    Raises:
        ValueError: the state is of another run, of one with another teacher, or only one of both has a teacher.
    """
    if distill is not None:
        distill.load_state_dict(state.get(DISTILL, {}))
    elif DISTILL in state:
        raise ValueError("the checkpoint is of a run with a teacher: pass distill= to the callback")
    sparsity.load_state_dict({name: value for name, value in state.items() if name not in (DISTILL, RUN)})
    if sparsity.steps is None or sparsity.run_decay.start is not None:
        sparsity.run_decay.start, sparsity.steps = state.get(RUN, (0, None))
