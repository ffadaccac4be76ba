"""Prunes the experts of one 3-D parameter one by one, each on its own statistics, as if each was a Linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median_low

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bisparse.pruning.calibration.statistics import ExpertStatistics
from bisparse.pruning.methods.base import MATRICES, LayerProblem, Method, Pruned, in_range, prune_in_range
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.solution import Certificate, Solution

__all__ = ["expert_problems", "prune_experts"]

LISTED = 16
"""Up to this many experts, the note on a stack lists the tokens of each."""


def expert_problems(problem: LayerProblem, experts: Sequence[ExpertStatistics]) -> Iterator[LayerProblem]:
    """The problems of the experts of a stack, each of one matrix with its own statistics."""
    for number, expert in enumerate(experts):
        part = slice(number, number + 1)
        yield replace(
            problem,
            name=f"{problem.name}[{number}]",
            weight=problem.weight[part],
            statistics=expert.statistics,
            output=_output,
            allowed=None if problem.allowed is None else problem.allowed[part],
        )


def _output(
    inputs: Float[Tensor, "T I"], matrices: Float[Tensor, "1 O I"], bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "T O"]:
    return functional.linear(inputs, matrices[0], bias)


def prune_experts(problem: LayerProblem, method: Method, experts: Sequence[ExpertStatistics]) -> Pruned:
    """Prune each expert of a stack by a method; experts without any token, by magnitude."""
    parts = []
    for own in expert_problems(problem, experts):
        assert own.statistics is not None
        parts.append(prune_in_range((method if own.statistics.columns else Magnitude()).prune, own))
    weights = [one.weight for one in parts]
    weight = None
    if any(one is not None for one in weights):
        kept = [problem.weight[e : e + 1] * part.solution.mask for e, part in enumerate(parts)]
        weight = torch.cat([own if one is None else one.to(own.dtype) for one, own in zip(weights, kept, strict=True)])
    dampings = {part.damping for part in parts if part.damping is not None}
    return Pruned(
        _joined([part.solution for part in parts], problem),
        weight,
        error=_total(problem, experts, [part.error for part in parts]),
        error_before=_total(problem, experts, [part.error_before for part in parts]),
        damping=dampings.pop() if len(dampings) == 1 else None,
        note=_note(experts, parts, method),
    )


def _joined(solutions: Sequence[Solution], problem: LayerProblem) -> Solution:
    def certify() -> Certificate | None:
        found = [one.certificate for one in solutions]
        prices = [one for one in found if one is not None]
        if len(prices) < len(found):
            return None
        u, v, exponent = (torch.cat(one) for one in zip(*((p.u, p.v, p.exponent) for p in prices), strict=True))
        return Certificate(u, v, exponent, prices[0].exactly)

    mask, scores = (torch.cat(one) for one in zip(*((s.mask, s.scores) for s in solutions), strict=True))
    return Solution(mask, scores, problem.pattern, MATRICES, solutions[0].exactly, certify)


def _total(problem: LayerProblem, experts: Sequence[ExpertStatistics], errors: Sequence[float | None]) -> float | None:
    """The relative error of all experts' outputs together, by the energy of each; None where a calibrated one has no error."""
    lost = energy = 0.0
    for own, expert, error in zip(expert_problems(problem, experts), experts, errors, strict=True):
        if not expert.statistics.columns:
            continue
        if error is None:
            return None
        scaled, factor = in_range(own)
        whole = scaled.least_squares(centred=False, statistics=expert.statistics.merged())
        one = float(whole.energy.double().sum()) / factor / factor
        lost += expert.statistics.columns * one * error**2
        energy += expert.statistics.columns * one
    return (lost / energy) ** 0.5 if energy > 0 else None


def _note(experts: Sequence[ExpertStatistics], parts: Sequence[Pruned], method: Method) -> str:
    """How many tokens each expert was calibrated on, and what the method said of single experts."""
    counts = [expert.routed for expert in experts]
    if len(counts) <= LISTED:
        said = f"calibrated per expert; tokens routed to each: {', '.join(map(str, counts))}"
    else:
        said = f"calibrated per expert; tokens routed to each: {min(counts)} to {max(counts)}, median {median_low(counts)}"
    if wide := [number for number, expert in enumerate(experts) if expert.all_tokens]:
        said += f"; on all tokens, since few were routed there: {_experts(wide)}"
    unseen = [number for number, expert in enumerate(experts) if not expert.statistics.columns]
    if unseen and method.name != Magnitude().name:
        said += f"; by magnitude, since no token was routed there: {_experts(unseen)}"
    notes: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        if part.note:
            notes.setdefault(part.note, []).append(number)
    return "; ".join([said, *(f"{_experts(numbers)}: {note}" for note, numbers in list(notes.items())[:4])])


def _experts(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"expert {numbers[0]}"
    listed = ", ".join(map(str, numbers[:LISTED]))
    return f"experts {listed}" + (f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else "")
