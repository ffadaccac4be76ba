"""A global budget: each layer gets the pattern that costs the network least, within a total of weights, bytes or time.

The cost of a pattern for a layer is the fraction of the energy of its output that is lost,

    |W x - (S * W) x|^2 / |W x|^2 = tr(D G D^T) / tr(W G W^T),    D = W - S * W,    G = E[x x^T]

with G from calibration data and S the mask that keeps most of ``w_oi^2 G_ii``; without data, the fraction of squared magnitude.
It is measured on the dense network, before kept weights are fitted. With data, layers are weighed by how much the output of the
network depends on theirs, where gradients can tell (`output_sensitivity`). The sum over layers is minimised exactly; see
`choose`. Using this sum as the damage to the network is an assumption. A layer can be denser than the budget only if another one
is sparser, so the list of patterns should include some that are sparser than the budget.
Measured (SmolLM2-135M, 50 % of the weights, SparseGPT on 32 sequences, perplexity): every layer at 16:32-T 95.1; a choice from
8:32-T to 24:32-T and dense 81.6, without the weights of layers 98.7.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from bisparse.diversity import hardware
from bisparse.layers import Filter, Layer, Skipped, find_layers, matrix_sides, remainder_reason
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured, parse_pattern
from bisparse.process_group import Ranks
from bisparse.pruning.calibration.calibrate import Walk, calibrate
from bisparse.pruning.calibration.finished_block import FinishedBlock
from bisparse.pruning.calibration.hooks import none_reached, unreached_reason
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic, Statistics, full_precision
from bisparse.pruning.experts import expert_problems
from bisparse.pruning.fingerprint import fingerprint, stable_repr
from bisparse.pruning.knapsack import Choice, choose
from bisparse.pruning.layer import check_can_be_written, layer_problem
from bisparse.pruning.methods.base import LayerProblem
from bisparse.pruning.sensitivity import output_sensitivity
from bisparse.solvers import Solver
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
    losses = _losses(model, layers, allowed, batches, options, ranks)
    left_dense += [Skipped(one.name, unreached_reason(one)) for one in layers if one.name not in losses]
    layers = [layer for layer in layers if layer.name in losses]
    weights = None if batches is None else _weights(model, layers, losses, batches, options, ranks)
    return _chosen(budget, layers, allowed, losses, left_dense, weights)


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
    weights: Mapping[str, float] | str | None,
) -> Plan:
    """The cheapest structures. `weights`: of the layers; or why all have the same; None: there is no data."""
    sizes = [[budget.size(layer, one) for one in allowed[layer.name]] for layer in layers]
    total = sum(budget.size(layer, None) for layer in layers)
    smallest = sum(map(min, sizes))
    capacity = budget.fraction * total * (1 + 1e-12)
    if smallest > capacity:
        raise ValueError(
            f"the budget of {budget} is too small: the sparsest patterns need {smallest / total:.4g} of the dense layers"
        )
    own = weights if isinstance(weights, Mapping) else {layer.name: 1.0 for layer in layers}
    costs = [[own[layer.name] * one for one in losses[layer.name].fractions] for layer in layers]
    choice = choose(costs, sizes, capacity)
    what = "of the squared magnitude" if weights is None else "of the output's energy"
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
    if isinstance(weights, Mapping):
        weighed = ", with layers weighed by how much the network's output depends on theirs"
    elif weights is not None:
        weighed = f", with all layers weighed alike: {weights}"
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


@dataclass(frozen=True)
class Losses:
    """What the patterns of a layer lose."""

    fractions: list[float]
    """By structure, of the energy of the output or, without data, of the squared magnitude."""
    energy: float
    """The output's mean square, summed over channels; without data the squared magnitude."""


def _losses(
    model: nn.Module,
    layers: Sequence[Layer],
    allowed: Mapping[str, Sequence[Structure | None]],
    batches: Sequence[Any] | None,
    options: Options,
    ranks: Ranks,
) -> dict[str, Losses]:
    """By layer, the loss of each allowed structure, without layers that no batch reached. The ranks share the work."""
    found: dict[str, Losses] = {}

    def add(part: Iterable[tuple[Layer, Statistics | None]]) -> None:
        own = {}
        for layer, statistics in ranks.share(list(part)):
            if statistics is None or statistics.columns:
                with full_precision(layer.weight.device):
                    pairs = [_lost(layer, one, options.solver, statistics) for one in allowed[layer.name]]
                energy = max(energy for _, energy in pairs)
                own[layer.name] = Losses([lost / energy if energy > 0 else 0.0 for lost, energy in pairs], energy)
        for one in ranks.all(own):
            found.update(one)

    if batches is None:
        add((layer, None) for layer in layers)
        return found
    quiet = replace(options, order="parallel", reconstruction=None, network=None, resume=None)
    needs = frozenset({Statistic.GRAM, Statistic.NORM})
    for stage in calibrate(model, layers, batches, needs, quiet, walk=Walk(), ranks=ranks):
        assert not isinstance(stage, FinishedBlock)
        add(zip(stage.layers, stage.statistics, strict=True))
    if not found:
        raise CalibrationError(none_reached(layers))
    return found


def _weights(
    model: nn.Module,
    layers: Sequence[Layer],
    losses: Mapping[str, Losses],
    batches: Sequence[Any],
    options: Options,
    ranks: Ranks,
) -> dict[str, float] | str:
    """By layer, what losing all of its output would cost, as fractions of the largest; or why this is not known."""
    if options.device is not None:
        return "with device=, gradients of the whole network are not computed"
    progress = options.progress if ranks.rank == 0 else False
    found = ranks.all(output_sensitivity(model, layers, batches, options.forward, progress=progress))[0]
    if isinstance(found, str):
        return found
    costs = {name: losses[name].energy * sensitivity for name, sensitivity in found.items()}
    largest = max(costs.values())
    return {name: cost / largest for name, cost in costs.items()} if 0 < largest < math.inf else "its gradients are zero"


@torch.no_grad()
def _lost(layer: Layer, structure: Structure | None, solver: Solver, statistics: Statistics | None) -> tuple[float, float]:
    """What a layer's mask loses of its output energy, or without statistics of its squared magnitude, and the whole of it."""
    if structure is None:
        return 0.0, 0.0
    problem = layer_problem(layer, structure, solver, statistics)
    if statistics is None:
        squares = _in_units_of_the_largest(problem.weight).square()
        return float(squares[~problem.solve(squares).mask].double().sum()), float(squares.double().sum())
    experts = statistics.experts
    if experts is None:
        return _energies(problem)
    lost = energy = 0.0
    for own, expert in zip(expert_problems(problem, experts), experts, strict=True):
        if tokens := expert.statistics.columns:
            own_lost, own_energy = _energies(own)
            lost, energy = lost + tokens * own_lost, energy + tokens * own_energy
    return lost, energy


def _energies(problem: LayerProblem) -> tuple[float, float]:
    """The mean output energy that the mask loses, and the total, from the problem's statistics."""
    least = problem.least_squares(centred=False)
    scale = least.gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()[:, None, :]
    scores = _in_units_of_the_largest(least.weight * scale).square()
    mask = problem.solve(problem.matrices(scores)).mask
    energy = float(least.energy.double().sum())
    return float(least.row_error(problem.rows(problem.weight * mask).float()).double().sum()), energy


def _in_units_of_the_largest(values: torch.Tensor) -> torch.Tensor:
    """The values divided by the largest, so that squares neither overflow nor underflow."""
    largest = values.abs().amax() if values.numel() else values.new_ones(())
    return values / largest.clamp(min=torch.finfo(values.dtype).tiny)


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
