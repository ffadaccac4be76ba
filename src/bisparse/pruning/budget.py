"""A global budget: each layer gets the pattern that costs the network least, within a total of weights, bytes or time.

The cost of a pattern for a layer is an estimate of what its mask does to the network's output; see `budget_costs`. The sum over
layers is minimised exactly; see `choose`. Using this sum as the damage to the network is an assumption. A layer can be denser
than the budget only if another one is sparser, so the list of patterns should include some that are sparser than the budget.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from bisparse.diversity import hardware
from bisparse.layers import Filter, Layer, Skipped, find_layers, matrix_sides, remainder_reason
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured, parse_pattern
from bisparse.process_group import Ranks
from bisparse.pruning.budget_costs import Losses, costs_of, losses_of
from bisparse.pruning.calibration.hooks import unreached_reason
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.fingerprint import fingerprint, stable_repr
from bisparse.pruning.knapsack import Choice, choose
from bisparse.pruning.layer import check_can_be_written
from bisparse.tiles import Layout

__all__ = ["Budget", "Plan", "parse_budget", "plan_within"]

DENSE = "dense"
Times = Callable[[str, tuple[int, ...], str], float]


@dataclass(frozen=True)
class Budget:
    """A total for all layers of a network, as a fraction of that of the dense layers. Exactly one of the three is given.

    Args:
        weights: number of kept weights.
        bytes: bytes of the kept values in the layer's dtype and of the positions that hardware stores with them; see `hardware`.
        time: the sum of measured times.
        times: for `time`: a function ``(layer name, shape of its weight, pattern)`` -> seconds, with the pattern as text or
            ``"dense"``.

    >>> Budget(weights=0.5)
    Budget(weights=0.5)
    """

    weights: float | None = None
    bytes: float | None = None
    time: float | None = None
    times: Times | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in ("weights", "bytes", "time") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"a budget limits exactly one of weights, bytes or time; given: {', '.join(given) or 'none'}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"Budget({name}={value!r}): expected a fraction of the dense layers, above 0 and at most 1")
        if (self.time is None) != (self.times is None):
            raise ValueError(
                "a budget of time requires times=, the measured seconds per layer and pattern; other budgets do not take it"
            )

    @property
    def unit(self) -> str:
        """The limited quantity: "weights", "bytes" or "time"."""
        return next(name for name in ("weights", "bytes", "time") if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The limit as a fraction."""
        return float(getattr(self, self.unit))

    def size(self, layer: Layer, structure: Structure | None) -> float:
        """The weights, bytes or seconds of a layer at a structure, or dense (None)."""
        weight = layer.weight
        if self.times is not None:
            text = DENSE if structure is None else str(structure)
            seconds = float(self.times(layer.name, tuple(weight.shape), text))
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"times of {layer.name} at {text}: {seconds}; expected seconds >= 0")
            return seconds
        kept = weight.numel() if structure is None else _most_kept(layer, structure)
        if self.unit == "weights":
            return float(kept)
        bits = 8 * weight.element_size() * kept
        if structure is not None:
            bits += _position_bits(structure, kept, weight.numel())
        return bits / 8

    def __str__(self) -> str:
        return f"{100 * self.fraction:.4g} % of the {self.unit}"

    def __repr__(self) -> str:
        given = [f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if getattr(self, one.name) is not None]
        return f"Budget({', '.join(given)})"


def parse_budget(budget: str | float | Budget) -> Budget:
    """Make a budget of weights from a text such as ``"50%"`` or a fraction; a `Budget` is returned unchanged.

    >>> parse_budget("50%")
    Budget(weights=0.5)
    """
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, str):
        try:
            number = float(budget.strip().removesuffix("%"))
        except ValueError as error:
            raise ValueError(f"budget={budget!r:.60}: expected a percentage of the weights such as '50%', or a Budget") from error
        return Budget(weights=number / 100 if budget.strip().endswith("%") else number)
    return Budget(weights=budget)


