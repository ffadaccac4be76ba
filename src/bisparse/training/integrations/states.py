"""The state that trainers' callbacks save: that of the sparsity, and what identifies its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bisparse.training.distill import Distillation
from bisparse.training.sparsity import Sparsity

__all__ = ["joined_state", "load_joined"]

DISTILL = "distill"


def joined_state(sparsity: Sparsity, distill: Distillation | None) -> dict[str, Any]:
    """The state of a sparsity, with that of its teacher under one key."""
    return sparsity.state_dict() | ({} if distill is None else {DISTILL: distill.state_dict()})


def load_joined(state: Mapping[str, Any], sparsity: Sparsity, distill: Distillation | None) -> None:
    """Load what `joined_state` returned.

    Raises:
        ValueError: the state is of another run, of one with another teacher, or only one of both has a teacher.
    """
    if distill is not None:
        distill.load_state_dict(state.get(DISTILL, {}))
    elif DISTILL in state:
        raise ValueError("the checkpoint is of a run with a teacher: pass distill= to the callback")
    sparsity.load_state_dict({name: value for name, value in state.items() if name != DISTILL})
