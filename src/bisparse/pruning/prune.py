"""One-shot pruning of a model in place: all layers or, on bad input or an interruption, none."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree

from bisparse._solve import choose_solver
from bisparse.layers import Filter, Layer, Skipped
from bisparse.pattern import Structure, parse_pattern
from bisparse.process_group import Ranks
from bisparse.pruning.bias import bias_of, norms_after
from bisparse.pruning.block_reconstruction import BlockFit, BlockReconstruction
from bisparse.pruning.calibration.block_runner import FinishedBlock
from bisparse.pruning.calibration.calibrate import Order, Walk, calibrate
from bisparse.pruning.calibration.hooks import unseen_reason
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.pruning.journal import Journal
from bisparse.pruning.layer import Change, apply_, plan, prune_layer
from bisparse.pruning.layer_tensors import live_tensors, resumed_result, tensors_after, write_
from bisparse.pruning.methods.base import Method
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.results import LayerResult, PruneReport, count_parameters
from bisparse.solvers import Solver
from bisparse.tiles import Layout

__all__ = ["prune_", "prune_layers_", "report_of"]


def prune_(
    model: nn.Module,
    pattern: str | Structure,
    method: Method | None = None,
    batches: Iterable[Any] | None = None,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    solver: Solver | None = None,
    remainder: str = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    order: Order = "sequential",
    reconstruction: BlockReconstruction | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
    keep_journal: bool = False,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
) -> PruneReport:
    """Prune the layers of a model in place, and report what was done to each and which were left dense, and why.

    Either every chosen layer is changed or, when an error is raised, none.

    Args:
        pattern: the structure or its text, such as ``"4:8-T"``. N is the number kept.
        method: by default `Magnitude`.
        batches: calibration data, for methods that need statistics: passed to the model as ``model(**batch)``,
            ``model(*batch)`` or ``model(batch)``.
        include, exclude: names, globs, ``re:`` patterns, or functions ``(name, module) -> bool``; see `find_layers`.
        solver: for transposable patterns; by default `Exact`.
        remainder: where M does not divide a layer's sides. "pad": prune as if completed with zeros; "dense": leave the
            layer; "error".
        patterns: patterns of single layers, by name, glob or ``re:`` pattern; the first that matches counts.
        layouts: how single layers store their matrices, where their modules do not tell: "linear", "transposed", "conv",
            "experts", "experts-transposed", "groups:32", "parts:3"; see `bisparse.layers.parse_layout`.
        order: "sequential": each layer is pruned on the inputs that the layers pruned before it deliver; "parallel": on
            the dense network's, as in the paper.
        reconstruction: after the layers of each block of a chain, such as a transformer's, fit what the masks keep of the
            whole block to the dense block's output. Needs the order "sequential".
        forward: how to run the model on a batch, where none of the three ways above fits.
        device: run transformer blocks there, one at a time; by default where the model is.
        resume: a folder for the journal of this job. An interrupted job called again with the same arguments goes on at the
            layer where it stopped; the folder is removed at the end.
        keep_journal: leave that folder, for a caller who has yet to save the model; `remove_journal` removes it.
        progress: a progress bar; None: if a terminal is there to see it.
        group: ranks that share the job, such as ``torch.distributed.group.WORLD`` under torchrun: each calls this with the same
            model and the same batches, runs a part of the batches, prunes a part of the layers, and ends with the whole result.

    Raises:
        CalibrationError: no data, data that does not fit the model, or inputs that are not finite.
        OtherRankError: another rank of the group failed.
        ValueError: weights that are NaN or infinite, filters that match nothing, no layer to prune, parametrized weights, missing
            batches.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> report = prune_(model, "4:8-T")
    >>> [(layer.name, layer.pattern, layer.density <= 0.5) for layer in report]
    [('0', '4:8-T', True), ('2', '4:8-T', True)]
    """
    pattern = parse_pattern(pattern)
    method = Magnitude() if method is None else method
    if not isinstance(method, Method):
        raise ValueError(f"method={method!r:.60}: expected an instance of a method, such as Wanda()")
    planned, left_dense = plan(
        model, pattern, include=include, exclude=exclude, remainder=remainder, patterns=patterns, layouts=layouts
    )
    results, unreached, notes = prune_layers_(
        model,
        [(layer, structure, method) for layer, structure in planned],
        batches,
        solver=solver,
        order=order,
        reconstruction=reconstruction,
        forward=forward,
        device=device,
        resume=resume,
        keep_journal=keep_journal,
        progress=progress,
        ranks=Ranks(group),
    )
    return report_of(pattern, method, solver, results, [*left_dense, *unreached], patterns, notes, count_parameters(model))


def report_of(
    pattern: Structure,
    method: Method,
    solver: Solver | None,
    results: Sequence[LayerResult],
    left_dense: Sequence[Skipped],
    patterns: Mapping[str, str | Structure] | None,
    notes: tuple[str, ...],
    parameters: int,
) -> PruneReport:
    """The report of a job."""
    return PruneReport(
        str(pattern),
        method.name,
        repr(solver or choose_solver(pattern)),
        tuple(results),
        tuple(left_dense),
        {glob: str(parse_pattern(one)) for glob, one in (patterns or {}).items()},
        notes,
        parameters,
    )


def prune_layers_(
    model: nn.Module,
    jobs: Sequence[tuple[Layer, Structure, Method]],
    batches: Iterable[Any] | None,
    *,
    solver: Solver | None = None,
    order: Order = "sequential",
    reconstruction: BlockReconstruction | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
    keep_journal: bool = False,
    progress: bool | None = None,
    allowed: Mapping[str, Tensor] | None = None,
    ranks: Ranks | None = None,
) -> tuple[list[LayerResult], list[Skipped], tuple[str, ...]]:
    """Prune layers, each to its own structure by its own method; all or, on any error, none.

    Where a method needs data, originals are kept on disk until the end, so that memory holds one copy of the model.

    Args:
        allowed: for each layer's name, where weights may be kept; by default everywhere.
        ranks: share the job among these.

    Returns:
        A result a layer, in the order of `jobs`; the layers that calibration never reached; notes on cost and data.
    """
    needs = frozenset().union(*(method.needs for _, _, method in jobs)) if jobs else frozenset()
    ranks = ranks or Ranks()
    if reconstruction is not None:
        _check_reconstruction(order, batches, ranks)
    elif not needs:
        return _prune_without_data_(jobs, solver, allowed, ranks), [], ()
    if batches is None:
        names = ", ".join(dict.fromkeys(method.name for _, _, method in jobs if method.needs))
        raise ValueError(f"{names} needs the {', '.join(sorted(needs))} of each layer's inputs: pass batches of calibration data")
    data = list(batches)
    by_name = {layer.name: (layer, structure, method) for layer, structure, method in jobs}
    about = {
        "jobs": {name: f"{structure} by {method!r}" for name, (_, structure, method) in by_name.items()},
        "solver": repr(solver),
        "order": order if reconstruction is None else f"{order}, {reconstruction!r}",
        "data": _fingerprint([leaf for leaf in pytree.tree_leaves(data)]),
        "weights": _fingerprint([layer.weight for layer, _, _ in jobs]),
    }
    results: dict[str, LayerResult] = {}
    fits: list[BlockFit] = []
    walk = Walk()
    norms = norms_after(model, [layer for layer, _, _ in jobs], data[0], forward) if data else {}
    # Each rank has all of the result, and a journal of its own.
    folder = resume if resume is None or ranks.size == 1 else Path(resume) / f"rank-{ranks.rank}-of-{ranks.size}"
    with Journal(folder, about, keep=keep_journal) as journal:
        touched: list[Layer] = []
        changed: dict[int, tuple[str, str]] = {}

        def dense(live: Tensor) -> Tensor | None:
            """What a parameter or buffer was before this job; None where the job has not touched it."""
            if id(live) not in changed:
                return None
            name, key = changed[id(live)]
            return journal.get("dense", name)[0][key]

        def touch(layer: Layer) -> None:
            # Held before anything is changed: going back must not depend on what becomes of the folder.
            journal.hold("dense", layer.name)
            touched.append(layer)
            changed.update({id(live): (layer.name, key) for key, live in live_tensors(layer, norms).items()})

        def commit(layer: Layer) -> None:
            touch(layer)
            write_(layer, journal.get("done", layer.name)[0], norms)

        try:
            journals = ranks.all({layer.name for layer, _, _ in jobs if journal.has("done", layer.name)})
            # All of the journal is looked at before any of the model is changed.
            resumed = [layer for layer, _, _ in jobs if all(layer.name in names for names in journals)]
            for layer in resumed:
                results[layer.name] = resumed_result(layer, journal, norms)
            ranks.all(None)
            if order == "sequential":
                for layer in resumed:
                    commit(layer)
            stages = calibrate(
                model,
                [layer for layer, _, _ in jobs],
                data,
                needs,
                order=order,
                forward=forward,
                device=device,
                done=frozenset(results),
                dense=dense,
                progress=progress if ranks.rank == 0 else False,
                walk=walk,
                ranks=ranks,
                blocks=reconstruction is not None,
            )
            with closing(stages):
                for stage in stages:
                    if isinstance(stage, FinishedBlock):
                        assert reconstruction is not None
                        fits.append(_reconstruct_(stage, reconstruction, journal))
                        for layer in stage.layers:
                            if layer.name in results:
                                results[layer.name] = _fitted(results[layer.name], fits[-1])
                        continue
                    found: dict[str, tuple[dict[str, Tensor], LayerResult]] = {}
                    for layer, statistics in ranks.share(list(zip(stage.layers, stage.statistics, strict=True))):
                        if statistics.columns:
                            _, structure, method = by_name[layer.name]
                            where = None if allowed is None else allowed[layer.name]
                            change, result = prune_layer(layer, structure, method, solver, statistics, where, norms)
                            found[layer.name] = tensors_after(change, norms), result
                    found = {name: one for part in ranks.all(found) for name, one in part.items()}
                    for layer in stage.layers:
                        if layer.name not in found:
                            walk.unreached.append(layer.name)
                            continue
                        after, result = found[layer.name]
                        journal.put("dense", layer.name, live_tensors(layer, norms))
                        journal.put("done", layer.name, after, asdict(result))
                        results[layer.name] = result
                        if order == "sequential":
                            commit(layer)
            if order == "parallel":
                for layer, _, _ in jobs:
                    if layer.name in results:
                        commit(layer)
            # Nobody is done before all are: a rank that fails until here takes the others with it.
            ranks.all(None)
        except BaseException as error:
            # KeyboardInterrupt included: the model is handed back as it was.
            for layer in touched:
                write_(layer, journal.held("dense", layer.name), norms)
            ranks.fail(error)
            raise
    unreached = [Skipped(name, _why_unreached(by_name[name][0])) for name in walk.unreached]
    if jobs and not results:
        raise CalibrationError(
            f"no calibration batch went through any of the {len(jobs)} layers to prune, such as {jobs[0][0].name}; "
            "check that the batches run the part of the model that is to be pruned"
        )
    ordered = [results[layer.name] for layer, _, _ in jobs if layer.name in results]
    return ordered, unreached, _notes(walk, len(data), order) + (_note_of(fits) if reconstruction is not None else ())


def _prune_without_data_(
    jobs: Sequence[tuple[Layer, Structure, Method]],
    solver: Solver | None,
    allowed: Mapping[str, Tensor] | None,
    ranks: Ranks,
) -> list[LayerResult]:
    """Prune layers whose methods need no statistics; each rank solves its share of them."""
    try:
        own = {}
        for layer, structure, method in ranks.share(jobs):
            where = None if allowed is None else allowed[layer.name]
            change, result = prune_layer(layer, structure, method, solver, allowed=where)
            own[layer.name] = (change.mask, change.weight, change.bias, result)
        found = {name: one for part in ranks.all(own) for name, one in part.items()}
    except BaseException as error:
        ranks.fail(error)
        raise
    done = [(layer, *found[layer.name]) for layer, _, _ in jobs]
    apply_([Change(layer, mask, weight, bias, bias_of(layer)) for layer, mask, weight, bias, _ in done])
    return [result for *_, result in done]


def _check_reconstruction(order: Order, batches: Iterable[Any] | None, ranks: Ranks) -> None:
    if order != "sequential":
        raise ValueError(f"order={order!r}: blocks are reconstructed in the order 'sequential' only")
    if batches is None:
        raise ValueError("reconstruction compares outputs of blocks: pass batches of calibration data")
    if ranks.size > 1:
        raise ValueError("blocks are reconstructed on one rank only; leave out group=")


def _reconstruct_(block: FinishedBlock, how: BlockReconstruction, journal: Journal) -> BlockFit:
    """Fit a block, or take over what an interrupted job has made of it."""
    if journal.has("block", block.name):
        tensors, fit = journal.get("block", block.name)
        for layer in block.layers:
            write_(layer, {key: tensors[f"{layer.name}/{key}"] for key in live_tensors(layer, {})}, {})
        return BlockFit(**fit)
    found = how.fit_(block)
    held = {f"{layer.name}/{key}": live for layer in block.layers for key, live in live_tensors(layer, {}).items()}
    journal.put("block", block.name, held, asdict(found))
    return found


def _fitted(result: LayerResult, fit: BlockFit) -> LayerResult:
    """The layer's line, with what has become of it since its error was measured."""
    done = f"then fitted with its block, whose error fell from {fit.error_before:.4f} to {fit.error:.4f}"
    note = done if fit.changed else f"fitting its block did not lower the error of {fit.error_before:.4f}"
    return replace(result, note=f"{result.note}; {note}" if result.note else note)


