"""A pruning job as one transaction: all of its layers are changed or, on an exception, none.

The original tensors are stored before they are changed: with calibration data on disk, so that memory has only one copy of the
model and an interrupted job can be resumed; otherwise in memory. Weights that are mapped from files stay mapped where possible.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.apart import check_apart, origin_of
from bisparse.arguments import listed
from bisparse.layers import Layer, Skipped
from bisparse.pattern import Structure
from bisparse.process_group import Ranks
from bisparse.pruning.bias import bias_of
from bisparse.pruning.calibration.block_chain import dense_copy
from bisparse.pruning.calibration.calibrate import Walk, evaluating, showing
from bisparse.pruning.calibration.collector import Stage
from bisparse.pruning.calibration.finished_block import BlockFit, BlockFitter, FinishedBlock
from bisparse.pruning.calibration.hooks import none_reached, unreached_reason
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.statistics import CalibrationError, ExpertStatistics, Statistic, full_precision
from bisparse.pruning.fingerprint import fingerprint, saved_tensors, stable_repr
from bisparse.pruning.journal import Journal, JournaledFit, JournalError
from bisparse.pruning.layer import Change, prune_layer
from bisparse.pruning.layer_tensors import live_tensors, restore_, resumed_result, tensors_after, write_
from bisparse.pruning.mapped_weights import MappedWeights
from bisparse.pruning.methods.base import Method
from bisparse.pruning.network_reconstruction import finished_network, note_of
from bisparse.pruning.norms_after import norms_after
from bisparse.results import LayerResult
from bisparse.rollback import Rollback

__all__ = ["Job", "Outcome", "Task"]


@dataclass(frozen=True)
class Task:
    """One layer of a job."""

    layer: Layer
    structure: Structure
    method: Method
    allowed: Tensor | None = None
    """Where weights may be kept, of the weight's shape; None: no restriction."""


@dataclass(frozen=True)
class Outcome:
    """The result of a committed job."""

    results: tuple[LayerResult, ...]
    """One result per layer, in the order of the tasks, without layers that calibration never reached."""
    unreached: tuple[Skipped, ...] = ()
    """Layers that calibration never reached."""
    notes: tuple[str, ...] = ()
    """Notes on cost and data."""


