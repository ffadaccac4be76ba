"""Chains of blocks, found by data flow.

A chain is a list of modules, each called once, in order, with the same tensor object that the one before returned. Their other
arguments (masks, position embeddings) must not depend on earlier blocks, which is tested by perturbing the first block's output.
"""

from __future__ import annotations

import copy
import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.layers import Layer
from bisparse.pruning.calibration.hooks import call_model

__all__ = ["Call", "Chain", "argument_of", "dense_copy", "find_chains", "without"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
"""Types that a block may take in addition to tensors; any other object might carry state from call to call."""


@dataclass(frozen=True)
class Slot:
    """The position of the activations among a block's arguments and in its output."""

    argument: int | str
    element: int | str | None
    """Index or key of the activations in the output; None where the output is the tensor itself."""

    def of_output(self, output: Any) -> Tensor:
        found = output if self.element is None else output[self.element]
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True, eq=False)
class Chain:
    """Blocks that pass one tensor from each to the next."""

    name: str
    blocks: tuple[nn.Module, ...]
    slot: Slot
    members: dict[int, int]
    """Block number of every module inside, by id."""
    alike: bool = False
    """Whether all blocks take the same objects as their other arguments."""

    def holds(self, layer: Layer) -> bool:
        return id(layer.module) in self.members

    def block_of(self, layer: Layer) -> int:
        return self.members[id(layer.module)]


def dense_copy(module: nn.Module, dense: Callable[[Tensor], Tensor | None] | None) -> nn.Module:
    """A copy of a module with every tensor's value before pruning.

    Raises:
        ValueError: a module that cannot be copied, for example because it holds a tensor that was computed.
    """
    try:
        twin = copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"a block of type {type(module).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    if dense is not None:
        with torch.no_grad():
            for live, own in zip(_tensors(module), _tensors(twin), strict=True):
                if (before := dense(live)) is not None:
                    own.copy_(before)
    return twin


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass
class Call:
    """Arguments and return value of a module's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


def find_chains(
    model: nn.Module,
    layers: Sequence[Layer],
    calls: dict[str, int],
    batches: Sequence[Any],
    forward: Callable[..., Any] | None,
) -> list[Chain]:
    """The chains that hold layers, none inside another, in no particular order: those of each of these batches."""
    candidates = []
    for name, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1:
            if any(isinstance(block, torch.jit.ScriptModule) for block in container):
                continue  # these take no hooks that see the arguments
            members = {id(inner): index for index, block in enumerate(container) for inner in block.modules()}
            held = [layer for layer in layers if id(layer.module) in members]
            # A block that is also used elsewhere would have inputs that this chain does not see.
            if held and len({id(block) for block in container}) == len(container) and all(calls[x.name] == 1 for x in held):
                candidates.append((name, tuple(container), members, len(held)))
    chains: list[Chain] = []
    for name, blocks, members, _ in sorted(candidates, key=lambda one: (-one[3], len(one[0]))):
        if any(id(block) in chain.members for chain in chains for block in blocks):
            continue
        found = [_slot_of(model, blocks, batch, forward) for batch in batches]
        if (first := found[0]) and all(one and one[0] == first[0] for one in found):
            chains.append(Chain(name, blocks, first[0], members, all(one and one[1] for one in found)))
    return chains


def _record(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any, forward: Callable[..., Any] | None, disturb: Slot | None = None
) -> list[tuple[int, Call]]:
    log: list[tuple[int, Call]] = []
    number = {id(block): index for index, block in enumerate(blocks)}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        log.append((number[id(module)], Call(args, dict(kwargs))))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        index = number[id(module)]
        next(call for at, call in reversed(log) if at == index).output = output
        if disturb is not None and index == 0:
            activations = disturb.of_output(output)
            activations.add_(activations.abs().mean() + 1)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            call_model(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    return log


def _slot_of(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any, forward: Callable[..., Any] | None
) -> tuple[Slot, bool] | None:
    """The blocks' `Slot`, and whether their other arguments are all the same; None if they are not a chain."""
    log = _record(model, blocks, batch, forward)
    if [index for index, _ in log] != list(range(len(blocks))):
        return None
    slots = set()
    for (_, one), (_, following) in itertools.pairwise(log):
        slot = _handed_on(one.output, following)
        if slot is None:
            return None
        slots.add(slot)
    if len(slots) != 1:
        return None
    slot = slots.pop()
    first = log[0][1]
    if not isinstance(argument_of(first, slot.argument), Tensor):
        return None
    disturbed = _record(model, blocks, batch, forward, slot)
    if len(disturbed) != len(log):
        return None
    for (index, plain), (_, changed) in zip(log, disturbed, strict=True):
        if index and not _same_besides(plain, changed, slot.argument):
            return None
    others = [pytree.tree_flatten(without(call, slot.argument)) for _, call in log]
    alike = all(
        structure == others[0][1]
        and all(a is b or (isinstance(a, PLAIN) and a == b) for a, b in zip(leaves, others[0][0], strict=True))
        for leaves, structure in others
    )
    return slot, alike


def _handed_on(output: Any, call: Call) -> Slot | None:
    elements: list[tuple[int | str | None, Any]] = [(None, output)]
    if isinstance(output, tuple | list):
        elements = list(enumerate(output))
    elif isinstance(output, dict):
        elements = list(output.items())
    arguments: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    for element, value in elements:
        for argument, given in arguments:
            if isinstance(value, Tensor) and value is given:
                return Slot(argument, element)
    return None


def argument_of(call: Call, argument: int | str) -> Any:
    """One argument of a call, by position or keyword; None where it was not given."""
    if isinstance(argument, int):
        return call.args[argument] if argument < len(call.args) else None
    return call.kwargs.get(argument)


def without(call: Call, argument: int | str) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, with None for one of them."""
    args = [None if index == argument else value for index, value in enumerate(call.args)]
    return args, {key: None if key == argument else value for key, value in call.kwargs.items()}


def _same_besides(one: Call, other: Call, argument: int | str) -> bool:
    leaves, structure = pytree.tree_flatten(without(one, argument))
    others, other_structure = pytree.tree_flatten(without(other, argument))
    if structure != other_structure:
        return False
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor):
            if not (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)):
                return False
        elif not isinstance(a, PLAIN) or a != b:
            return False
    return True
