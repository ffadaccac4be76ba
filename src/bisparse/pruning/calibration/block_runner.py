"""Runs a chain block by block; each batch's forward pass pauses before every stage until the stage is pruned.

Each block runs once per batch and stream (pruned, dense), whatever the number of its stages. A paused pass holds the tensors
that it has computed; once these exceed `PAUSED_BYTES`, the remaining batches run the block again for each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.layers import Layer
from bisparse.pruning.calibration.block_chain import Call, Chain, argument_of, dense_copy, without
from bisparse.pruning.calibration.expert_inputs import ExpertInputs
from bisparse.pruning.calibration.hooks import LAST_PART, EnoughSeen, batch_error_context, call_model, forget_casts, observed
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.paused import Paused

__all__ = ["ChainRun"]

PAUSED_BYTES = 8 << 30
"""Maximum bytes that all paused passes hold together."""
INNER = 8
"""Bytes that a pass paused inside a block holds at least, as a multiple of its activations: those of a gated MLP.

Attention that materialises its scores can hold more, which is measured once a pass has paused there."""

Inputs = list[tuple[Tensor | ExpertInputs, int | None]]
"""Inputs of a stage, with the part of a packed projection that each belongs to."""


class _Pass:
    """One batch on its way through a block, in one stream."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.paused = Paused(run)
        self.stage = -1
        self.inputs: Inputs = []

    def reach(self, stage: int) -> Inputs:
        """Run on to the first layer of a stage; returns the stage's inputs, empty if the pass skips the stage."""
        while self.stage < stage and not self.paused.finished:
            handed = self.paused.resume()
            if handed is not None:
                self.stage, self.inputs = handed
        # A batch need not go through every stage: it may have paused before a later one.
        return self.inputs if self.stage == stage else []