class Job:
    """The layers of a job with their original and new tensors, and the ranks that share the work.

    Inside a ``with`` block, `prune` and `reconstruct` compute new tensors, and `commit` ends the job. With calibration data in
    the order "sequential", a layer is written as soon as it is pruned, so that later layers get its outputs; otherwise `commit`
    writes all of them. If the block raises, `abort` undoes it.

    Raises:
        DifferentJobsError: the ranks were called with different arguments, data or weights.
        CalibrationError, ValueError: as for `prune_`. The model is unchanged.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[Task], batches: Iterable[Any] | None, options: Options, ranks: Ranks
    ) -> None:
        self.model = model
        self.tasks = {task.layer.name: task for task in tasks}
        self.layers = [task.layer for task in tasks]
        self.needs: frozenset[Statistic] = frozenset().union(*(task.method.needs for task in tasks))
        self.uses_data = bool(self.needs) or options.reconstructs
        self.data: list[Any] = []
        self.options = options
        self.ranks = ranks
        self.walk = Walk()
        self.results: dict[str, LayerResult] = {}
        self.fits: list[BlockFit] = []
        self.network_note: tuple[str, ...] = ()
        self.experts: list[tuple[ExpertStatistics, ...]] = []
        self.norms: dict[str, nn.Module] = {}
        self.journal: Journal | None = None
        self._batches = batches
        self._changes: dict[str, Change] = {}
        """By layer, the tensors that `commit` will write, if there is no journal for them."""
        self._touched: dict[str, Layer] = {}
        self._changed: dict[int, tuple[str, str]] = {}
        """By id of a model's tensor, the layer and key under which the journal has its original."""
        self._mapped = MappedWeights(model if self.uses_data else nn.Module())  # without data no journal to map values from
        self._open = ExitStack()

    def __enter__(self) -> Job:
        try:
            self._rollback = self._open.enter_context(Rollback(self.model))
            if self.uses_data:
                self._check_data()
            about = self._description()
            if self.ranks.size > 1:
                self.ranks.agree(self._argument_by_argument(about))
            if self.uses_data:
                if self.data:
                    self.norms = norms_after(self.model, self.layers, self.data[0], self.options.forward)
                self.journal = self._open.enter_context(Journal(self._folder(), about, keep=self.options.keep_journal))
                self._resume(self.journal)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self.abort(error)
        finally:
            self._open.__exit__(kind, error, trace)

    @property
    def done(self) -> frozenset[str]:
        """Names of the layers that have a result."""
        return frozenset(self.results)

    def prune(self, stage: Stage) -> None:
        """Prune the layers of a stage; each rank prunes its share of them."""
        own = {}
        for layer, statistics in self.ranks.share(list(zip(stage.layers, stage.statistics, strict=True))):
            if self.uses_data and not statistics.columns:
                continue
            task = self.tasks[layer.name]
            with full_precision(layer.weight.device):
                change, result = prune_layer(
                    layer, task.structure, task.method, self.options.solver, statistics, task.allowed, self.norms
                )
            own[layer.name] = change.mask, change.weight, change.bias, result
        found = {name: one for part in self.ranks.all(own) for name, one in part.items()}
        for layer, statistics in zip(stage.layers, stage.statistics, strict=True):
            if layer.name in found and statistics.experts is not None:
                self.experts.append(statistics.experts)
            if layer.name not in found:
                self.walk.unreached.append(layer.name)
                continue
            mask, weight, bias, result = found[layer.name]
            self._record(Change(layer, mask, weight, bias, bias_of(layer, self.norms)), result)

    def reconstruct(self, block: FinishedBlock) -> None:
        """Fit a block whose layers are written, or load the result of an interrupted job."""
        assert self.options.reconstruction is not None
        fit = self._fitted_or_loaded(block, self.options.reconstruction)
        self.fits.append(fit)
        for layer in block.layers:
            if layer.name in self.results:
                self.results[layer.name] = _fitted(self.results[layer.name], fit)

    def reconstruct_network(self) -> None:
        """Fit all layers together to the dense network's outputs, or load the result of an interrupted job."""
        how = self.options.network
        if how is None or not self.results:
            return
        layers = [layer for layer in self.layers if layer.name in self.results]
        each = showing(self.options.progress)
        data = self.data if how.batches is None else how.batches
        with evaluating(self.model):
            dense = dense_copy(self.model, self.original)
            network = finished_network(self.model, dense, layers, data, self.options.forward, each, self._stored_fit())
            self.network_note = (note_of(network, self._fitted_or_loaded(network, how)),)

    def _stored_fit(self) -> JournaledFit | None:
        return None if self.options.resume is None or self.journal is None else JournaledFit(self.journal)

    def touch(self, layer: Layer) -> None:
        """Store a layer's original tensors, before it is written to."""
        tensors = live_tensors(layer, self.norms)
        if self.journal is None:
            self._rollback.touch(*tensors.values())
        elif layer.name not in self._touched:
            self._rollback.check_writable(*tensors.values())
            self.journal.hold("dense", layer.name)  # mapped first, so that a rollback does not depend on the folder
            self._touched[layer.name] = layer
            self._changed.update({id(live): (layer.name, key) for key, live in tensors.items()})

    def original(self, live: Tensor) -> Tensor | None:
        """The original of a parameter or buffer; None if the job has not touched it."""
        if self.journal is None or id(live) not in self._changed:
            return None
        name, key = self._changed[id(live)]
        return self.journal.get("dense", name)[0][key]

    def commit(self) -> Outcome:
        """Write the remaining layers, wait for all ranks, and return the outcome."""
        if self.uses_data and not self.results:
            raise CalibrationError(none_reached(self.layers))
        for layer in self.layers:
            if layer.name in self.results and layer.name not in self._touched:
                self._write(layer)
        # No rank finishes before all do: a failure up to here fails all of them.
        self.ranks.all(None)
        results = tuple(self.results[layer.name] for layer in self.layers if layer.name in self.results)
        unreached = tuple(Skipped(name, unreached_reason(self.tasks[name].layer)) for name in self.walk.unreached)
        return Outcome(results, unreached, self._notes())

    def abort(self, error: BaseException) -> None:
        """Roll back the model, and fail the other ranks. Called for every exception, including KeyboardInterrupt.

        Raises:
            JournalError: the stored originals of some layers were damaged on disk while the job ran; all others are restored.
        """
        damaged = []
        try:
            self._mapped.restore()
            for name, layer in self._touched.items():
                assert self.journal is not None
                try:
                    original = self.journal.held("dense", name)
                except JournalError:
                    damaged.append(name)
                    continue
                restore_(layer, original, self.norms)
        finally:
            self.ranks.fail(error)
        if damaged:
            raise JournalError(
                f"the job failed ({error or type(error).__name__}), and the originals of {', '.join(damaged)} were damaged on "
                "disk meanwhile: load the model again. All other layers are restored"
            ) from error

    def _check_data(self) -> None:
        if self.options.reconstructs and self.ranks.size > 1:
            raise ValueError("blocks and networks are reconstructed on one rank only; leave out group=")
        if self.options.reconstructs and torch.is_inference_mode_enabled():
            raise ValueError("reconstruction needs gradients: call this outside of torch.inference_mode()")
        if self._batches is None:
            names = ", ".join(dict.fromkeys(task.method.name for task in self.tasks.values() if task.method.needs))
            if not names:
                raise ValueError("reconstruction compares outputs: pass batches of calibration data")
            needs = ", ".join(sorted(self.needs))
            raise ValueError(f"{names} needs the {needs} of each layer's inputs: pass batches of calibration data")
        self.data = listed(self._batches)

    def _description(self) -> dict[str, Any]:
        """Everything that identifies this job; a journal belongs to one job, and all ranks must have the same."""
        options = self.options
        fit = "".join(f", {fitter!r}" for fitter in (options.reconstruction, options.network) if fitter is not None)
        return {
            "jobs": {name: f"{task.structure} by {stable_repr(task.method)}" for name, task in self.tasks.items()},
            "solver": stable_repr(options.solver),
            "order": f"{options.order}{fit}",
            "experts": f"all tokens below {options.expert_floor:g} per input",
            "data": fingerprint(self.data),
            "network data": fingerprint(getattr(options.network, "batches", None)),
            "forward": "none" if options.forward is None else fingerprint(options.forward),
            # What calibration runs through is more than the layers that are pruned.
            "weights": fingerprint(*saved_tensors(self.model)) if self.uses_data else "none",
        }

    def _argument_by_argument(self, about: Mapping[str, Any]) -> dict[str, str]:
        """The description of the job with one entry per layer and tensor, for ranks to compare."""
        lines = {f"the pruning of {name}": line for name, line in about["jobs"].items()}
        lines |= {"solver=": about["solver"], "order=": about["order"], "expert_floor=": about["experts"]}
        lines |= {f"the digest of the {name}": about[name] for name in ("data", "network data")} | {"forward=": about["forward"]}
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        lines |= {f"the digest of {name}": fingerprint(one) for name, one in tensors.items()}
        allowed = [(name, task.allowed) for name, task in self.tasks.items() if task.allowed is not None]
        return lines | {f"the digest of what {name} may keep": fingerprint(one) for name, one in allowed}

    def _folder(self) -> Path | None:
        if self.options.resume is None:
            return None
        check_apart(self.options.resume, {"model's own files": origin_of(self.model)})
        # Each rank has the whole result, and its own journal.
        own = "" if self.ranks.size == 1 else f"rank-{self.ranks.rank}-of-{self.ranks.size}"
        return Path(self.options.resume) / own

    def _resume(self, journal: Journal) -> None:
        """Load the layers that all ranks have in their journals, after checking all of them."""
        journals = self.ranks.all({layer.name for layer in self.layers if journal.has("done", layer.name)})
        resumed = [layer for layer in self.layers if all(layer.name in names for names in journals)]
        for layer in resumed:
            self.results[layer.name] = resumed_result(layer, journal, self.norms)
        self.ranks.all(None)
        if self.options.order == "sequential":
            for layer in resumed:
                self._write(layer)

    def _record(self, change: Change, result: LayerResult) -> None:
        layer = change.layer
        if self.journal is None:
            self._changes[layer.name] = change
        else:
            self.journal.put("dense", layer.name, live_tensors(layer, self.norms))
            self.journal.put("done", layer.name, tensors_after(change, self.norms), asdict(result))
        self.results[layer.name] = result
        if self.uses_data and self.options.order == "sequential":
            self._write(layer)

    def _fitted_or_loaded(self, block: FinishedBlock, fitter: BlockFitter) -> BlockFit:
        assert self.journal is not None
        loaded = self.journal.has("block", block.name)
        if loaded:
            fit = BlockFit(**self.journal.get("block", block.name)[1])
        else:
            fit = fitter.fit_(block)
            held = {f"{layer.name}/{key}": live for layer in block.layers for key, live in live_tensors(layer, {}).items()}
            self.journal.put("block", block.name, held, asdict(fit))
        if loaded or self._mapped:  # what the fit has written is no longer mapped
            tensors, _ = self.journal.get("block", block.name)
            for layer in block.layers:
                write_(layer, {key: tensors[f"{layer.name}/{key}"] for key in live_tensors(layer, {})}, {}, self._mapped)
        return fit

    def _write(self, layer: Layer) -> None:
        self.touch(layer)
        if self.journal is None:
            after = tensors_after(self._changes[layer.name], self.norms)
        else:
            after = self.journal.get("done", layer.name)[0]
        write_(layer, after, self.norms, self._mapped)

    def _notes(self) -> tuple[str, ...]:
        if not self.uses_data:
            return ()
        cost = _notes(self.walk, len(self.data), self.options.order) + _note_of_experts(self.experts, self.options.expert_floor)
        return cost + (_note_of(self.fits) if self.options.reconstruction is not None else ()) + self.network_note


