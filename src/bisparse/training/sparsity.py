"""`Sparsity`: sparse training of a model that `sparsify_` has prepared. `attach` it to the optimizer, train, `finalize_`.

In dynamic runs the forward pass uses masked weights. Hooks before and after the optimizer's step add the masked decay, keep
static zeros at zero and count steps. Gradient accumulation, clipping and skipped mixed-precision steps need no special handling:
only optimizer steps that take place count. Masks are refreshed, and phases changed, in the first training forward pass after
they are due (`bisparse.training.forward_hook`), never after the last step, so that the model that is evaluated, saved or
finalized is the one that was trained.
"""

from __future__ import annotations

import functools
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

from bisparse.layers import Skipped
from bisparse.pattern import Structure
from bisparse.results import LayerResult, MaskPoint, PruneReport, count_parameters
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import from_matrices
from bisparse.training.attach_check import attach_error, check_not_flattened, other_run_on, run_length_error
from bisparse.training.decay import Decay
from bisparse.training.forward_hook import RefreshHook, gathered_again
from bisparse.training.gradient_check import check_gradients
from bisparse.training.gradient_rules import after_closure
from bisparse.training.history import history_from_state, history_state, record
from bisparse.training.layer import SparseLayer
from bisparse.training.mask_search import MaskSearch, Score
from bisparse.training.metrics import MaskChange, as_metrics, measure_change
from bisparse.training.optimizer import around_each_step, held_by, skipped_by_scaler, unwrapped
from bisparse.training.rank_consistency import check_ranks_agree, raise_together, ranks_of
from bisparse.training.run_decay import RunDecay
from bisparse.training.run_layers import RunLayers
from bisparse.training.run_state import STATE_VERSION, check_not_ended, check_state, entry_of, load_entry
from bisparse.training.schedule import Phase, Schedule
from bisparse.training.static_zeros import StaticZeros
from bisparse.training.unattached import warn_of_unattached

__all__ = ["Method", "Mode", "Sparsity"]

Mode = Literal["dynamic", "static"]
Method = Literal["ste", "sr-ste", "masked-decay", "s-ste"]

_LIVE: WeakSet[Sparsity] = WeakSet()
_HANDLES = itertools.count()


