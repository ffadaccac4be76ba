"""Sparse training: `sparsify_` a model, `attach` its `Sparsity` to the optimizer, train as always, `finalize_`.

Everything happens at two places of a step: the forward pass reads masked weights (dynamic runs), and hooks before and after
the optimizer's own step add the masked decay, keep static zeros at zero, count, and refresh the masks. So gradient
accumulation, clipping and skipped mixed-precision steps need no care: what counts is an optimizer step that happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bisparse.layers import Skipped
from bisparse.pattern import Structure
from bisparse.results import LayerResult, PruneReport
from bisparse.solution import verify
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import from_matrices
from bisparse.training.layer import SparseLayer, keep_only_, local
from bisparse.training.mask_search import MaskSearch, Prices, Score
from bisparse.training.metrics import MaskChange, as_metrics, measure_change
from bisparse.training.optimizer import DEFAULT_DECAY, Attached, default_decay, skipped_by_scaler, unwrapped
from bisparse.training.rank_consistency import check_ranks_agree, is_sharded, raise_together, ranks_of
from bisparse.training.schedule import Phase, Schedule

__all__ = ["Method", "Mode", "Sparsity"]

Mode = Literal["dynamic", "static"]
Method = Literal["ste", "sr-ste", "masked-decay", "s-ste"]

STATE_VERSION = 1


class Sparsity:
    """The sparse layers of a model in training. Made by `sparsify_`.

    Its state is what a checkpoint of the model does not hold: the step counter, the prices that mask searches start from,
    and the masks of a static run. It has `state_dict` and `load_state_dict` as torch's own objects do.
    """

    def __init__(
        self,
        layers: list[SparseLayer],
        skipped: list[Skipped],
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
        self._attached: list[Attached] = []
        self._handles: list[RemovableHandle] = []

    def __repr__(self) -> str:
        how = "static" if self.mode == "static" else f"dynamic, {self.method}, refreshed every {self.refresh_every} steps"
        return f"Sparsity({self.pattern}, {how}: {len(self.layers)} layers sparse, {len(self.skipped)} dense, step {self.step})"

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the optimizers of this object, not to those of its copies.
        return self.__dict__ | {"_attached": [], "_handles": [], "on_refresh": []}

    @property
    def phase(self) -> Phase:
        """The phase of the forward pass now."""
        return Phase.FROZEN if self.mode == "static" else self.schedule.phase(self.step)

    def metrics(self) -> dict[str, float]:
        """The last measured refresh as flat numbers: ``sparsity/flip_rate``, ``sparsity/LAYER/retained``, ..."""
        return as_metrics(self.changes)

    def report(self) -> PruneReport:
        """Each sparse layer, and each dense one with its reason, as `bisparse.checkpoint.save` keeps them in the sidecar."""
        results = []
        for layer in self.layers:
            change = self.changes.get(layer.name)
            weight = layer.weight
            results.append(
                LayerResult(
                    name=layer.name,
                    parameter=layer.key,
                    shape=tuple(weight.shape),
                    dtype=str(weight.dtype).removeprefix("torch."),
                    layout=layer.layout,
                    pattern=str(layer.pattern),
                    density=float(layer.mask.double().mean()) if layer.active else float((weight != 0).double().mean()),
                    retained=None if change is None else change.retained,
                    gap=None if change is None else change.distance,
                    value=None,
                    time_s=0.0,
                )
            )
        solver = parse_solver(self.search.solver)
        method = "static training" if self.mode == "static" else f"dynamic training, {self.method}"
        return PruneReport(str(self.pattern), method, type(solver).__name__, tuple(results), tuple(self.skipped))

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
        if not optimizers:
            raise ValueError("attach() needs the optimizer that trains the model")
        if self._attached:
            raise ValueError("this Sparsity is attached already; call detach() first to follow another optimizer")
        plain = [unwrapped(optimizer) for optimizer in optimizers]
        held = {id(held) for one in plain for group in one.param_groups for held in group["params"]}
        missing = [one.name for one in self.layers if one.weight.requires_grad and id(one.weight) not in held]
        error = None
        if missing:
            error = ValueError(
                f"the optimizer does not hold the weights of {len(missing)} sparse layers, the first {missing[0]!r}: build it "
                "from model.parameters() after sparsify_ (and after wrapping the model), or freeze these layers, or exclude them"
            )
        ranks = ranks_of(self.layers, group)
        raise_together(ranks, error, "attaching the optimizer")
        check_ranks_agree(self.layers, ranks)
        self.search.ranks = ranks
        self._attached = [Attached(one) for one in plain]
        for index, own in enumerate(self._attached):
            self._handles.append(own.optimizer.register_step_pre_hook(lambda *_, own=own: self._before_step(own)))
            self._handles.append(
                own.optimizer.register_step_post_hook(lambda *_, own=own, first=index == 0: self._after_step(own, first))
            )
        if self.mode == "static":
            # Masked when it is accumulated, so that clipping measures the gradient that is used.
            for layer in self.layers:
                if layer.weight.requires_grad:
                    hook = layer.weight.register_post_accumulate_grad_hook(lambda _, own=layer: _mask_gradient(own))
                    self._handles.append(hook)
        return self

    def detach(self) -> None:
        """Stop following the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._attached, self._handles = [], []

    # -- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, own: Attached) -> None:
        optimizer = own.optimizer
        if skipped_by_scaler(optimizer):
            return
        layers = [layer for layer in own.held(self.layers) if layer.active and layer.weight.grad is not None]
        if self.check_gradients:
            self._check_gradients(layers)
        if self.mode == "static":
            for layer in layers:
                _mask_gradient(layer)
        elif self.method in ("sr-ste", "masked-decay"):
            rates = {id(held): group["lr"] for group in optimizer.param_groups for held in group["params"]}
            scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves, after this hook
            for layer in layers:
                decay = layer.decay if layer.decay is not None else self.decay
                if decay is None:
                    decay = default_decay(optimizer) if self.method == "masked-decay" else DEFAULT_DECAY
                if decay == 0.0:
                    continue
                weight = local(layer.weight.detach())
                pruned = weight * ~layer.local_mask
                if self.method == "sr-ste":
                    weight.sub_(pruned, alpha=float(rates[id(layer.weight)]) * decay)
                else:
                    gradient = layer.weight.grad
                    assert gradient is not None
                    local(gradient).add_(pruned, alpha=decay * (float(scale) if scale is not None else 1.0))

    @torch.no_grad()
    def _after_step(self, own: Attached, counts: bool) -> None:
        if skipped_by_scaler(own.optimizer):
            return
        if self.mode == "static":
            for layer in own.held(self.layers):
                if layer.active:
                    layer.zero_pruned()
        if not counts:
            return
        if self.step == 0:
            for layer in self.layers:
                if (parametrization := layer.parametrization) is not None:
                    parametrization.start = None
        self.step += 1
        if self.mode == "static":
            return
        before, now = self.schedule.phase(self.step - 1), self.schedule.phase(self.step)
        if now is Phase.DENSE:
            if before is not Phase.DENSE:
                self._make_dense()
        elif before is Phase.DENSE or (now is Phase.SPARSE and self.step % self.refresh_every == 0):
            self.refresh()

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
        """Find the masks of the present weights now. In a distributed run, all ranks must call it."""
        layers = [layer for layer in self.layers if layer.active and (layer.weight.requires_grad or self._is_dense(layer))]
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
        if measured:
            for tell in self.on_refresh:
                tell(self)

    @staticmethod
    def _is_dense(layer: SparseLayer) -> bool:
        own = layer.parametrization
        return own is not None and own.dense

    def _make_dense(self) -> None:
        for layer in self.layers:
            own = layer.parametrization
            if own is not None:
                own.dense = True
                own.mask.fill_(True)
                layer.mask_changed()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the model's state_dict lacks: counter, prices, static masks. Tensors, numbers and texts only."""
        layers: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            entry: dict[str, Any] = {"pattern": str(layer.pattern), "shape": list(layer.mask.shape)}
            if layer.name in self.search.prices:
                prices = self.search.prices[layer.name]
                entry |= {"u": prices.u, "v": prices.v, "exponent": prices.exponent}
            if self.mode == "static":
                entry["mask"] = layer.mask
            layers[layer.name] = entry
        return {"version": STATE_VERSION, "mode": self.mode, "step": self.step, "refreshes": self.refreshes, "layers": layers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run where another `Sparsity` of the same layers and patterns left it.

        Raises:
            ValueError: the state is of other layers, patterns, shapes, or of the other mode.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"sparsity state of version {state.get('version')!r}: this release reads version {STATE_VERSION}")
        if state["mode"] != self.mode:
            raise ValueError(f"the checkpoint is of a {state['mode']} run, this one is {self.mode}: pass mode={state['mode']!r}")
        saved, own = state["layers"], {layer.name: layer for layer in self.layers}
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
        dense = self.phase is Phase.DENSE
        for layer in self.layers:
            parametrization = layer.parametrization
            if parametrization is not None:
                parametrization.dense, parametrization.start = dense, None
            layer.mask_changed()


def check_mask(name: str, mask: Tensor, pattern: Structure, layer: SparseLayer) -> None:
    """Raise ValueError unless a mask has the layer's shape and obeys its pattern."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: a mask must be a bool tensor, True = kept; this one is of {found}")
    if mask.shape != layer.weight.shape:
        raise ValueError(f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(layer.weight.shape)}")
    verify(mask, pattern, layout=layer.layout, name=name).check()


def _mask_gradient(layer: SparseLayer) -> None:
    gradient = layer.weight.grad
    if gradient is not None and layer.active:
        keep_only_(local(gradient.detach()), layer.local_mask)