def _fitted(result: LayerResult, fit: BlockFit) -> LayerResult:
    """The layer's result, with a note on the fit of its block, which came after its error was measured."""
    done = f"then fitted with its block, whose error fell from {fit.error_before:.4f} to {fit.error:.4f}"
    note = done if fit.changed else f"fitting its block did not lower the error of {fit.error_before:.4f}"
    return replace(result, note=f"{result.note}; {note}" if result.note else note)


def _note_of(fits: Sequence[BlockFit]) -> tuple[str, ...]:
    if not fits:
        return ("no block was reconstructed, since no layer is in a chain of blocks",)
    before, after = (sum(errors) / len(fits) for errors in ([fit.error_before for fit in fits], [fit.error for fit in fits]))
    return (
        f"reconstructed {sum(fit.changed for fit in fits)} of {len(fits)} blocks: mean error of their outputs on held-out "
        f"batches {before:.4f} before, {after:.4f} after",
    )


def _note_of_experts(stacks: Sequence[Sequence[ExpertStatistics]], floor: float) -> tuple[str, ...]:
    experts = [one for stack in stacks for one in stack]
    if not experts:
        return ()
    routed = [one.routed for one in experts]
    wide = sum(one.all_tokens for one in experts)
    unseen = sum(not one.statistics.columns for one in experts)
    return (
        f"{len(stacks)} stacks of experts calibrated per expert: {min(routed)} to {max(routed)} tokens routed to each; {wide} of "
        f"{len(experts)} on all tokens (below {floor:g} routed tokens per input), {unseen} by magnitude (no token)",
    )


def _notes(walk: Walk, batches: int, order: str) -> tuple[str, ...]:
    return (
        f"calibrated on {batches} batches, {order}: {walk.time_s:.1f} s running the model in {walk.forwards} forward passes; at "
        f"most {walk.statistics_bytes / 1e6:.1f} MB of statistics and, between blocks, {walk.activation_bytes / 1e6:.1f} MB of "
        f"activations held{_peak()}",
    )


def _peak() -> str:
    """The peak memory of the process, as text; empty if the system does not report it."""
    if find_spec("resource") is None:
        return ""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"; peak memory of the process {most * (1 if sys.platform == 'darwin' else 1024) / 1e6:,.0f} MB"
