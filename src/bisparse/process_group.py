"""A pruning job shared by the ranks of a process group: each takes a part of the calibration data and of the layers.

Every exchange begins with `Ranks.all`, in which a rank that fails says so: the others fail with it instead of waiting. A rank
that is stopped cannot say so: the others log that they wait, and fail once the group's timeout is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from bisparse.user_errors import ends_the_process, error_in_one_line

__all__ = ["DifferentJobsError", "OtherRankError", "Ranks"]

T = TypeVar("T")
FIRST_NOTICE_S = 30.0
"""Seconds that a rank waits for the others before it says so, and again after twice, four times, ... as long."""


class OtherRankError(RuntimeError):
    """Another rank of the job failed, has ended, or does not answer."""


class DifferentJobsError(ValueError):
    """The ranks of a group were called with different models, data or arguments."""


@dataclass(frozen=True)
class _Failed:
    message: str


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a job; one alone without a group.

    Raises:
        ValueError: what is given is no process group, or one that this rank is not in.
    """

    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.group is not None and not isinstance(self.group, ProcessGroup):
            raise ValueError(
                f"group={self.group!r:.60}: expected a process group that this rank is in, such as torch.distributed.group.WORLD "
                "once torch.distributed is initialized, or None"
            )

    @property
    def rank(self) -> int:
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def name(self, rank: int) -> int:
        """What a rank of the group is called in messages: its number among all processes."""
        return rank if self.group is None else torch.distributed.get_global_rank(self.group, rank)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this rank takes of the items: every `size`-th."""
        return items[self.rank :: self.size]

    def all(self, own: T) -> list[T]:
        """What every rank hands in, in their order.

        Raises:
            OtherRankError: a rank failed instead, has ended, or did not answer within the group's timeout.
        """
        found = self._gathered(own)
        if failed := {rank: one for rank, one in enumerate(found) if isinstance(one, _Failed)}:
            rank, failure = next(iter(failed.items()))
            raise OtherRankError(f"rank {self.name(rank)} failed: {failure.message}")
        return found

    def fail(self, error: BaseException) -> None:
        """Tell the others, who are at their next exchange, that this rank has failed.

        After SIGTERM the other ranks are not notified: it may have come in the middle of an exchange, and its sender ends all
        ranks.
        """
        if not isinstance(error, OtherRankError) and not ends_the_process(error):
            with suppress(OtherRankError):  # one that does not answer either; the first error counts
                self._gathered(_Failed(f"{type(error).__name__}: {error}"))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """While open, an error on this rank is an error on all; for a part without exchanges that ends before the next one."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def agree(self, own: Mapping[str, str]) -> None:
        """Check that all ranks describe their job alike; a description is short, such as an argument's text or a digest.

        Raises:
            DifferentJobsError: they do not; the same message on every rank.
        """
        first, *others = self.all(dict(own))
        for rank, other in enumerate(others, 1):
            for key in {**first, **other}:
                if first.get(key) != other.get(key):
                    raise DifferentJobsError(
                        f"{key} is {first.get(key, 'missing')} on rank {self.name(0)} and {other.get(key, 'missing')} on rank "
                        f"{self.name(rank)}: every rank needs the same model, data and arguments"
                    )

    def _gathered(self, own: Any) -> list[Any]:
        if self.group is None or self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        with self.exchange():
            torch.distributed.all_gather_object(found, own, group=self.group)
        return found

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """A context manager for a collective call: says when it has to wait, and turns the backend's errors into our own.

        Raises:
            OtherRankError: another rank has ended, or did not answer within the group's timeout.
        """
        done = threading.Event()
        begun, name = time.monotonic(), self.name(self.rank)
        watch = threading.Thread(target=_say_who_waits, args=(done, name), daemon=True)
        watch.start()
        try:
            yield
        except RuntimeError as error:
            raise OtherRankError(
                f"rank {name} has waited {time.monotonic() - begun:.0f} s for another rank, which has ended, or is stopped or "
                "busy for longer than the group's timeout (init_process_group(timeout=)): look at the state and log of each, "
                f"and start all of them again. It was: {error_in_one_line(error)}"
            ) from error
        finally:
            done.set()

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor by the one that a rank of the group has, in place."""
        with self.exchange():
            torch.distributed.broadcast(tensor, group=self.group, group_src=source)

    def sum_(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors by their sums over the ranks, in place; one that a rank lacks counts as zeros there."""
        if self.group is None or self.size == 1:
            return
        known = self.all({name: (tuple(one.shape), one.dtype, one.device.type) for name, one in tensors.items()})
        for name, (shape, dtype, device) in sorted({name: what for one in known for name, what in one.items()}.items()):
            if name not in tensors:
                tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
            with self.exchange():
                torch.distributed.all_reduce(tensors[name], group=self.group)


def _say_who_waits(done: threading.Event, rank: int) -> None:
    """Log that a rank waits, at growing intervals, until the exchange is done."""
    waited = 0.0
    while not done.wait(max(waited, FIRST_NOTICE_S)):
        waited += max(waited, FIRST_NOTICE_S)
        logging.getLogger("bisparse").warning(
            "rank %d has waited %.0f s for the other ranks: one of them may be stopped, or busy with work of its own",
            rank,
            waited,
        )
