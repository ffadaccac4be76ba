"""A call that can be paused and resumed, as a coroutine (greenlet).

A forward pass that is paused before a layer resumes with the new weights once that layer is pruned, so that pruning a block
stage by stage runs it once, not once per stage. With greenlet the model's code needs no change, and all runs in one thread.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch

from bisparse.errors import install_extra

__all__ = ["Paused"]

DEVICES = ("cpu", "cuda")


class _Ambient:
    """torch's thread-local modes (grad, autocast): a pass that pauses inside one must not leave it on for others."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES]

    def restore(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _greenlet() -> Any:
    try:
        from greenlet import greenlet
    except ImportError as error:
        raise ImportError(
            f"pruning stage by stage (order='sequential') needs greenlet; {install_extra('calibration')}"
        ) from error
    return greenlet


class Paused:
    """A call that may pause itself.

    Raises:
        ImportError: greenlet, of the extra `calibration`, is not installed.

    >>> steps = Paused(lambda: [steps.pause("first"), steps.pause("second")])
    >>> steps.resume(), steps.resume(), steps.resume(), steps.result
    ('first', 'second', None, [None, None])
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        """The return value, once the call has finished."""
        self._work = work
        self._greenlet = _greenlet()
        self._inner = self._greenlet(self._run)
        self._inner.gr_context = contextvars.copy_context()
        self._outside: _Ambient | None = None

    def _run(self) -> None:
        self.result = self._work()

    def resume(self) -> Any:
        """Run to the next pause and return the value passed to `pause`; None once the call has returned. Its errors propagate."""
        self._outside = _Ambient()
        self._inner.parent = self._greenlet.getcurrent()
        try:
            return self._inner.switch()
        finally:
            self._outside.restore()

    def pause(self, handed_out: Any) -> None:
        """Called by the paused code itself: return `handed_out` from `resume`, and wait for the next `resume`."""
        inside = _Ambient()
        self._inner.parent.switch(handed_out)
        inside.restore()

    @property
    def finished(self) -> bool:
        return bool(self._inner.dead)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors in local variables of the paused call, each storage counted once."""
        storages: dict[int, int] = {}
        frame = None if self.finished else self._inner.gr_frame
        while frame is not None:
            for value in list(frame.f_locals.values()):
                for one in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(one, torch.Tensor) and one.layout is torch.strided:
                        storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            frame = frame.f_back
        return sum(storages.values())

    def stop(self) -> None:
        """Abandon a paused call: unwind it, running its ``finally`` clauses."""
        if self._inner and not self.finished:
            outside = _Ambient()
            self._inner.parent = self._greenlet.getcurrent()
            self._inner.throw()
            outside.restore()
