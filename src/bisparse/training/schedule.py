"""The schedule of the dense, sparse and frozen phases of a run, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from bisparse.arguments import is_number

__all__ = ["Phase", "Schedule"]


class Phase(StrEnum):
    """Which weights the forward pass uses, and whether masks change."""

    DENSE = "dense"
    SPARSE = "sparse"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Schedule:
    """When a dynamic run of `sparsify_` is dense, sparse or frozen, in optimizer steps; by default sparse throughout.

    Dense: the masks are not applied. Sparse: they are applied, and found again every `refresh` steps. Frozen: they are applied,
    and no longer change.

    >>> schedule = Schedule(dense_until=100, freeze_at=800, dense_from=900)
    >>> [str(schedule.phase(step)) for step in (0, 100, 800, 900)]
    ['dense', 'sparse', 'frozen', 'dense']
    """

    dense_until: int = 0
    """The first `dense_until` optimizer steps are dense."""
    freeze_at: int | None = None
    """After this many steps, masks no longer change; None: they change to the end."""
    dense_from: int | None = None
    """After this many steps, the rest of the run is dense, and so is the trained model; None: it ends sparse."""

    def __post_init__(self) -> None:
        marks = [("dense_until", self.dense_until), ("freeze_at", self.freeze_at), ("dense_from", self.dense_from)]
        given = [(name, mark) for name, mark in marks if mark is not None]
        for name, mark in given:
            if not isinstance(mark, int) or mark < 0:
                raise ValueError(f"Schedule({name}={mark!r}): expected a number of optimizer steps, 0 or more")
        for (first, low), (second, high) in pairwise(given):
            if low > high:
                raise ValueError(f"Schedule({first}={low}, {second}={high}): {first} must not come after {second}")

    @classmethod
    def shares(
        cls, total_steps: int, *, dense_first: float = 0.0, frozen_from: float | None = None, dense_last: float = 0.0
    ) -> Schedule:
        """Make a schedule from fractions of a run of `total_steps` optimizer steps.

        >>> Schedule.shares(1000, dense_first=0.1, dense_last=0.2)
        Schedule(dense_until=100, freeze_at=None, dense_from=800)
        """
        shares = {"dense_first": dense_first, "frozen_from": frozen_from, "dense_last": dense_last}
        for name, share in shares.items():
            if share is not None and not (is_number(share) and 0.0 <= share <= 1.0):
                raise ValueError(f"Schedule.shares({name}={share!r}): expected a fraction between 0 and 1")
        if not is_number(total_steps) or total_steps < 1:
            raise ValueError(f"Schedule.shares(total_steps={total_steps!r}): expected at least one optimizer step")
        return cls(
            dense_until=round(dense_first * total_steps),
            freeze_at=None if frozen_from is None else round(frozen_from * total_steps),
            dense_from=round((1 - dense_last) * total_steps) if dense_last else None,
        )

    def phase(self, step: int) -> Phase:
        """The phase of the forward pass after `step` optimizer steps."""
        if step < self.dense_until or (self.dense_from is not None and step >= self.dense_from):
            return Phase.DENSE
        return Phase.FROZEN if self.freeze_at is not None and step >= self.freeze_at else Phase.SPARSE
