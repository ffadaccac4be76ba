"""Chains of blocks, found by data flow, and run one block at a time with the activations between two blocks kept.

A chain is a list of modules in which each one is called once, in order, and is handed the very tensor that the one before
returned; whatever else the blocks are handed (masks, position embeddings) must not depend on the blocks before, which is
tested by disturbing the first block's output.
"""

from __future__ import annotations

import copy
import enum
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.layers import Layer
from bisparse.pruning.taps import LAST_PART, EnoughSeen, Seen, call_model, observed

__all__ = ["Chain", "ChainRun", "dense_copy", "find_chains"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
"""What a block may be handed besides tensors; any other object might carry state from call to call."""


@dataclass(frozen=True)
class Slot:
    """Where a block takes its activations, and where its output has them."""

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

    def holds(self, layer: Layer) -> bool:
        return id(layer.module) in self.members

    def block_of(self, layer: Layer) -> int:
        return self.members[id(layer.module)]


def dense_copy(module: nn.Module, dense: Callable[[Tensor], Tensor | None] | None) -> nn.Module:
    """A copy of a module with every tensor as it was before anything was pruned."""
    twin = copy.deepcopy(module)
    if dense is not None:
        with torch.no_grad():
            for live, own in zip(_tensors(module), _tensors(twin), strict=True):
                if (before := dense(live)) is not None:
                    own.copy_(before)
    return twin


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


def find_chains(
    model: nn.Module,
    layers: Sequence[Layer],
    calls: dict[str, int],
    batch: Any,
    forward: Callable[..., Any] | None,
) -> list[Chain]:
    """The chains that hold layers, none inside another, in no particular order."""
    candidates = []
    for name, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1:
            members = {id(inner): index for index, block in enumerate(container) for inner in block.modules()}
            held = [layer for layer in layers if id(layer.module) in members]
            # A block that is used again elsewhere would be run with inputs this chain does not know.
            if held and len({id(block) for block in container}) == len(container) and all(calls[x.name] == 1 for x in held):
                candidates.append((name, tuple(container), members, len(held)))
    chains: list[Chain] = []
    for name, blocks, members, _ in sorted(candidates, key=lambda one: (-one[3], len(one[0]))):
        if any(id(block) in chain.members for chain in chains for block in blocks):
            continue
        if slot := _slot_of(model, blocks, batch, forward):
            chains.append(Chain(name, blocks, slot, members))
    return chains


def _record(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any, forward: Callable[..., Any] | None, disturb: Slot | None = None
) -> list[tuple[int, _Call]]:
    log: list[tuple[int, _Call]] = []
    number = {id(block): index for index, block in enumerate(blocks)}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        log.append((number[id(module)], _Call(args, dict(kwargs))))

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


def _slot_of(model: nn.Module, blocks: Sequence[nn.Module], batch: Any, forward: Callable[..., Any] | None) -> Slot | None:
    """Where the blocks hand activations on, or None where they are no chain."""
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
    if not isinstance(_argument(first, slot.argument), Tensor):
        return None
    disturbed = _record(model, blocks, batch, forward, slot)
    if len(disturbed) != len(log):
        return None
    for (index, plain), (_, changed) in zip(log, disturbed, strict=True):
        if index and not _same_besides(plain, changed, slot.argument):
            return None
    return slot


def _handed_on(output: Any, call: _Call) -> Slot | None:
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


def _argument(call: _Call, argument: int | str) -> Any:
    if isinstance(argument, int):
        return call.args[argument] if argument < len(call.args) else None
    return call.kwargs.get(argument)


def _without(call: _Call, argument: int | str) -> tuple[list[Any], dict[str, Any]]:
    args = [None if index == argument else value for index, value in enumerate(call.args)]
    return args, {key: None if key == argument else value for key, value in call.kwargs.items()}


def _same_besides(one: _Call, other: _Call, argument: int | str) -> bool:
    leaves, structure = pytree.tree_flatten(_without(one, argument))
    others, other_structure = pytree.tree_flatten(_without(other, argument))
    if structure != other_structure:
        return False
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor):
            if not (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)):
                return False
        elif not isinstance(a, PLAIN) or a != b:
            return False
    return True