class Sparsity:
    """The sparse layers of a model in training, returned by `sparsify_`.

    Its `state_dict` has what the model's lacks: the step counter, the prices from which mask searches start, and the masks of a
    static run.
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
        decay: Decay | None,
        steps: int | None,
        schedule: Schedule,
        score: Score,
        measure_every: int,
        check_gradients: bool,
    ) -> None:
        if not isinstance(called, list) or not called:
            raise ValueError("a Sparsity without a model: it is returned by sparsify_(model, pattern)")
        self.layers, self.skipped = layers, skipped
        self.mode, self.method, self.pattern, self.schedule = mode, method, pattern, schedule
        self.refresh_every, self.decay, self.measure_every, self.check_gradients = refresh, decay, measure_every, check_gradients
        self.step = 0
        """Optimizer steps done."""
        self.steps = steps
        """Optimizer steps of the whole run; None if unknown. Trainers' callbacks set it for each run, unless it was given."""
        self.run_decay = RunDecay(method)
        self.changes: dict[str, MaskChange] = {}
        """Metrics of the last measured refresh, by layer name."""
        self.history: list[MaskPoint] = []
        """The means over layers at the measured refreshes so far, at most `bisparse.results.MAX_HISTORY`."""
        self.refreshes = 0
        """Number of mask refreshes so far."""
        self.search_seconds = 0.0
        """Time spent on mask searches, without measurements."""
        self.on_refresh: list[Callable[[Sparsity], None]] = []
        """Functions called with this object after each measured refresh."""
        self.search = MaskSearch(layers, solver, score)
        self.due = False
        """Whether the next training forward pass starts with a refresh or a change of phase."""
        self.written: list[Tensor] = []
        self.in_compiled_code = False
        self.ended: int | None = None
        """The step at which `finalize_` ended the run; None before."""
        self.called = called
        self._own = RunLayers(layers, called[0])
        self._begin()

    def _begin(self) -> None:
        self.handle = next(_HANDLES)
        self.hook = RefreshHook(self)
        self._zeros = StaticZeros(lambda: self._active)
        self._attached: list[Optimizer] = []
        self._undo: list[Callable[[], None]] = []
        _LIVE.add(self)
        if self.method != "s-ste" or self.schedule != Schedule():  # which follows the weights alone
            warn_of_unattached(self)

    def __repr__(self) -> str:
        how = "static" if self.mode == "static" else f"dynamic, {self.method}, refreshed every {self.refresh_every} steps"
        ended = "" if self.ended is None else ", ended by finalize_"
        share = sum(layer.weight.numel() for layer in self.layers) / max(1, count_parameters(self.called[0]))
        layers = f"{len(self.layers)} layers ({share:.1%} of all parameters) sparse, {len(self.skipped)} dense"
        return f"Sparsity({self.pattern}, {how}: {layers}, step {self.step}{ended})"

    def __getstate__(self) -> dict[str, Any]:
        # Hooks are on this object's model and optimizers, not on those of a copy.
        own = ("_attached", "hook", "handle", "_zeros", "_undo")
        return {name: value for name, value in self.__dict__.items() if name not in own} | {"on_refresh": [], "written": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    @property
    def attached(self) -> tuple[Optimizer, ...]:
        """The optimizers whose steps it follows, without their wrappers."""
        return tuple(self._attached)

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that it trains sparse; none once `finalize_` has ended the run."""
        return [] if self.ended is not None else [layer.weight for layer in self._active]

    @property
    def phase(self) -> Phase:
        """The phase of the next training forward pass."""
        return self._phase_after(self.step)

    def _phase_after(self, step: int) -> Phase:
        return Phase.FROZEN if self.mode == "static" else self.schedule.phase(step)

    def metrics(self) -> dict[str, float]:
        """Metrics of the last measured refresh, by flat names: ``sparsity/flip_rate``, ``sparsity/LAYER/retained``, ...

        ``sparsity/step`` is the number of optimizer steps when it was measured, up to `measure_every` steps ago.
        """
        self.notice_replaced()
        return as_metrics({name: one for name, one in self.changes.items() if name not in self._own.replaced})

    def report(self) -> PruneReport:
        """A report on the current weights of each sparse layer, and a reason for each dense one, for `bisparse.checkpoint.save`.

        Retained scores and gaps are computed by a search, at the cost of a refresh. After `finalize_` the figures are from that
        time, and a note says so. In a sharded run, all ranks must call it.
        """
        self.notice_replaced()
        results, skipped = self._own.results(self.search.score), (*self.skipped, *self._own.left_dense())
        solver = parse_solver(self.search.solver)
        method = "static training" if self.mode == "static" else f"dynamic training, {self.method}"
        notes = () if self.ended is None else (f"ended by finalize_ after optimizer step {self.ended}; later steps are dense",)
        shown = str(self.pattern), method, type(solver).__name__
        return PruneReport(*shown, results, skipped, notes=notes, history=tuple(self.history))

    def facts_within(self, model: nn.Module) -> dict[str, LayerResult]:
        """The results in `report` for the layers in a model, by name."""
        return self._own.results_within(model.modules(), self.search.score)

    def end(self, facts: Mapping[str, LayerResult]) -> None:
        """Record the figures of layers that are being finalized, and detach once no layer is left."""
        self._own.final |= facts
        if self._own.ended:
            self.detach()
            self.ended, self.due, self.written, self.on_refresh = self.step, False, [], []
            _LIVE.discard(self)

    def notice_replaced(self) -> None:
        """Warn once per sparse layer whose module is no longer in the model, and leave it out from now on."""
        if self.ended is None:
            self._own.notice_replaced(stacklevel=3)

    def attach(self, *optimizers: Optimizer, group: ProcessGroup | None = None) -> Sparsity:
        """Attach to the optimizers that train the model; steps are counted on the first. Returns itself.

        Call it once they are built and the model is wrapped (DDP, FSDP2), before the first step.

        Args:
            group: the ranks that have the same model, such as DistributedDataParallel's process_group; by default those of the
                    device mesh over which the weights are sharded, or all ranks.

        Raises:
            ValueError: an optimizer is already attached, a sparse parameter that requires gradients is in none of them, or ranks
                    have different settings, masks or weights.
        """
        check_not_ended(self.ended, "attach an optimizer")
        self.notice_replaced()
        if not optimizers:
            raise ValueError("attach() needs the optimizer that trains the model")
        if self._attached:
            raise ValueError("this Sparsity is already attached; call detach() first to attach it to another optimizer")
        plain = [unwrapped(optimizer) for optimizer in optimizers]
        check_not_flattened(self._active)
        decays = [layer.decay_or(self.decay) for layer in self._active]
        other = other_run_on(plain, self, live_sparsities())
        error = run_length_error(decays, self.steps) or attach_error(plain, self._active, self.method, other)
        ranks = ranks_of(self._active, group)
        raise_together(ranks, error, "attaching the optimizer")
        check_ranks_agree(self._active, ranks, self._settings())
        self.search.ranks = ranks
        self._attached = plain
        for layer in self._active:
            layer.follow_nothing()
        for index, own in enumerate(plain):
            before, after = functools.partial(self._before_step, own), functools.partial(self._after_step, own, index == 0)
            self._undo += around_each_step(own, before, after)
        if self.mode == "dynamic":
            self.run_decay.warn_if_over(decays, self.step, self.steps)
            self._expect(self.due)
            self.hook.refreshed = self
            self.hook.install(self.called, self._active)
        else:
            self._undo += self._zeros.attach(zip(optimizers, plain, strict=True), self.called)
        return self

    def _settings(self) -> dict[str, object]:
        """What must be equal on all ranks, by the argument of `sparsify_`, so that they refresh and decay at the same steps."""
        same = ("mode", "method", "schedule", "steps", "decay", "measure_every", "check_gradients")
        return {name: getattr(self, name) for name in same} | {
            "refresh": self.refresh_every,
            "decay of single layers": {layer.name: layer.decay for layer in self._active if layer.decay is not None},
            "solver": self.search.solver,
            "the step of the run": self.step,
        }

    def detach(self) -> None:
        """Detach from the optimizers, and remove all hooks."""
        for undo in self._undo:
            undo()
        self._attached, self._undo, self.hook.refreshed = [], [], None

    def _before_step(
        self, own: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if skipped_by_scaler(own):
            return None
        self.notice_replaced()
        replaced = after_closure(args, kwargs, lambda first: self._use_gradients(own, first))
        if replaced is None:
            self._use_gradients(own, True)
        return replaced

    @torch.no_grad()
    def _use_gradients(self, own: Optimizer, first: bool) -> None:
        """Check the gradients of the step, and mask them or add decay; with a closure, after each of its evaluations."""
        held = [one for one in held_by(own, self._active) if one.weight.grad is not None]
        if self.check_gradients:
            check_gradients([one.layer for one in held], self.search.ranks, self.step + 1)
        if self.mode == "static":
            self._zeros.before_step(held)
        else:
            self.run_decay.add(held, own, self.decay, self.step, self.steps, first=first)

    @torch.no_grad()
    def _after_step(self, own: Optimizer, counts: bool) -> None:
        if skipped_by_scaler(own):
            return
        if self.mode == "static":
            self._zeros.after_step(held_by(own, self._active))
        if not counts:
            return
        if self.step == 0:
            for layer in self.layers:
                if (parametrization := layer.parametrization) is not None:
                    parametrization.start = None
        missed = self.due  # there was no training forward pass since the last step
        self.step += 1
        if self.mode == "static":
            return
        before, now = self._phase_after(self.step - 1), self.phase
        turns = (before is Phase.DENSE) != (now is Phase.DENSE)
        self._expect(missed or turns or (now is Phase.SPARSE and self.step % self.refresh_every == 0))
        if missed or (turns and self.in_compiled_code):
            self.refresh_due()

    def _expect(self, due: bool) -> None:
        self.due = due
        self.written = [tensor for layer in self._active for tensor in layer.refreshed_tensors] if due else []

    @torch.no_grad()
    def refresh_due(self) -> None:
        """Refresh the masks, or change to the dense phase, if that is due.

        The next training forward pass calls it. In a distributed run, all ranks must call it.
        """
        if not self.due:
            return
        gathered_again(self.called)
        if self.phase is Phase.DENSE:
            for layer in self._active:
                layer.make_dense()
        else:
            self.refresh()
        self._expect(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Find the masks of the current weights now. In a distributed run, all ranks must call it.

        The weights were trained with the previous masks: continue to train before you evaluate, save or finalize.
        """
        check_not_ended(self.ended, "refresh the masks")
        self.notice_replaced()
        if absent := [layer.name for layer in self._active if layer.weight.is_meta]:
            raise ValueError(f"{absent[0]}: its weight is on the meta device and has no values to find a mask for")
        for layer in self._active:
            layer.follow_nothing()
        layers = [layer for layer in self._active if layer.weight.requires_grad or layer.is_dense]
        start = time.perf_counter()
        found = self.search.masks([layer.name for layer in layers], share=True)
        self.search_seconds += time.perf_counter() - start
        self.refreshes += 1
        measured = bool(self.measure_every) and (self.refreshes - 1) % max(1, self.measure_every // self.refresh_every) == 0
        solver = self.search.solver
        changes: dict[str, MaskChange] = {}
        for layer in layers:
            mask, make_scores = found[layer.name]
            if measured:
                scores = from_matrices(make_scores(), layer.layout, mask.shape)
                optimal = not layer.transposable or (parse_solver(solver)).exact
                old = layer.mask.to(mask.device)
                changes[layer.name] = measure_change(layer, self.step, old, mask, scores, optimal=optimal)
            layer.use_mask(mask, proved=solver is None)  # the default solver's masks are valid; a check would synchronise
        self._expect(False)
        if measured:
            self.changes |= changes
            record(self.history, changes.values())
            for callback in self.on_refresh:
                callback(self)

    def state_dict(self) -> dict[str, Any]:
        """The state that the model's state_dict lacks: counters, history, prices and static masks, as tensors and plain values.

        After `finalize_` it has the step at which the run ended, and cannot be loaded.
        """
        self.notice_replaced()
        layers = {
            layer.name: entry_of(layer, self.mode, self.search.prices.get(layer.name), self.run_decay.done.get(layer.name))
            for layer in self._active
        }
        numbers = {"step": self.step, "refreshes": self.refreshes, "due": self.due, "ended": self.ended}
        return {"version": STATE_VERSION, "mode": self.mode, **numbers, "history": history_state(self.history), "layers": layers}

    @property
    def _active(self) -> list[SparseLayer]:
        """The layers that are neither finalized nor replaced."""
        return self._own.active

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of another `Sparsity` with the same layers and patterns.

        Raises:
            ValueError: the state has different layers, patterns, shapes or mode, or one of the two runs has ended.
        """
        check_not_ended(self.ended, "load a state")
        self.notice_replaced()
        check_state(state, self._active, self.mode)
        saved, own = state["layers"], {layer.name: layer for layer in self._active}
        self._zeros.masks_changed()
        for layer in self._active:
            layer.follow_nothing()
        self.step, self.refreshes = int(state["step"]), int(state["refreshes"])
        self.history = history_from_state(state.get("history", []), self.step)
        for name, entry in saved.items():
            load_entry(entry, own[name], own[name].decay_or(self.decay), self.search.prices, self.run_decay.done)
        done = self.step - 1 if state["due"] else self.step  # a due change has not happened yet
        dense = self._phase_after(done) is Phase.DENSE
        for layer in self._active:
            layer.resume_phase(dense=dense, warm_up=self.step <= self.schedule.dense_until)
        self._expect(bool(state["due"]))


def live_sparsities() -> list[Sparsity]:
    """All `Sparsity` objects that `finalize_` has not ended."""
    return list(_LIVE)
