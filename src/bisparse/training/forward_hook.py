"""The hook that refreshes masks before the first training forward pass that needs it, in eager and in compiled code.

An optimizer step only marks a refresh as due, and the next training forward pass does it, so that the model that is evaluated,
saved or finalized is the one that was trained. The hook is on every sparse layer and on every module that contains one, so that
it runs no matter which of them is called, outermost first.

A training forward pass is one in training mode with gradients recorded. No refresh runs in the backward pass, so that the forward
passes that activation checkpointing repeats there use the same masks; and none inside of `torch.func`, whose transforms refuse
writes to masks, and whose `functional_call` puts other tensors in the place of the weights. If there was no training forward pass
before the next optimizer step (layers trained in eval mode, or gradients written by hand), the refresh follows that step. In
compiled code the hook is traced: a step without a refresh adds only a guard to the graph, and a step with one has its own graph,
without a break, in which one operator does the refresh. A change of phase changes the code that runs, which a graph cannot do, so
compiled models change their phase directly after the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bisparse.training.layer import SparseLayer
from bisparse.training.parametrizations import masked_parameters

__all__ = ["RefreshHook", "Refreshed", "ZerosHook", "gathered_again", "remove_hooks"]


class Refreshed(Protocol):
    """The object that the hook refreshes."""

    due: bool
    """Whether the next training forward pass starts with a refresh."""
    handle: int
    """Key by which the operator in compiled code finds it."""
    in_compiled_code: bool
    """Whether a compiler has traced the hook."""
    written: list[Tensor]
    """The tensors that a refresh writes, while one is due."""

    @property
    def attached(self) -> Sequence[Optimizer]:
        """The optimizers that train its weights."""

    def refresh_due(self) -> None:
        """Run the refresh that is due."""


_REFRESHED: WeakValueDictionary[int, Refreshed] = WeakValueDictionary()


class RefreshHook:
    """A forward pre-hook that runs a due refresh; it does nothing until `refreshed` is set. In copies of the model it does not
    refresh masks, but updates layers that cache something derived from their mask; the original does not need a hook for that."""

    copied = False

    def __init__(self, refreshed: Refreshed) -> None:
        self.refreshed: Refreshed | None = None
        self._weights: list[tuple[SparseLayer, ref[Tensor]]] = []
        _REFRESHED[refreshed.handle] = refreshed

    def __getstate__(self) -> dict[str, Any]:
        return {"refreshed": None, "copied": True, "_weights": []}

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
        elif torch._C._current_graph_task_id() == -1 and not self._others_in_place(refreshed):  # not in a backward pass
            refreshed.refresh_due()

    def _others_in_place(self, refreshed: Refreshed) -> bool:
        """Whether other tensors are in the place of weights for now, or a transform of `torch.func` runs."""
        if torch._C._are_functorch_transforms_active():
            return True
        # FSDP2 has a different parameter in its place at different times.
        pairs = ((layer.weight, own) for layer, attached in self._weights if (own := attached()) is not None)
        others = [weight for weight, own in pairs if weight is not own and not isinstance(own, DTensor)]
        if not others:
            return False
        held = {id(one) for optimizer in refreshed.attached for group in optimizer.param_groups for one in group["params"]}
        return any(id(weight) not in held for weight in others)

    def install(self, modules: Iterable[nn.Module], layers: Iterable[SparseLayer] = ()) -> None:
        """Install the hook before all other hooks of these modules, since FSDP2's hooks gather weights.

        Args:
            layers: those whose masks are refreshed.
        """
        self._weights = [(layer, ref(layer.weight)) for layer in layers]
        for module in modules:
            remove_hooks(module, self)
            module.register_forward_pre_hook(self, prepend=True)


class ZerosHook:
    """A forward pre-hook of static runs: pruned weights that something else has written to are set to zero again.

    `load_state_dict` may, or an optimizer that wraps the attached one, such as Lookahead. Compiled code does not check.
    """

    def __init__(self) -> None:
        self.check: Callable[[], None] | None = None
        self.undo_writes: Callable[[nn.Module], None] | None = None
        self.unchecked = True

    def __getstate__(self) -> dict[str, Any]:
        return {"check": None, "undo_writes": None, "unchecked": True}

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        if self.check is not None and self.unchecked:
            self.unchecked = False
            self.check()
        if self.undo_writes is not None:
            self.undo_writes(module)

    def install(self, modules: Iterable[nn.Module]) -> None:
        """Install the hook before all other hooks of these modules."""
        for module in modules:
            remove_hooks(module, self)
            module.register_forward_pre_hook(self, prepend=True)


def remove_hooks(module: nn.Module, own: RefreshHook | ZerosHook | None = None) -> None:
    """Remove a hook and all inactive ones from a module; without `own`, all hooks of these kinds."""
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
    """Make FSDP2 free the weights that it gathered for an evaluation, so that the modules have the optimizer's shards."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.compiler.assume_constant_result
def _traced(handle: int) -> bool:
    """Note that the compiler traces the hook; runs once, at compile time."""
    if (refreshed := _REFRESHED.get(handle)) is not None:
        refreshed.in_compiled_code = True
    return True


@torch.library.custom_op("bisparse::refresh_masks", mutates_args=("written",))
def _refresh_masks(written: list[Tensor], handle: int) -> None:
    """Run the due refresh, and copy its results to `written`, which the compiler may have replaced by copies."""
    refreshed = _REFRESHED[handle]
    originals = refreshed.written
    refreshed.refresh_due()
    for copied, original in zip(written, originals, strict=True):
        if copied.data_ptr() != original.data_ptr():
            copied.copy_(original)


@_refresh_masks.register_fake
def _(written: list[Tensor], handle: int) -> None:
    pass
