"""The history of a run's masks: the means over layers at each measured refresh, thinned to a bounded number of points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from typing import Any

from bisparse.results import MAX_HISTORY, MaskPoint, check_history
from bisparse.training.metrics import MaskChange, mean_change

__all__ = ["history_from_state", "history_state", "record"]


def record(points: list[MaskPoint], changes: Iterable[MaskChange]) -> None:
    """Append the means of a refresh to a history; beyond `MAX_HISTORY` points, the one with the closest neighbours is dropped.

    First and last point stay. Which point is dropped follows from the points alone, so that a resumed run has the history of an
    uninterrupted one. A second refresh at the same step is left out.

    Args:
        changes: of the layers that were refreshed.
    """
    changes = list(changes)
    if not any(change.size for change in changes):
        return
    mean = mean_change(changes)
    if points and mean.step <= points[-1].step:
        return
    rates = (min(1.0, rate) for rate in (mean.flip_rate, mean.retained, mean.changed_tiles))  # a mean may round to above 1
    points.append(MaskPoint(mean.step, *rates))
    if len(points) > MAX_HISTORY:
        del points[min(range(1, len(points) - 1), key=lambda place: points[place + 1].step - points[place - 1].step)]


def history_state(points: Sequence[MaskPoint]) -> list[list[float]]:
    """A history as lists of numbers, for `Sparsity.state_dict`."""
    return [list(astuple(point)) for point in points]


def history_from_state(state: Any, step: int) -> list[MaskPoint]:
    """The history in a state of a run.

    Args:
        state: the result of `history_state`.
        step: optimizer steps of the run.

    Raises:
        ValueError: it is none.
    """
    names = [field.name for field in fields(MaskPoint)]
    try:
        lists = (list, tuple)
        if not isinstance(state, lists) or not all(isinstance(one, lists) and len(one) == len(names) for one in state):
            raise ValueError(f"history={state!r:.60}")
        points = [MaskPoint(*one) for one in state]
        check_history(points)
        if points and points[-1].step > step:
            raise ValueError(f"history: step {points[-1].step} of a run of {step} steps")
    except ValueError as error:
        raise ValueError(
            f"the checkpoint has {error}: expected a list of [{', '.join(names)}], in the order of the steps"
        ) from None
    return points