def _note_of(fits: Sequence[BlockFit]) -> tuple[str, ...]:
    if not fits:
        return ("no block was reconstructed: the layers are in no chain of blocks",)
    before, after = (sum(errors) / len(fits) for errors in ([fit.error_before for fit in fits], [fit.error for fit in fits]))
    return (
        f"reconstructed {sum(fit.changed for fit in fits)} of {len(fits)} blocks: mean error of their outputs on held-out "
        f"batches {before:.4f} before, {after:.4f} after",
    )


def _why_unreached(layer: Layer) -> str:
    return unseen_reason(layer) or "no calibration batch went through this layer"


def _notes(walk: Walk, batches: int, order: Order) -> tuple[str, ...]:
    return (
        f"calibrated on {batches} batches, {order}: {walk.time_s:.1f} s running the model in {walk.forwards} forward passes; at "
        f"most {walk.statistics_bytes / 1e6:.1f} MB of statistics and, between blocks, {walk.activation_bytes / 1e6:.1f} MB of "
        f"activations held{_peak()}",
    )


def _peak() -> str:
    """What the process took at most, with all that is inside of blocks and layers; nothing where the system does not tell."""
    if find_spec("resource") is None:
        return ""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"; the process took {most * (1 if sys.platform == 'darwin' else 1024) / 1e6:,.0f} MB at most"


def _fingerprint(leaves: Sequence[Any]) -> str:
    """A digest by which a resumed job knows its data and weights again; of large tensors, evenly spaced numbers."""
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 4096)].cpu()
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
