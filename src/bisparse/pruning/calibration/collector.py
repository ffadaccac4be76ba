"""Statistics of stages, batch by batch, over the ranks that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bisparse.layers import Layer
from bisparse.process_group import Ranks
from bisparse.pruning.calibration.moments import Moments
from bisparse.pruning.calibration.statistics import Statistic, Statistics, input_key

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
        plain = needs - {Statistic.HELD_OUT}
        self.fit = {layer.name: Moments(layer, plain) for layer in leaders}
        self.held = {layer.name: Moments(layer, plain) for layer in leaders} if Statistic.HELD_OUT in needs else {}

    def add(self, index: int, layer: Layer, x: Tensor, z: Tensor | None, keep: Tensor | None, part: int | None) -> None:
        """Add a batch of a layer's inputs. An input is counted once for layers that share their moments."""
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
                    whole = keep is None or keep.shape[0] != x.shape[0]
                    own_keep = keep if whole else keep[span] if keep is not None else None
                    chosen[layer.name].add(x[span], None if z is None else z[span], own_keep, part, index)

    def stage(self, layers: Sequence[Layer]) -> Stage:
        found: dict[str, Statistics] = {}
        for layer in layers:
            leader = self._shared[layer.name]
            if leader not in found:
                for moments in (self.fit, self.held):
                    if leader in moments:
                        moments[leader].share(self.ranks)
                own = self.fit[leader].statistics()
                found[leader] = _with_held_out(own, self.held[leader].statistics()) if self.held else own
        return Stage(tuple(layers), tuple(found[self._shared[layer.name]] for layer in layers))

    @property
    def bytes(self) -> int:
        return sum(moments.bytes for moments in (*self.fit.values(), *self.held.values()))


def _with_held_out(own: Statistics, held_out: Statistics) -> Statistics:
    """The statistics with those held out, where these leave anything to be fitted to."""
    if own.columns == 0:
        # Only batches that were to be held out went through the layer.
        own, held_out = held_out, Statistics(0)
    if held_out.columns and (own.cross_covariance is None or held_out.cross_covariance is None):
        # A fit to the dense network's inputs cannot be evaluated on batches without them.
        own, held_out = (replace(one, cross_covariance=None, dense_mean=None, dense_covariance=None) for one in (own, held_out))
    return replace(own, held_out=held_out)
