"""Warns when an optimizer that is not attached changes the weights of sparse layers.

Its steps are not counted, so the masks are never refreshed, dynamic runs add no decay, and static runs keep no zeros. That
happens when an optimizer is built again in the middle of a run, or when `attach` was forgotten. torch calls the hooks here at
each step of any optimizer in the process.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["Watched", "warn_of_unattached"]


class Watched(Protocol):
    """Sparse training whose weights are watched."""

    @property
    def attached(self) -> Sequence[Optimizer]:
        """The optimizers that it follows."""

    @property
    def weights(self) -> Sequence[Tensor]:
        """The parameters that it trains sparse now; none once it has ended."""

    def __hash__(self) -> int: ...


_WATCHED: WeakSet[Watched] = WeakSet()
_VERSIONS: WeakKeyDictionary[Optimizer, list[tuple[Watched, int, list[tuple[Tensor, int]]]]] = WeakKeyDictionary()
_STEPS: WeakKeyDictionary[Watched, int] = WeakKeyDictionary()
"""How many steps of attached optimizers there were: a wrapper's own step contains one."""


def warn_of_unattached(sparsity: Watched) -> None:
    """Warn once, at the end of a step, if an optimizer that is not attached has changed weights of this `Sparsity`."""
    _WATCHED.add(sparsity)
    _STEPS[sparsity] = 0
    _install()


@cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _WATCHED:
        return
    others = [one for one in list(_WATCHED) if not any(own is optimizer for own in one.attached)]
    if not others:
        return
    own = {id(weight) for group in getattr(optimizer, "param_groups", ()) for weight in group["params"]}
    noted = []
    for sparsity in others:
        versions = [(weight, weight._version) for weight in sparsity.weights if id(weight) in own and not weight.is_inference()]
        if versions:
            noted.append((sparsity, _STEPS[sparsity], versions))
    if noted:
        _VERSIONS[optimizer] = noted


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for sparsity in list(_WATCHED):
        if any(one is optimizer for one in sparsity.attached):
            _STEPS[sparsity] += 1
    for sparsity, steps, versions in _VERSIONS.pop(optimizer, ()):
        changed = sum(weight._version != before for weight, before in versions)
        if not changed or _STEPS[sparsity] != steps:
            continue
        _WATCHED.discard(sparsity)
        follows = ", ".join(type(one).__name__ for one in sparsity.attached) or "no optimizer"
        kind = type(optimizer).__name__
        weights = f"{changed} sparse weight{'' if changed == 1 else 's'}"
        warnings.warn(
            f"{kind} has changed {weights} but is not attached, so its steps do not refresh masks, add decay or keep pruned "
            f"weights at zero ({sparsity!r} is attached to {follows}). If this {kind} replaces another optimizer, call "
            "sparsity.detach() and sparsity.attach(optimizer); if several optimizers train the model, attach them all at once",
            stacklevel=3,
        )