class ChainRun:
    """A chain at work: the activations before the present block, for every batch, and the block itself."""

    def __init__(
        self,
        chain: Chain,
        model: nn.Module,
        data: Sequence[Any],
        forward: Callable[..., Any] | None,
        device: torch.device | str | None,
        keep_dense: bool,
        dense: Callable[[Tensor], Tensor | None] | None,
    ) -> None:
        self.chain = chain
        self.model = model
        self.data = data
        self.forward = forward
        self.device = None if device is None else torch.device(device)
        self.keep_dense = keep_dense
        self.dense = dense
        self.calls: list[list[_Call]] = []
        self.inputs: list[Tensor] = []
        self.dense_inputs: list[Tensor] = []
        self.current = 0
        self.dense_block: nn.Module | None = None
        self.differs = False
        """Whether the network up to here differs from the dense one: only then are there two streams."""
        self.forwards = 0

    @property
    def activation_bytes(self) -> int:
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self._tensors()}
        return sum(held.values())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.inputs
        yield from self.dense_inputs
        yield from (
            leaf
            for calls in self.calls
            for leaf in pytree.tree_leaves([_without(call, "") for call in calls])
            if isinstance(leaf, Tensor)
        )

    def start(self, reference: nn.Module | None) -> None:
        """Run every batch up to the chain, and note what each block is handed besides the activations."""
        for index, batch in enumerate(self.data):
            calls, inputs = self._handed(self.model, self.chain.blocks, batch, index)
            self.calls.append(calls)
            self.inputs.append(inputs)
            if self.keep_dense:
                dense = inputs
                if reference is not None:
                    dense = self._handed(reference, reference.get_submodule(self.chain.name), batch, index)[1]
                self.dense_inputs.append(dense)
        self.differs = reference is not None

    def _handed(self, model: nn.Module, blocks: Any, batch: Any, index: int) -> tuple[list[_Call], Tensor]:
        calls: list[_Call] = []
        inputs: list[Tensor] = []
        argument, last = self.chain.slot.argument, len(blocks) - 1

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(args, dict(kwargs))
            if not calls:
                inputs.append(_argument(call, argument))
            rest, named = _without(call, argument)
            if calls:
                rest, named = _sharing((rest, named), _without(calls[-1], argument))
            calls.append(_Call(tuple(rest), named))
            if len(calls) > last:
                raise EnoughSeen

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
        try:
            with suppress(EnoughSeen):
                call_model(model, batch, self.forward, index)
        finally:
            for handle in handles:
                handle.remove()
        self.forwards += 1
        return calls, inputs[0]

    @contextmanager
    def block(self, number: int) -> Iterator[None]:
        """Bring one block to the device, with a dense copy of it if the dense stream is kept."""
        block = self.chain.blocks[number]
        home = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
        self.current = number
        if self.device is not None:
            block.to(self.device)
        if self.keep_dense:
            self.dense_block = dense_copy(block, self.dense)
        try:
            yield
        finally:
            self.dense_block = None
            if self.device is not None:
                block.to(home)

    def _run(self, block: nn.Module, index: int, inputs: Tensor) -> Any:
        call = self.calls[index][self.current]
        device = self.device or inputs.device
        args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (list(call.args), call.kwargs))
        argument = self.chain.slot.argument
        # A block may work in place on what it is handed; the activations are needed again.
        handed = inputs.to(device, copy=True)
        if isinstance(argument, int):
            args[argument] = handed
        else:
            kwargs[argument] = handed
        self.forwards += 1
        return block(*args, **kwargs)

    def observe(self, index: int, layers: Sequence[Layer], add: Callable[..., None], keep: Tensor | None) -> None:
        """Run one batch through the present block as far as `layers`, and hand their inputs to `add`."""
        block = self.chain.blocks[self.current]
        dense: dict[str, list[Tensor]] = {}
        if self.dense_block is not None and self.differs:
            names = {id(module): name for name, module in block.named_modules()}
            dense_block = self.dense_block
            twins = [replace(layer, module=dense_block.get_submodule(names[id(layer.module)])) for layer in layers]
            self._observe(
                dense_block,
                index,
                self.dense_inputs[index],
                twins,
                lambda layer, x, part: dense.setdefault(layer.name, []).append(x.clone()),
            )

        def seen(layer: Layer, x: Tensor, part: int | None) -> None:
            z = dense[layer.name].pop(0) if dense.get(layer.name) else None
            add(index, layer, x, z, keep, part)

        self._observe(block, index, self.inputs[index], layers, seen)

    def _observe(
        self,
        block: nn.Module,
        index: int,
        inputs: Tensor,
        layers: Sequence[Layer],
        seen: Seen,
    ) -> None:
        remaining = {layer.name for layer in layers}

        def counted(layer: Layer, x: Tensor, part: int | None) -> None:
            seen(layer, x, part)
            if part in (None, LAST_PART):
                remaining.discard(layer.name)
            if not remaining:
                raise EnoughSeen

        with observed(block, layers, counted), suppress(EnoughSeen):
            self._run(block, index, inputs)

    def advance(self) -> None:
        """Replace the activations by what the present block, as it now is, makes of them."""
        if self.current == len(self.chain.blocks) - 1:
            return
        block, slot = self.chain.blocks[self.current], self.chain.slot
        for index, inputs in enumerate(self.inputs):
            if self.dense_block is not None:
                dense = self.dense_inputs[index]
                if self.differs:
                    self.dense_inputs[index] = slot.of_output(self._run(self.dense_block, index, dense)).to(dense.device)
            self.inputs[index] = slot.of_output(self._run(block, index, inputs)).to(inputs.device)
            if self.dense_block is not None and not self.differs:
                self.dense_inputs[index] = self.inputs[index]


def _sharing(given: Any, before: Any) -> Any:
    """`given`, with each tensor that equals its counterpart in `before` replaced by it, so that it is held once."""
    leaves, structure = pytree.tree_flatten(given)
    others, other_structure = pytree.tree_flatten(before)
    if structure != other_structure:
        return given
    shared = [
        b
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        else a
        for a, b in zip(leaves, others, strict=True)
    ]
    return pytree.tree_unflatten(shared, structure)
