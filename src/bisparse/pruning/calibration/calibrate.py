"""Input statistics of a model's layers on calibration data, all at once or stage by stage.

A stage is a sequence of layers that see the same input (an attention's query, key and value; an MLP's gate and up). In order
"sequential" `calibrate` yields a stage, the caller changes its weights, and the statistics of the next stage are those of the
changed network. In order "parallel" all statistics are of the network as it is at the start.

Cost: "parallel" is one pass over the data if the statistics of all layers fit into memory together. "sequential" runs a chain of
blocks, such as transformer layers, block by block and keeps the activations between two blocks, so that all stages together cost
a few passes; layers outside a chain are run from the model's start for each stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bisparse.arguments import listed
from bisparse.layers import Layer
from bisparse.process_group import Ranks
from bisparse.progress_lines import ProgressLines
from bisparse.pruning.calibration.block_chain import Chain, dense_copy, find_chains
from bisparse.pruning.calibration.block_runner import ChainRun
from bisparse.pruning.calibration.collector import HOLD_OUT_EVERY, Collector, Data, Stage
from bisparse.pruning.calibration.execution_order import discover, one_of_each_kind
from bisparse.pruning.calibration.expert_inputs import EXPERTS, ExpertInputs
from bisparse.pruning.calibration.finished_block import FinishedBlock, split
from bisparse.pruning.calibration.hooks import LAST_PART, EnoughSeen, Seen, batch_error_context, call_model, observed
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic
from bisparse.pruning.reduction import positions
from bisparse.tiles import to_matrices
from bisparse.token_masks import TokenMasks

__all__ = ["Stage", "Walk", "calibrate", "evaluating", "showing"]

WHOLE_BYTES = 1 << 30
"""Bytes up to which the statistics of all layers are collected in one pass; otherwise stage by stage, as in "sequential"."""


@dataclass
class Walk:
    """Cost and findings of a calibration, updated while it runs."""

    unreached: list[str] = field(default_factory=list)
    """Layers that no calibration batch went through."""
    activation_bytes: int = 0
    """Most bytes of activations held between two blocks."""
    statistics_bytes: int = 0
    """Most bytes of statistics held at once."""
    forwards: int = 0
    """Number of forward passes, through the whole model, a part of it or one block."""
    time_s: float = 0.0
    """Seconds spent running the model and accumulating; the caller's own work is not counted."""


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    needs: frozenset[Statistic],
    options: Options | None = None,
    *,
    done: frozenset[str] = frozenset(),
    dense: Callable[[Tensor], Tensor | None] | None = None,
    walk: Walk | None = None,
    ranks: Ranks | None = None,
) -> Generator[Stage | FinishedBlock]:
    """Yield the layers stage by stage, each with the statistics of its inputs; the caller may change weights in between.

    The model runs in eval mode without gradients; its mode is restored at the end.

    Args:
        batches: calibration data, read once and kept (token ids, images). Passed as ``model(**batch)``, ``model(*batch)``
            or ``model(batch)``, or by `forward`. Positions that a 2-D "attention_mask", or of a
            decoder its "decoder_attention_mask", hides are not counted.
        needs: what to collect.
        options: the order (see above), how and where to run the model, the progress bar, and whether to reconstruct blocks: then
            each block of a chain is yielded after its layers, and the caller may change it again. CROSS is collected in
            "sequential" only, where it differs from GRAM. In "parallel" the caller must not change weights before the end.
        done: names of layers changed by an earlier, interrupted run: they are skipped.
        dense: maps a parameter or buffer to its value before pruning, or to None if it is unchanged; gives the dense network
            that CROSS compares with.
        walk: receives costs and the layers never reached.
        ranks: the ranks that share the data. All call this with the same arguments, and each gets the statistics of all data.

    Raises:
        CalibrationError: no data, data that does not fit the model, or inputs that are not finite.
    """
    walk = walk if walk is not None else Walk()
    data = listed(batches)
    if not data:
        raise CalibrationError("the calibration set is empty: give at least one batch")
    options = options or Options()
    if options.order == "parallel":
        needs = needs - {Statistic.CROSS}
    # Raw inputs are too large to send: each rank runs all of the data instead.
    ranks = ranks or Ranks()
    shared = Data(data, needs, ranks if Statistic.INPUTS not in needs else Ranks(), options.expert_floor)
    hidden, lines = _shown(options.progress, "calibrating") if ranks.rank == 0 else (True, None)
    bar = tqdm(total=len(layers), desc="calibrating", unit="layer", disable=hidden, smoothing=0.1)
    with evaluating(model), bar:
        passed = len(done)
        if lines:
            lines("", passed, len(layers))
        started = time.perf_counter()
        stages, calls, forwards = discover(model, layers, data, options.forward)
        walk.forwards += forwards
        walk.time_s += time.perf_counter() - started
        reached = {layer.name for stage in stages for layer in stage}
        walk.unreached += [layer.name for layer in layers if layer.name not in reached]
        walker: Iterator[Stage | FinishedBlock]
        if options.order == "parallel" and _bytes_of_all(layers, needs) <= WHOLE_BYTES:
            walker = _walk_whole(model, stages, calls, shared, options.forward, walk, done)
        else:
            walker = _walk_in_order(model, stages, calls, shared, options, walk, done, dense)
        for stage in _timed(walker, walk):
            if isinstance(stage, FinishedBlock):
                yield stage
                continue
            bar.set_postfix_str(stage.layers[-1].name)
            if lines:
                lines(stage.layers[-1].name, passed, len(layers))
            yield stage
            passed += len(stage.layers)
            bar.update(len(stage.layers))
        bar.update(bar.total - bar.n)
        if lines:
            lines("", len(layers), len(layers))