@dataclass(frozen=True)
class Plan:
    """The pattern of each layer under a budget."""

    layers: tuple[tuple[Layer, Structure], ...]
    """The layers to prune."""
    left_dense: tuple[Skipped, ...]
    reasons: Mapping[str, str]
    """By layer, the reason for its pattern."""
    note: str
    choice: Choice

    @property
    def most(self) -> Structure:
        """The structure of most layers."""
        return Counter(structure for _, structure in self.layers).most_common(1)[0][0]

    @property
    def others(self) -> dict[str, str | Structure]:
        """The structures of layers with a different one."""
        return {layer.name: structure for layer, structure in self.layers if structure != self.most}


def plan_within(
    model: nn.Module,
    budget: str | float | Budget,
    patterns: object,
    batches: Sequence[Any] | None,
    options: Options,
    ranks: Ranks,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    remainder: str = "pad",
    layouts: Mapping[str, str | Layout] | None = None,
) -> Plan:
    """Choose the structure of each layer such that the network loses least within a budget. Changes nothing.

    Layers that calibration does not reach, or to which no pattern applies, stay dense and do not count.

    Raises:
        ValueError: no patterns, a budget too small for the sparsest of them, or one that leaves every layer dense.
    """
    budget, structures = parse_budget(budget), _structures(patterns)
    found, left_dense = find_layers(model, include, exclude, remainder=remainder, layouts=layouts)
    allowed: dict[str, list[Structure | None]] = {}
    for layer in found:
        check_can_be_written(layer)
        sides = matrix_sides(layer.weight, layer.layout)
        refused = {one: remainder_reason(sides, one, remainder, layer.name) for one in structures if one is not None}
        if all(refused.values()):
            left_dense.append(Skipped(layer.name, next(reason for reason in refused.values() if reason)))
        else:
            allowed[layer.name] = [one for one in structures if one is None or refused[one] is None]
    layers = [layer for layer in found if layer.name in allowed]
    if not layers:
        raise ValueError(f"the model {type(model).__name__} has no layer to prune; use include to choose layers by name")
    if ranks.size > 1:
        ranks.agree(
            {
                "budget=": stable_repr(budget),
                "patterns=": ", ".join(map(_text, structures)),
                "the layers": ", ".join(allowed),
                "the digest of the data": "none" if batches is None else fingerprint(batches),
            }
        )
    losses = losses_of(model, layers, allowed, batches, options, ranks)
    left_dense += [Skipped(one.name, unreached_reason(one)) for one in layers if one.name not in losses]
    layers = [layer for layer in layers if layer.name in losses]
    costs = None if batches is None else costs_of(model, layers, losses, batches, options, ranks)
    return _chosen(budget, layers, allowed, losses, left_dense, costs)


def _structures(patterns: object) -> list[Structure | None]:
    if isinstance(patterns, str | Mapping) or not isinstance(patterns, Iterable):
        raise ValueError(f"patterns={patterns!r:.60}: a budget needs a list of patterns, such as ['2:4-T', '4:8-T', 'dense']")
    found = [None if one == DENSE else parse_pattern(one) for one in patterns]
    if not any(one is not None for one in found):
        raise ValueError(f"patterns={list(patterns)!r:.60}: a budget needs at least one pattern that prunes")
    return list(dict.fromkeys(found))