class ChainRun:
    """The state of a chain's run: every batch's activations before the current block, and the block's dense copy if needed."""

    def __init__(
        self,
        chain: Chain,
        model: nn.Module,
        data: Sequence[Any],
        options: Options,
        keep_dense: bool,
        dense: Callable[[Tensor], Tensor | None] | None,
        compare: bool = True,
    ) -> None:
        self.chain = chain
        self.model = model
        self.data = data
        self.forward = options.forward
        self.device = None if options.device is None else torch.device(options.device)
        self.keep_dense = keep_dense
        self.dense = dense
        self.compare = compare
        """Whether stages get the dense network's inputs; otherwise only its blocks' outputs are kept."""
        self.calls: list[list[Call]] = []
        self.inputs: list[Tensor] = []
        self.dense_inputs: list[Tensor] = []
        self.current = 0
        self.differs = False
        """Whether the network up to here differs from the dense one: only then are there two streams."""
        self.forwards = 0
        self._held_bytes = 0
        """The most bytes that one batch's paused passes have held so far."""
        self._dense_block: nn.Module | None = None
        self._dense_advanced = False
        self._passes: dict[tuple[int, bool], _Pass] = {}
        self._running: _Pass | None = None

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
            for leaf in pytree.tree_leaves([without(call, "") for call in calls])
            if isinstance(leaf, Tensor)
        )

    def start(self, reference: nn.Module | None) -> None:
        """Run every batch up to the chain, and record each block's arguments other than the activations."""
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

    def _handed(self, model: nn.Module, blocks: Any, batch: Any, index: int) -> tuple[list[Call], Tensor]:
        calls: list[Call] = []
        inputs: list[Tensor] = []
        argument, last = self.chain.slot.argument, len(blocks) - 1

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, dict(kwargs))
            if not calls:
                inputs.append(argument_of(call, argument))
            rest, named = without(call, argument)
            if calls:
                rest, named = _sharing((rest, named), without(calls[-1], argument))
            calls.append(Call(tuple(rest), named))
            if self.chain.alike or len(calls) > last:
                raise EnoughSeen

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
        try:
            with suppress(EnoughSeen):
                call_model(model, batch, self.forward, index)
        finally:
            for handle in handles:
                handle.remove()
        self.forwards += 1
        return calls * len(blocks) if self.chain.alike else calls, inputs[0]

    @contextmanager
    def block(self, number: int, stages: Sequence[Sequence[Layer]]) -> Iterator[None]:
        """Move one block to the device, with a dense copy if the dense stream is kept; passes pause before `stages`."""
        block = self.chain.blocks[number]
        self.current = number
        self._dense_advanced = False
        firsts = [stage[0] for stage in stages]
        twins: list[Layer] = []
        number_of = {layer.name: index for index, layer in enumerate(firsts)}
        parts: Inputs = []

        def seen(layer: Layer, inputs: Tensor | ExpertInputs, part: int | None) -> None:
            if self._running is None:
                # A forward pass of the caller's own, between two stages.
                return
            parts.append((inputs, part))
            if part in (None, LAST_PART):
                handed, parts[:] = list(parts), []
                self._running.paused.pause((number_of[layer.name], handed))

        with _moved(block, self.device):
            if self.keep_dense:
                self._dense_block = dense_copy(block, self.dense)
                names = {id(module): name for name, module in block.named_modules()}
                twins = [replace(layer, module=self._dense_block.get_submodule(names[id(layer.module)])) for layer in firsts]
            try:
                twin = nn.Identity() if self._dense_block is None else self._dense_block  # compiled modules have no truth value
                with observed(block, firsts, seen), observed(twin, twins, seen):
                    yield
            finally:
                self._stop()
                self._dense_block = None

    def inputs_of(self, index: int, stage: int) -> tuple[Inputs, Inputs | None]:
        """One batch's inputs of a stage of the current block, and the dense network's if they differ by now."""
        streams = (False, True) if self._dense_block is not None and self.differs and self.compare else (False,)
        found = []
        for dense in streams:
            one = self._pass(index, dense)
            found.append(self._resumed(one, lambda one=one: one.reach(stage)))  # type: ignore[misc]
        return found[0], found[1] if len(found) > 1 else None

    def release(self, index: int) -> None:
        """Drop the paused pass of a batch if it does not fit into memory; it will start again."""
        stopped = [self._passes[key].paused.held_bytes for key in ((index, False), (index, True)) if key in self._passes]
        self._held_bytes = max(self._held_bytes, sum(stopped))
        if not self._held(index):
            self._stop((index, False), (index, True))

    def advance(self) -> None:
        """Replace the activations by the current block's outputs, with its present weights."""
        if self.current == len(self.chain.blocks) - 1:
            self._stop()
            return
        self.advance_dense()
        for index in range(len(self.inputs)):
            self.inputs[index] = self._finish(index, False)
            self._stop((index, False))

    def advance_dense(self) -> None:
        """Replace the dense network's activations only, once per block."""
        if self._dense_block is None or self._dense_advanced:
            return
        self._dense_advanced = True
        for index in range(len(self.dense_inputs)):
            self.dense_inputs[index] = self._finish(index, self.differs)
            self._stop((index, True))

    def output(self, index: int) -> Tensor:
        """The current block's output on a batch, computed from its start."""
        return self.chain.slot.of_output(self._call(self.chain.blocks[self.current], index, self.inputs[index]))

    def restart(self) -> None:
        """Drop paused passes, which were computed with weights that have changed."""
        self._stop()

    def _stop(self, *chosen: tuple[int, bool]) -> None:
        for key in chosen or tuple(self._passes):
            if one := self._passes.pop(key, None):
                one.paused.stop()

    def _finish(self, index: int, dense: bool) -> Tensor:
        one = self._pass(index, dense)
        with batch_error_context(self.data[index], index, f"the block {self.chain.name}.{self.current}"):
            while not one.paused.finished:
                self._resumed(one, one.paused.resume)
        home = (self.dense_inputs if dense else self.inputs)[index].device
        return self.chain.slot.of_output(one.paused.result).to(home)

    def _resumed(self, one: _Pass, go_on: Callable[[], Any]) -> Any:
        self._running = one
        try:
            return go_on()
        finally:
            self._running = None

    def _pass(self, index: int, dense: bool) -> _Pass:
        if (index, dense) not in self._passes:
            block = self._dense_block if dense else self.chain.blocks[self.current]
            inputs = (self.dense_inputs if dense else self.inputs)[index]
            assert block is not None
            self._passes[index, dense] = _Pass(lambda: self._call(block, index, inputs))
            self.forwards += 1
        return self._passes[index, dense]

    def _held(self, index: int) -> bool:
        one = max(INNER * self.inputs[index].nbytes * (2 if self.keep_dense else 1), self._held_bytes)
        return (index + 1) * one <= PAUSED_BYTES

    def _call(self, block: nn.Module, index: int, inputs: Tensor) -> Any:
        forget_casts()
        call = self.calls[index][self.current]
        device = self.device or inputs.device
        args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (list(call.args), call.kwargs))
        argument = self.chain.slot.argument
        # A block may change its inputs in place; the activations may be needed again.
        handed = inputs.to(device, copy=True)
        if isinstance(argument, int):
            args[argument] = handed
        else:
            kwargs[argument] = handed
        return block(*args, **kwargs)


@contextmanager
def _moved(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Move a module's tensors to the device while open; then copy their values back into the memory where they were.

    Parameters and buffers keep their identity and their memory, also on an error.
    """
    homes = {} if device is None else {one: one.data for one in (*module.parameters(), *module.buffers())}
    try:
        for one, home in homes.items():
            one.data = home.to(device)
        yield
    finally:
        for one, home in homes.items():
            away, one.data = one.data, home
            if away.device != home.device:
                home.copy_(away)


def _sharing(given: Any, before: Any) -> Any:
    """`given`, with each tensor that equals its counterpart in `before` replaced by that one, so that memory holds it once."""
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