def _shown(progress: bool | None, heading: str) -> tuple[bool | None, ProgressLines | None]:
    """Whether the bar is hidden (None: where there is no terminal), and the lines that take its place."""
    notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    if progress and not notebook and not sys.stderr.isatty():
        return True, ProgressLines(heading)
    return (None if progress is None else not progress), None


def showing(progress: bool | None) -> Callable[[Sequence[int], str], Iterator[int]]:
    """A function that iterates over batches and shows the progress of what is done with them, as `calibrate` does."""

    def each(batches: Sequence[int], what: str) -> Iterator[int]:
        hidden, lines = _shown(progress, what)
        for done, index in enumerate(tqdm(batches, desc=what, unit="batch", disable=hidden, smoothing=0.1)):
            if lines:
                lines("", done, len(batches))
            yield index
        if lines:
            lines("", len(batches), len(batches))

    return each


def _timed(stages: Iterator[Stage | FinishedBlock], walk: Walk) -> Iterator[Stage | FinishedBlock]:
    while True:
        started = time.perf_counter()
        with torch.no_grad():
            stage = next(stages, None)
        walk.time_s += time.perf_counter() - started
        if stage is None:
            return
        yield stage


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, all modules are in eval mode, and compiled ones run uncompiled, since compiled code has old hooks."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _bytes_of_all(layers: Sequence[Layer], needs: frozenset[Statistic]) -> float:
    """What the statistics of all layers take together; raw inputs are never held for more than one stage."""
    if Statistic.INPUTS in needs:
        return float("inf")
    copies = 2 if Statistic.HELD_OUT in needs else 1
    total = 0
    for layer in layers:
        batch, _, inputs = to_matrices(layer.weight.detach(), layer.layout).shape
        kernel = positions(layer.layout, layer.weight.shape)
        width = kernel * inputs
        total += 4 * copies * (batch // kernel) * (width * width if Statistic.GRAM in needs else width)
    return total


def _walk_whole(
    model: nn.Module,
    stages: list[list[Layer]],
    calls: dict[str, int],
    data: Data,
    forward: Callable[..., Any] | None,
    walk: Walk,
    done: frozenset[str],
) -> Iterator[Stage]:
    """All stages from one pass over the network as it is now."""
    todo = [[layer for layer in stage if layer.name not in done] for stage in stages]
    collector = _run(model, todo, data, forward, walk, None, calls)
    yield from (collector.stage(stage) for stage in todo if stage)


def _run(
    model: nn.Module,
    stages: Sequence[Sequence[Layer]],
    data: Data,
    forward: Callable[..., Any] | None,
    walk: Walk,
    reference: nn.Module | None,
    calls: dict[str, int],
) -> Collector:
    """Run every batch, only as far as needed, and collect; `reference`, if given, provides the dense inputs."""
    collector = Collector(stages, calls, data)
    layers = [layer for stage in stages for layer in stage]
    # A layer called more than once may be called a different number of times by another batch: run to the end.
    once = all(calls.get(layer.name) == 1 for layer in layers)
    plain = [layer for layer in layers if layer.layout.kind not in EXPERTS]
    twins = [replace(layer, module=reference.get_submodule(_module_name(model, layer))) for layer in plain] if reference else []
    for index, batch in data.own:
        dense: dict[str, list[Tensor]] = {}
        masks = TokenMasks.of_batch(model, batch)
        if reference is not None and twins:
            with observed(reference, twins, _noting(dense)):
                call_model(reference, batch, forward, index)
        with observed(model, layers, _collecting(collector, index, masks, dense, layers if once else ())), suppress(EnoughSeen):
            call_model(model, batch, forward, index)
        walk.forwards += 1 + (reference is not None)
    if stacks := collector.widen():
        for index, batch in data.own:
            own, masks = stacks if once else [], TokenMasks.of_batch(model, batch)
            with observed(model, stacks, _collecting(collector, index, masks, {}, own)), suppress(EnoughSeen):
                call_model(model, batch, forward, index)
            walk.forwards += 1
    walk.statistics_bytes = max(walk.statistics_bytes, collector.bytes)
    return collector


def _noting(dense: dict[str, list[Tensor]]) -> Seen:
    # Later modules may change a layer's input in place, so a copy is recorded.
    def seen(layer: Layer, inputs: Tensor | ExpertInputs, part: int | None) -> None:
        if isinstance(inputs, Tensor):
            dense.setdefault(layer.name, []).append(inputs.clone())

    return seen


def _collecting(
    collector: Collector, index: int, masks: TokenMasks, dense: dict[str, list[Tensor]], wanted: Sequence[Layer]
) -> Seen:
    """Adds inputs to the collector; stops the forward pass once every layer of `wanted`, if given, was seen."""
    remaining = {layer.name for layer in wanted}

    def seen(layer: Layer, inputs: Tensor | ExpertInputs, part: int | None) -> None:
        z = dense[layer.name].pop(0) if dense.get(layer.name) else None
        collector.add(index, layer, inputs, z, masks.of(layer.name), part)
        if part in (None, LAST_PART):
            remaining.discard(layer.name)
        if wanted and not remaining:
            raise EnoughSeen

    return seen


def _module_name(model: nn.Module, layer: Layer) -> str:
    names: Iterator[str] = (name for name, module in model.named_modules() if module is layer.module)
    return next(names)


def _walk_in_order(
    model: nn.Module,
    stages: list[list[Layer]],
    calls: dict[str, int],
    data: Data,
    options: Options,
    walk: Walk,
    done: frozenset[str],
    dense: Callable[[Tensor], Tensor | None] | None,
) -> Iterator[Stage | FinishedBlock]:
    kinds = one_of_each_kind(data.batches)
    chains = find_chains(model, [layer for stage in stages for layer in stage], calls, kinds, options.forward)
    segments: list[Chain | list[Layer]] = []
    for stage in stages:
        # A stage that straddles a chain's end does not exist: its layers share one input.
        chain = next((chain for chain in chains if chain.holds(stage[0])), None)
        if chain is None:
            segments.append(stage)
        elif chain not in segments:
            segments.append(chain)
    cross, blocks = Statistic.CROSS in data.needs, options.reconstruction is not None
    # Blocks keep their own dense copies, one at a time. A dense copy of the whole model is needed only where something
    # else is pruned before a chain; layers after the only chain are fitted to the outputs they have by then.
    alone = len(segments) > 0 and isinstance(segments[0], Chain) and not any(isinstance(s, Chain) for s in segments[1:])
    reference = dense_copy(model, dense) if (cross or blocks) and not alone else None
    for number, segment in enumerate(segments):
        if isinstance(segment, Chain):
            own = [stage for stage in stages if segment.holds(stage[0])]
            run = ChainRun(segment, model, [batch for _, batch in data.own], options, cross or blocks, dense, cross)
            yield from _walk_chain(run, own, data, walk, done, reference if number else None, blocks)
        elif todo := [layer for layer in segment if layer.name not in done]:
            yield _run(model, [todo], data, options.forward, walk, reference if number else None, calls).stage(todo)


def _finished(run: ChainRun, layers: tuple[Layer, ...], data: Data) -> FinishedBlock:
    fit, judge = split(len(data.own), HOLD_OUT_EVERY)
    name = f"{run.chain.name}.{run.current}"
    return FinishedBlock(
        name,
        run.chain.blocks[run.current],
        layers,
        run.output,
        run.dense_inputs.__getitem__,
        lambda number: TokenMasks.of_batch(run.model, data.own[number][1]).of(name),
        fit,
        judge,
    )


def _walk_chain(
    run: ChainRun,
    stages: list[list[Layer]],
    data: Data,
    walk: Walk,
    done: frozenset[str],
    reference: nn.Module | None,
    blocks: bool,
) -> Iterator[Stage | FinishedBlock]:
    run.start(reference)
    # Modules after the last block with layers need not run.
    for number in range(1 + max(run.chain.block_of(stage[0]) for stage in stages)):
        own = [stage for stage in stages if run.chain.block_of(stage[0]) == number]
        with run.block(number, own):
            for position, stage in enumerate(own):
                # Layers done before the walk was interrupted are part of the pruned stream already.
                run.differs |= any(layer.name in done for layer in stage)
                todo = [layer for layer in stage if layer.name not in done]
                if not todo:
                    continue
                collector = Collector([todo], {}, data)
                _collect(run, position, todo, collector, data)
                if stacks := collector.widen():
                    _collect(run, position, stacks, collector, data)
                walk.statistics_bytes = max(walk.statistics_bytes, collector.bytes)
                walk.activation_bytes = max(walk.activation_bytes, run.activation_bytes)
                yield collector.stage(todo)
                run.differs = True
            if blocks and own:
                run.advance_dense()
                yield _finished(run, tuple(layer for stage in own for layer in stage), data)
                run.restart()
            run.advance()
    walk.forwards += run.forwards


def _collect(run: ChainRun, position: int, layers: Sequence[Layer], collector: Collector, data: Data) -> None:
    """Add every batch's inputs of a stage of the current block to the collector."""
    for own_index, (index, batch) in enumerate(data.own):
        masks = TokenMasks.of_batch(run.model, batch)
        with batch_error_context(batch, index, f"the layer {layers[0].name}"):
            inputs, dense_inputs = run.inputs_of(own_index, position)
            for at, (x, part) in enumerate(inputs):
                z = dense_inputs[at][0] if dense_inputs and at < len(dense_inputs) else None
                for layer in layers:
                    collector.add(index, layer, x, z if isinstance(z, Tensor) else None, masks.of(layer.name), part)
        run.release(own_index)
