"""Statistics of stages, batch by batch, over the ranks that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bisparse.layers import Layer
from bisparse.process_group import Ranks
from bisparse.pruning.calibration.expert_inputs import ExpertInputs, number_of_experts
from bisparse.pruning.calibration.moments import Moments
from bisparse.pruning.calibration.statistics import (
    ExpertStatistics,
    Statistic,
    Statistics,
    batched,
    input_key,
    positions_shape,
)
from bisparse.token_masks import fitted

__all__ = ["HOLD_OUT_EVERY", "Collector", "Data", "Stage"]

HOLD_OUT_EVERY = 5


@dataclass(frozen=True)
class Stage:
    """A stage: layers that the caller may change now, with their statistics."""

    layers: tuple[Layer, ...]
    statistics: tuple[Statistics, ...]


@dataclass(frozen=True)
class Data:
    """The calibration data, and the statistics to collect from it."""

    batches: list[Any]
    needs: frozenset[Statistic]
    ranks: Ranks
    expert_floor: float = 0
    """Experts that fewer tokens per input are routed to are calibrated on all tokens."""

    @property
    def own(self) -> list[tuple[int, Any]]:
        """The batches that this rank runs, with their numbers among all."""
        return list(self.ranks.share(list(enumerate(self.batches))))


class Collector:
    """Moments of stages over all batches; every fifth batch, or part of each batch, is held out if a method needs that.

    Layers of a stage see the same input: those with the same `input_key` share one set of moments.
    """

    def __init__(self, stages: Sequence[Sequence[Layer]], calls: dict[str, int], data: Data) -> None:
        needs = data.needs
        self.ranks = data.ranks
        self.by_batch = len(data.batches) >= HOLD_OUT_EVERY
        self._shared: dict[str, str] = {}
        leaders: list[Layer] = []
        for stage in stages:
            reading: dict[Any, str] = {}
            for layer in stage:
                # A layer that is called more than once also sees inputs that the others do not.
                shared = calls.get(layer.name, 1) == 1
                leader = reading.setdefault(input_key(layer), layer.name) if shared else layer.name
                self._shared[layer.name] = leader
                if leader == layer.name:
                    leaders.append(layer)
        self._plain = needs - {Statistic.HELD_OUT}
        self._holds_out = Statistic.HELD_OUT in needs
        self._floor = data.expert_floor
        self.fit: dict[str, Moments] = {}
        self.held: dict[str, Moments] = {}
        self._experts: dict[str, list[Layer]] = {}
        """By stack of experts, a layer for each expert, under whose name it has its moments."""
        self._routed: dict[str, list[int]] = {}
        self._widened: dict[str, list[int]] = {}
        """By stack, the experts whose moments are of all tokens."""
        self._before: dict[str, tuple[Moments, Moments | None]] = {}
        """By expert, the moments of its routed tokens, for modules that cannot be run on all tokens."""
        for layer in leaders:
            if experts := number_of_experts(layer):
                self._experts[layer.name] = [replace(layer, name=f"{layer.name}[{expert}]") for expert in range(experts)]
                self._routed[layer.name] = [0] * experts
            for one in self._experts.get(layer.name, [layer]):
                self._start(one)

    def _start(self, layer: Layer) -> None:
        self.fit[layer.name] = Moments(layer, self._plain)
        if self._holds_out:
            self.held[layer.name] = Moments(layer, self._plain)

    def add(
        self, index: int, layer: Layer, x: Tensor | ExpertInputs, z: Tensor | None, keep: Tensor | None, part: int | None
    ) -> None:
        """Add a batch of a layer's inputs. An input is counted once for layers that share their moments."""
        if isinstance(x, Tensor):
            own, dense = batched(layer, x), None if z is None else batched(layer, z)
            self._add(index, layer, own, dense, fitted(keep, positions_shape(layer, own)), part)
        elif layer.name in self._experts:
            # The two networks route tokens differently, so that dense inputs of an expert's tokens are not known.
            experts = self._experts[layer.name]
            if layer.name in self._widened:
                for expert, rows in x.all_tokens(layer, self._widened[layer.name], keep).items():
                    self._add(index, experts[expert], rows, None, None, None)
                return
            for expert, rows in x.routed(layer, keep).items():
                self._routed[layer.name][expert] += rows.shape[0]
                self._add(index, experts[expert], rows, None, None, None)

    def widen(self) -> list[Layer]:
        """Prepare for a second pass with all tokens for the experts below the floor; returns the stacks that have any.

        All ranks of a group call this together.
        """
        counts = self.ranks.all(self._routed)
        stacks = []
        for name, experts in self._experts.items():
            self._routed[name] = [sum(numbers) for numbers in zip(*(one[name] for one in counts), strict=True)]
            layer = experts[0]
            tokens = self._floor * layer.weight.shape[1 if layer.layout.inputs_first else 2]
            if few := [expert for expert, number in enumerate(self._routed[name]) if number < tokens]:
                self._widened[name] = few
                for one in (experts[expert] for expert in few):
                    self._before[one.name] = self.fit[one.name], self.held.get(one.name)
                    self._start(one)
                stacks.append(replace(layer, name=name))
        return stacks

    def _add(self, index: int, layer: Layer, x: Tensor, z: Tensor | None, keep: Tensor | None, part: int | None) -> None:
        if layer.name not in self.fit:
            return
        if not self.held:
            self.fit[layer.name].add(x, z, keep, part, index)
        elif self.by_batch:
            chosen = self.held if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else self.fit
            chosen[layer.name].add(x, z, keep, part, index)
        else:
            cut = x.shape[0] - x.shape[0] // HOLD_OUT_EVERY
            for chosen, span in ((self.fit, slice(0, cut)), (self.held, slice(cut, None))):
                if x[span].shape[0]:
                    own_keep = None if keep is None else keep[span]
                    chosen[layer.name].add(x[span], None if z is None else z[span], own_keep, part, index)

    def stage(self, layers: Sequence[Layer]) -> Stage:
        found: dict[str, Statistics] = {}
        for layer in layers:
            leader = self._shared[layer.name]
            if leader not in found:
                found[leader] = self._of_experts(leader) if leader in self._experts else self._statistics(leader)
        return Stage(tuple(layers), tuple(found[self._shared[layer.name]] for layer in layers))

    def _of_experts(self, stack: str) -> Statistics:
        counts = self._routed[stack]
        if stack not in self._widened:
            counts = [sum(one) for one in zip(*self.ranks.all(counts), strict=True)]
        parts = []
        for layer, routed in zip(self._experts[stack], counts, strict=True):
            statistics, wide = self._statistics(layer.name), layer.name in self._before
            if wide and statistics.columns == 0:
                self.fit[layer.name], held = self._before[layer.name]
                if held is not None:
                    self.held[layer.name] = held
                statistics, wide = self._statistics(layer.name), False
            parts.append(ExpertStatistics(routed, wide, statistics))
        return Statistics(sum(part.statistics.columns for part in parts), experts=tuple(parts))

    def _statistics(self, name: str) -> Statistics:
        for moments in (self.fit, self.held):
            if name in moments:
                moments[name].share(self.ranks)
        own = self.fit[name].statistics()
        return _with_held_out(own, self.held[name].statistics()) if self.held else own

    @property
    def bytes(self) -> int:
        before = [one for pair in self._before.values() for one in pair if one is not None]
        return sum(moments.bytes for moments in (*self.fit.values(), *self.held.values(), *before))


def _with_held_out(own: Statistics, held_out: Statistics) -> Statistics:
    """The statistics with those held out, where these leave anything to be fitted to."""
    if own.columns == 0:
        # Only batches that were to be held out went through the layer.
        own, held_out = held_out, Statistics(0)
    if held_out.columns and (own.cross_covariance is None or held_out.cross_covariance is None):
        # A fit to the dense network's inputs cannot be evaluated on batches without them.
        own, held_out = (replace(one, cross_covariance=None, dense_mean=None, dense_covariance=None) for one in (own, held_out))
    return replace(own, held_out=held_out)
