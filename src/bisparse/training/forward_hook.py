"""The hook that refreshes masks before the first training forward pass that needs it, in eager and in compiled code.

The model that is evaluated, saved or finalized is the one that was trained: an optimizer step only marks a refresh as due, and
the next training forward pass does it. The hook is on every sparse layer and on every module that contains one, so that it runs
whichever of them is called, outermost first.

A forward pass trains if the called module is in training mode and gradients are recorded. The backward pass runs no refresh,
so that the forward passes that activation checkpointing repeats there see the masks of the first. If no such forward pass
came before the next optimizer step is done (layers trained in eval mode, or gradients written by hand), the refresh follows that
step. In compiled code the hook is traced: a step without a refresh adds only a guard to the graph, and a step with one has its
own graph, without a break, in which one operator does the refresh. A change of phase changes the code that runs, which a graph
cannot do, so compiled models change their phase directly after the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bisparse.training.parametrizations import masked_parameters

__all__ = ["RefreshHook", "Refreshed", "ZerosHook", "gathered_again", "remove_hooks"]


class Refreshed(Protocol):
    """The refresh that the hook runs, and its state."""

    due: bool
    """The next training forward pass refreshes the masks first."""
    handle: int
    """Its key for the operator in compiled code."""
    in_compiled_code: bool
    """The hook was traced by a compiler."""
    written: list[Tensor]
    """What a refresh writes, while one is due."""

    def refresh_due(self) -> None:
        """Run the refresh that is due."""


_REFRESHED: WeakValueDictionary[int, Refreshed] = WeakValueDictionary()


class RefreshHook:
    """A forward pre-hook, without effect until `refreshed` is set. In copies of the model it refreshes nothing, but lets
    layers that cache something derived from their mask update it; in the original that needs no hook."""

    copied = False

    def __init__(self, refreshed: Refreshed) -> None:
        self.refreshed: Refreshed | None = None
        _REFRESHED[refreshed.handle] = refreshed

    def __getstate__(self) -> dict[str, Any]:
        return {"refreshed": None, "copied": True}

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        refreshed = self.refreshed
        if refreshed is None:
            if self.copied and hasattr(module, "mask_changed"):
                _follow(module)
            return
        if torch.compiler.is_dynamo_compiling():
            _traced(refreshed.handle)
        if not module.training or not torch.is_grad_enabled() or not refreshed.due:
            return
        if torch.compiler.is_dynamo_compiling():
            torch.ops.bisparse.refresh_masks(refreshed.written, refreshed.handle)
            refreshed.due = False  # for the hooks that are traced after this one
        elif torch._C._current_graph_task_id() == -1:  # not in a backward pass
            refreshed.refresh_due()

    def install(self, modules: Iterable[nn.Module]) -> None:
        """Put the hook before all others of these modules: those of FSDP2 gather weights."""
        for module in modules:
            remove_hooks(module, self)
            module.register_forward_pre_hook(self, prepend=True)


class ZerosHook:
    """A forward pre-hook of a static run: the first forward pass after a step checks that pruned weights are still zero.

    An optimizer that wraps the attached one, such as Lookahead, may write weights after it. Compiled code does not check.
    """

    def __init__(self) -> None:
        self.check: Callable[[], None] | None = None
        self.unchecked = True

    def __getstate__(self) -> dict[str, Any]:
        return {"check": None, "unchecked": True}

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if self.check is not None and self.unchecked:
            self.unchecked = False
            self.check()

    def install(self, modules: Iterable[nn.Module]) -> None:
        """Put the hook before all others of these modules."""
        for module in modules:
            remove_hooks(module, self)
            module.register_forward_pre_hook(self, prepend=True)


def remove_hooks(module: nn.Module, own: RefreshHook | ZerosHook | None = None) -> None:
    """Remove one hook, and all without effect, from a module; all hooks of these kinds if none is named."""
    for key, hook in list(module._forward_pre_hooks.items()):
        idle = (isinstance(hook, RefreshHook) and hook.refreshed is None) or (isinstance(hook, ZerosHook) and hook.check is None)
        if hook is own or idle or (own is None and isinstance(hook, RefreshHook | ZerosHook)):
            del module._forward_pre_hooks[key]


@torch.compiler.disable
def _follow(module: nn.Module) -> None:
    with torch.no_grad():
        for _, _, _, own in masked_parameters(module):
            own.follow()


def gathered_again(modules: Iterable[nn.Module]) -> None:
    """Let FSDP2 free the weights that it gathered for an evaluation; what the optimizer holds are the shards."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.compiler.assume_constant_result
def _traced(handle: int) -> bool:
    """Runs once, when the compiler traces the hook."""
    if (refreshed := _REFRESHED.get(handle)) is not None:
        refreshed.in_compiled_code = True
    return True


@torch.library.custom_op("bisparse::refresh_masks", mutates_args=("written",))
def _refresh_masks(written: list[Tensor], handle: int) -> None:
    """Do the refresh that is due; a compiler may have replaced what it writes by copies."""
    refreshed = _REFRESHED[handle]
    originals = refreshed.written
    refreshed.refresh_due()
    for copied, original in zip(written, originals, strict=True):
        if copied.data_ptr() != original.data_ptr():
            copied.copy_(original)


@_refresh_masks.register_fake
def _(written: list[Tensor], handle: int) -> None:
    pass