def _chosen(
    budget: Budget,
    layers: Sequence[Layer],
    allowed: Mapping[str, Sequence[Structure | None]],
    losses: Mapping[str, Losses],
    left_dense: list[Skipped],
    costs: Mapping[str, Sequence[float]] | str | None,
) -> Plan:
    """The structures with the smallest sum of costs.

    Args:
        costs: by layer and structure. A text says why they are not known, and None that there is no data: the fractions that
            are lost take their place.
    """
    sizes = [[budget.size(layer, one) for one in allowed[layer.name]] for layer in layers]
    total = sum(budget.size(layer, None) for layer in layers)
    smallest = sum(map(min, sizes))
    capacity = budget.fraction * total * (1 + 1e-12)
    if smallest > capacity:
        raise ValueError(
            f"the budget of {budget} is too small: the sparsest patterns need {smallest / total:.4g} of the dense layers"
        )
    known = costs if isinstance(costs, Mapping) else {name: own.fractions for name, own in losses.items()}
    choice = choose([known[layer.name] for layer in layers], sizes, capacity)
    what = "of the squared magnitude" if costs is None else "of the output's energy"
    planned, reasons, lost = [], {}, 0.0
    for layer, option in zip(layers, choice.options, strict=True):
        structures, fractions = allowed[layer.name], losses[layer.name].fractions
        lost += fractions[option]
        reason = _reason(structures, fractions, option, budget, what)
        if (structure := structures[option]) is None:
            left_dense.append(Skipped(layer.name, reason))
        else:
            planned.append((layer, structure))
            reasons[layer.name] = reason
    if not planned:
        raise ValueError(f"the budget of {budget} leaves every layer dense: there is nothing to prune")
    counts = Counter(_text(allowed[layer.name][option]) for layer, option in zip(layers, choice.options, strict=True))
    proof = "proved optimal" if choice.gap == 0 else f"within {choice.gap:.1e} of the optimum"
    used = ", ".join(f"{count} {text}" for text, count in counts.most_common())
    weighed = ""
    if isinstance(costs, Mapping):
        weighed = ", with layers weighed by how much the network's output depends on theirs"
    elif costs is not None:
        weighed = f", with all layers weighed alike: {costs}"
    note = (
        f"budget of {budget} of {len(layers)} layers, of which the choice takes {100 * choice.size / total:.4g} %: "
        f"{used}; mean loss {lost / len(layers):.4g} {what} per layer before any fit{weighed}; {proof} (the bound of the linear "
        f"relaxation is {1 - choice.relaxed / choice.cost if choice.cost > 0 else 0.0:.2%} below)"
    )
    if smallest > (1 - 1e-9) * budget.fraction * total:
        note += "; the sparsest patterns use the whole budget, so no layer can have a denser one: add sparser patterns"
    return Plan(tuple(planned), tuple(left_dense), reasons, note, choice)


def _text(structure: Structure | None) -> str:
    return DENSE if structure is None else str(structure)


def _reason(structures: Sequence[Structure | None], costs: Sequence[float], option: int, budget: Budget, what: str) -> str:
    others = [f"{_text(one)} {cost:.2%}" for one, cost in zip(structures, costs, strict=True) if one is not structures[option]]
    alternatives = f" ({', '.join(others)})" if others else ""
    return f"{_text(structures[option])} under the budget of {budget}: loses {costs[option]:.2%} {what}{alternatives}"


def _most_kept(layer: Layer, structure: Structure) -> int:
    """The maximum number of weights that a layer keeps; if M does not divide a side, the last group is shorter."""
    rows, columns = matrix_sides(layer.weight, layer.layout)
    matrices = layer.weight.numel() // max(1, rows * columns)
    if isinstance(structure, Unstructured):
        return matrices * structure.kept(rows * columns)
    assert isinstance(structure, Pattern | Sequential | Paired)

    def along(length: int) -> int:
        return length // structure.m * structure.n + min(structure.n, length % structure.m)

    kept = rows * along(columns)
    if isinstance(structure, Pattern) and structure.transposable:
        kept = min(kept, columns * along(rows))
    return matrices * kept


def _position_bits(structure: Structure, kept: int, weights: int) -> int:
    """Bits of the positions of the kept weights, as hardware stores them; one per weight for unstructured masks."""
    if (bits := hardware(structure).metadata_bits_per_kept) is None:
        return weights
    return bits * (kept // 2 if isinstance(structure, Paired) else kept)
