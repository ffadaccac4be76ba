"""Sparse training: `sparsify_` a model, `attach` its `Sparsity` to the optimizer, train as always, `finalize_`.

The forward pass reads masked weights (dynamic runs); hooks before and after the optimizer's own step add the masked decay, keep
static zeros at zero and count. So gradient accumulation, clipping and skipped mixed-precision steps need no care: what counts is
an optimizer step that happened. Masks are refreshed, and phases changed, before the first training forward pass that is due
(`bisparse.training.forward_hook`), never after the last step: what is evaluated, saved or finalized is what was trained.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bisparse.layers import Skipped
from bisparse.pattern import Structure
from bisparse.results import LayerResult, PruneReport
from bisparse.solution import verify
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import from_matrices
from bisparse.training.facts import layer_facts
from bisparse.training.forward_hook import RefreshHook, gathered_again
from bisparse.training.gradient_rules import after_closure, decay_pruned, mask_gradient
from bisparse.training.layer import Accelerated, SparseLayer, local
from bisparse.training.mask_search import MaskSearch, Prices, Score
from bisparse.training.metrics import MaskChange, as_metrics, measure_change
from bisparse.training.optimizer import (
    held_by,
    skipped_by_scaler,
    unwrapped,
    why_not_followed,
)
from bisparse.training.rank_consistency import check_ranks_agree, is_sharded, raise_together, ranks_of
from bisparse.training.schedule import Phase, Schedule

__all__ = ["Method", "Mode", "Sparsity"]

Mode = Literal["dynamic", "static"]
Method = Literal["ste", "sr-ste", "masked-decay", "s-ste"]

STATE_VERSION = 2

_LIVE: WeakSet[Sparsity] = WeakSet()
_HANDLES = itertools.count()


class Sparsity:
    """The sparse layers of a model in training. Made by `sparsify_`.

    Its state is what a checkpoint of the model does not hold: the step counter, the prices that mask searches start from,
    and the masks of a static run. It has `state_dict` and `load_state_dict` as torch's own objects do.
    """

    def __init__(
        self,
        layers: list[SparseLayer],
        skipped: list[Skipped],
        called: list[nn.Module],
        *,
        mode: Mode,
        method: Method,
        pattern: Structure,
        solver: Solver | None,
        refresh: int,
        decay: float | None,
        schedule: Schedule,
        score: Score,
        measure_every: int,
        check_gradients: bool,
    ) -> None:
        self.layers, self.skipped = layers, skipped
        self.mode, self.method, self.pattern, self.schedule = mode, method, pattern, schedule
        self.refresh_every, self.decay, self.measure_every, self.check_gradients = refresh, decay, measure_every, check_gradients
        self.step = 0
        """Optimizer steps done."""
        self.changes: dict[str, MaskChange] = {}
        """By layer name: what the last measured refresh did."""
        self.refreshes = 0
        """Mask refreshes done by this object."""
        self.search_seconds = 0.0
        """Time spent on finding masks, without measuring them."""
        self.on_refresh: list[Callable[[Sparsity], None]] = []
        """Called after each measured refresh."""
        self.search = MaskSearch(layers, solver, score)
        self.due = False
        """The next training forward pass refreshes the masks, or changes the phase, first."""
        self.written: list[Tensor] = []
        self.in_compiled_code = False
        self.ended: int | None = None
        """The step at which `finalize_` ended this object; None before."""
        self.called = called
        self._final: dict[str, LayerResult] = {}
        self._begin()

    def _begin(self) -> None:
        self.handle = next(_HANDLES)
        self.hook = RefreshHook(self)
        self._attached: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        _LIVE.add(self)

    def __repr__(self) -> str:
        how = "static" if self.mode == "static" else f"dynamic, {self.method}, refreshed every {self.refresh_every} steps"
        ended = "" if self.ended is None else ", ended by finalize_"
        counts = f"{len(self.layers)} layers sparse, {len(self.skipped)} dense, step {self.step}{ended}"
        return f"Sparsity({self.pattern}, {how}: {counts})"

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the optimizers and the model of this object, not to those of its copies.
        own = ("_attached", "_handles", "hook", "handle")
        return {name: value for name, value in self.__dict__.items() if name not in own} | {"on_refresh": [], "written": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    @property
    def phase(self) -> Phase:
        """The phase of the next training forward pass."""
        return self._phase_after(self.step)

    def _phase_after(self, step: int) -> Phase:
        return Phase.FROZEN if self.mode == "static" else self.schedule.phase(step)

    def metrics(self) -> dict[str, float]:
        """The last measured refresh as flat numbers: ``sparsity/flip_rate``, ``sparsity/LAYER/retained``, ...

        ``sparsity/step`` is the number of optimizer steps that were done when it was measured, up to `measure_every` steps ago.
        """
        return as_metrics(self.changes)

    def report(self) -> PruneReport:
        """Each sparse layer as its weight is now, and each dense one with its reason, for `bisparse.checkpoint.save`.

        What masks keep of the scores, and how much more the best ones could, is found now, by a search that costs what a
        refresh does. After `finalize_` it is what it was then, and a note says so. In a sharded run, all ranks must call it.
        """
        results = [self._final.get(layer.name) or layer_facts(layer, self.search.score) for layer in self.layers]
        solver = parse_solver(self.search.solver)
        method = "static training" if self.mode == "static" else f"dynamic training, {self.method}"
        notes = () if self.ended is None else (f"ended by finalize_ after optimizer step {self.ended}; later steps are dense",)
        return PruneReport(str(self.pattern), method, type(solver).__name__, tuple(results), tuple(self.skipped), notes=notes)

    def facts_within(self, model: nn.Module) -> dict[str, LayerResult]:
        """What `report` says of the layers that are in a model, by name."""
        modules = {id(module) for module in model.modules()}
        return {layer.name: layer_facts(layer, self.search.score) for layer in self._active if id(layer.module) in modules}

    def end(self, facts: Mapping[str, LayerResult]) -> None:
        """Layers were finalized: keep what was so then, and stop following once none is left."""
        self._final |= facts
        if facts and len(self._final) == len(self.layers):
            self.detach()
            self.ended, self.due, self.written, self.on_refresh = self.step, False, [], []
            _LIVE.discard(self)

    def _check_not_ended(self, doing: str) -> None:
        if self.ended is not None:
            raise ValueError(
                f"cannot {doing}: this Sparsity ended with finalize_ after optimizer step {self.ended}, and the model is dense "
                "with zeros since; call sparsify_ again to train on with masks (mode='static', masks='nonzero' keeps the zeros)"
            )

    # -- attaching ---------------------------------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer, group: ProcessGroup | None = None) -> Sparsity:
        """Follow the optimizers that train the model; steps are counted on the first. Returns itself.

        Call it once they are built and the model is wrapped (DDP, FSDP2), before the first step.

        Args:
            group: the ranks that hold the same model, as given to DistributedDataParallel as process_group; by default those of
                the device mesh that the weights are sharded over, else all.

        Raises:
            ValueError: an optimizer is attached already, a sparse parameter that needs gradients is in none of them, or ranks
                hold different masks or weights.
        """
        self._check_not_ended("attach an optimizer")
        if not optimizers:
            raise ValueError("attach() needs the optimizer that trains the model")
        if self._attached:
            raise ValueError("this Sparsity is attached already; call detach() first to follow another optimizer")
        plain = [unwrapped(optimizer) for optimizer in optimizers]
        held = {id(held) for one in plain for group in one.param_groups for held in group["params"]}
        weights = {id(layer.weight) for layer in self._active}
        missing = [one.name for one in self._active if one.weight.requires_grad and id(one.weight) not in held]
        error = None
        if missing:
            error = ValueError(
                f"the optimizer does not hold the weights of {len(missing)} sparse layers, the first {missing[0]!r}: build it "
                "from model.parameters() after sparsify_ (and after wrapping the model), or freeze these layers, or exclude them"
            )
        for one in plain:
            error = error or ((why := why_not_followed(one, self.method)) and ValueError(why)) or None
        for other in _LIVE:
            same = any(id(layer.weight) in weights for layer in other._active)
            if other is not self and same and any(one is mine for one in other._attached for mine in plain):
                error = error or ValueError(
                    f"this optimizer still carries another Sparsity of the same weights ({other!r}): end it with finalize_, or "
                    "call its detach()"
                )
        ranks = ranks_of(self._active, group)
        raise_together(ranks, error, "attaching the optimizer")
        check_ranks_agree(self._active, ranks)
        self.search.ranks = ranks
        self._attached = plain
        for index, own in enumerate(plain):
            self._handles.append(
                own.register_step_pre_hook(lambda _, args, kwargs, own=own: self._before_step(own, args, kwargs))  # type: ignore[misc]
            )
            self._handles.append(own.register_step_post_hook(lambda *_, own=own, first=index == 0: self._after_step(own, first)))
        if self.mode == "dynamic":
            self._expect(self.due)
            self.hook.refreshed = self
            self.hook.install(self.called)
        else:
            # Masked when it is accumulated, so that clipping measures the gradient that is used.
            for layer in self._active:
                if layer.weight.requires_grad:
                    hook = layer.weight.register_post_accumulate_grad_hook(lambda weight, own=layer: mask_gradient(own, weight))
                    self._handles.append(hook)
        return self

    def detach(self) -> None:
        """Stop following the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._attached, self._handles = [], []
        self.hook.refreshed = None

    # -- a step ------------------------------------------------------------------------------------------------------

    def _before_step(
        self, own: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if skipped_by_scaler(own):
            return None
        replaced = after_closure(args, kwargs, lambda first: self._use_gradients(own, first))
        if replaced is None:
            self._use_gradients(own, True)
        return replaced

    @torch.no_grad()
    def _use_gradients(self, own: Optimizer, first: bool) -> None:
        """Check and complete the gradients that the optimizer is about to use; with a closure, each time it has made them."""
        held = [one for one in held_by(own, self._active) if one.weight.grad is not None]
        if self.check_gradients:
            self._check_gradients([one.layer for one in held])
        if self.mode == "static":
            for one in held:
                mask_gradient(one.layer, one.weight)
        elif self.method == "masked-decay" or (self.method == "sr-ste" and first):
            decay_pruned(self.method, self.decay, held, own)

    @torch.no_grad()
    def _after_step(self, own: Optimizer, counts: bool) -> None:
        if skipped_by_scaler(own):
            return
        if self.mode == "static":
            for one in held_by(own, self._active):
                one.layer.zero_pruned()
        if not counts:
            return
        if self.step == 0:
            for layer in self.layers:
                if (parametrization := layer.parametrization) is not None:
                    parametrization.start = None
        missed = self.due  # no hook saw a training forward pass since the step before
        self.step += 1
        if self.mode == "static":
            return
        before, now = self._phase_after(self.step - 1), self.phase
        turns = (before is Phase.DENSE) != (now is Phase.DENSE)
        self._expect(missed or turns or (now is Phase.SPARSE and self.step % self.refresh_every == 0))
        if missed or (turns and self.in_compiled_code):
            self.refresh_due()

    def _expect(self, due: bool) -> None:
        self.due, self.written = due, []
        if due:
            for layer in self._active:
                self.written.append(layer.mask)
                for module in (layer.module, *layer.sharing):
                    if isinstance(module, Accelerated):
                        self.written += [held for held in module.buffers(recurse=False)]

    @torch.no_grad()
    def refresh_due(self) -> None:
        """Do what was put off until the next training forward pass: find new masks, or become dense. Nothing if nothing is due.

        It is called by the forward pass itself. In a distributed run, all ranks must call it.
        """
        if not self.due:
            return
        gathered_again(self.called)
        if self.phase is Phase.DENSE:
            self._make_dense()
        else:
            self.refresh()
        self._expect(False)

    def _check_gradients(self, layers: list[SparseLayer]) -> None:
        gradients = {layer.name: local(layer.weight.grad) for layer in layers if layer.weight.grad is not None}
        if not gradients:
            return
        sums = [gradient.sum(dtype=torch.float32) for gradient in gradients.values()]
        wrong = (~torch.isfinite(torch.stack([one.to(sums[0].device) for one in sums]))).any().int()
        # A replicated weight has the same gradient on every rank; that of a shard is known to its own rank alone.
        ranks = self.search.ranks if any(is_sharded(layer) for layer in layers) else None
        if ranks is not None and ranks.size > 1:
            torch.distributed.all_reduce(wrong, group=ranks.group)
        if not bool(wrong):
            return
        own = {name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())}
        everyone = [own] if ranks is None else ranks.all(own)
        for name in gradients:
            holders = [rank for rank, found in enumerate(everyone) if name in found]
            if holders:
                where = "" if ranks is None else f" on rank {', '.join(str(ranks.name(rank)) for rank in holders)}"
                raise ValueError(
                    f"the gradient of {name} holds NaN or infinite numbers{where} at optimizer step {self.step + 1}; the step "
                    "was not taken. Skip such steps (torch.amp.GradScaler does), lower the learning rate, or clip gradients."
                )

    # -- masks -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """Find the masks of the present weights now. In a distributed run, all ranks must call it.

        What was trained so far was trained with the masks before: train on before you evaluate, save or finalize.
        """
        self._check_not_ended("refresh the masks")
        layers = [layer for layer in self._active if (layer.weight.requires_grad or self._is_dense(layer))]
        start = time.perf_counter()
        found = self.search.masks([layer.name for layer in layers], share=True)
        self.search_seconds += time.perf_counter() - start
        self.refreshes += 1
        measured = bool(self.measure_every) and (self.refreshes - 1) % max(1, self.measure_every // self.refresh_every) == 0
        solver = self.search.solver
        for layer in layers:
            mask, make_scores = found[layer.name]
            if measured:
                scores = from_matrices(make_scores(), layer.layout, mask.shape)
                optimal = not layer.transposable or (parse_solver(solver)).exact
                old = layer.mask.to(mask.device)
                self.changes[layer.name] = measure_change(layer, self.step, old, mask, scores, optimal=optimal)
            layer.mask.copy_(mask)
            own = layer.parametrization
            if own is not None:
                own.dense, own.start = False, None
            layer.mask_changed(proved=solver is None)  # the library's own: a check would wait for the device
        self._expect(False)
        if measured:
            for tell in self.on_refresh:
                tell(self)

    @staticmethod
    def _is_dense(layer: SparseLayer) -> bool:
        own = layer.parametrization
        return own is not None and own.dense

    def _make_dense(self) -> None:
        for layer in self._active:
            own = layer.parametrization
            if own is not None:
                own.dense = True
                own.mask.fill_(True)
                layer.mask_changed()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the model's state_dict lacks: counter, prices, static masks. Tensors, numbers and texts only.

        After `finalize_` it says when this object ended, and no run can take it up.
        """
        layers: dict[str, dict[str, Any]] = {}
        for layer in self._active:
            entry: dict[str, Any] = {"pattern": str(layer.pattern), "shape": list(layer.mask.shape)}
            if layer.name in self.search.prices:
                prices = self.search.prices[layer.name]
                entry |= {"u": prices.u, "v": prices.v, "exponent": prices.exponent}
            if self.mode == "static":
                entry["mask"] = layer.mask
            layers[layer.name] = entry
        numbers = {"step": self.step, "refreshes": self.refreshes, "due": self.due, "ended": self.ended}
        return {"version": STATE_VERSION, "mode": self.mode, **numbers, "layers": layers}

    @property
    def _active(self) -> list[SparseLayer]:
        """The layers that are not finalized."""
        return [layer for layer in self.layers if layer.name not in self._final and layer.active]

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run where another `Sparsity` of the same layers and patterns left it.

        Raises:
            ValueError: the state is of other layers, patterns, shapes, or of the other mode, or one of both has ended.
        """
        self._check_not_ended("load a state")
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"sparsity state of version {state.get('version')!r}: this release reads version {STATE_VERSION}")
        if state["mode"] != self.mode:
            raise ValueError(f"the checkpoint is of a {state['mode']} run, this one is {self.mode}: pass mode={state['mode']!r}")
        if state["ended"] is not None:
            raise ValueError(
                f"the checkpoint is of a run that ended with finalize_ after optimizer step {state['ended']}: load the model's "
                "weights alone, and sparsify_ it with mode='static', masks='nonzero' to keep its zeros"
            )
        saved, own = state["layers"], {layer.name: layer for layer in self._active}
        if saved.keys() != own.keys():
            missing, surplus = sorted(saved.keys() - own.keys()), sorted(own.keys() - saved.keys())
            raise ValueError(
                f"the checkpoint has other sparse layers: {missing[:3]} are sparse there and not here, {surplus[:3]} here and "
                "not there; call sparsify_ with the include, exclude and patterns of the run that saved it"
            )
        for name, entry in saved.items():
            layer = own[name]
            if entry["pattern"] != str(layer.pattern):
                raise ValueError(f"{name}: the checkpoint has pattern {entry['pattern']}, this run {layer.pattern}")
            if list(entry["shape"]) != list(layer.mask.shape):
                raise ValueError(f"{name}: the checkpoint has shape {tuple(entry['shape'])}, this run {tuple(layer.mask.shape)}")
            if "mask" in entry:
                check_mask(name, entry["mask"], layer.pattern, layer)
        self.step, self.refreshes = int(state["step"]), int(state["refreshes"])
        for name, entry in saved.items():
            layer = own[name]
            if "u" in entry:
                device = layer.mask.device
                moved = (entry[side].detach().clone().to(device) for side in ("u", "v", "exponent"))
                self.search.prices[name] = Prices(*moved)
            if "mask" in entry:
                layer.mask.copy_(entry["mask"])
                layer.zero_pruned()
        dense = self._phase_after(self.step - 1 if state["due"] else self.step) is Phase.DENSE  # what is due has not happened
        for layer in self._active:
            parametrization = layer.parametrization
            if parametrization is not None:
                parametrization.dense, parametrization.start = dense, None
            layer.mask_changed()
        self._expect(bool(state["due"]))


def live_sparsities() -> list[Sparsity]:
    """Those that no `finalize_` has ended."""
    return list(_LIVE)


def check_mask(name: str, mask: Tensor, pattern: Structure, layer: SparseLayer) -> None:
    """Raise ValueError unless a mask has the layer's shape and obeys its pattern."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: a mask must be a bool tensor, True = kept; this one is of {found}")
    if mask.shape != layer.weight.shape:
        raise ValueError(f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(layer.weight.shape)}")
    verify(mask, pattern, layout=layer.layout, name=name).check()
