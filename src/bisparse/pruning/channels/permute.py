"""Channel permutation: the same network with its channels in an order that lets a pattern keep more score.

Columns are divided into groups of M. One step takes one column out of every group and reassigns all of them at once, by the
assignment that keeps the most score; a step never loses. For a transposable pattern a column adds to a tile at most its N best
entries, both directions of a weight count, and a new order is accepted only if the exact masks keep more. Groups of four are then
refined in pairs (`stripe_search`).
Guarantee: the score kept never falls, and the network's outputs stay equal, which is checked, also in training mode unless they
are random there: some models have outputs in training only, which read channels too. Zeros as the example, or a gate of zero,
would hide a wrong order; so a space is permuted only if each of its weights, left in the old order, changes the outputs.
Cost: R x (C/M)^2 per step for R rows and C columns, and one assignment of C/M columns.
Sources: channel permutation, Pool and Yu, NeurIPS 2021; dealing out by assignment, Zhao et al., "Gyro-Permutation", AAAI 2025.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bisparse._solve import solve
from bisparse.arguments import check_count, check_number
from bisparse.errors import install_extra
from bisparse.layers import Filter, Layer, check_unheld, find_layers
from bisparse.pattern import Pattern, parse_pattern
from bisparse.pruning.calibration.statistics import CalibrationError, full_precision
from bisparse.pruning.channels.channel_graph import ChannelSpace, channel_spaces, freeze_direct_reads
from bisparse.pruning.channels.stripe_search import refine_stripes
from bisparse.pruning.example_outputs import close, comparable_outputs, outputs_of, rounding_tolerance
from bisparse.pruning.example_run import ExampleRun
from bisparse.pruning.layer import check_not_of_inference_mode
from bisparse.rollback import Rollback, same_bits
from bisparse.scores import magnitude
from bisparse.tiles import Layout, LayoutKind, to_matrices

__all__ = ["PermutationReport", "PermutedSpace", "permute_", "search_order"]

CHUNK = 1 << 24
"""Entries of the gain table that are computed at a time."""
NOT_SHOWN = "the example cannot show a change"
REMEDY = "pass a batch of real data, and permute after training if a gate is zero"


@dataclass(frozen=True)
class PermutedSpace:
    """The result for one space: channels that some layers write and others read, so that they can only be reordered together."""

    layers: tuple[str, ...]
    """Layers that read or write it."""
    size: int
    before: float
    """Score that the layers' masks keep, before."""
    after: float
    reason: str = ""
    """Why it was left unchanged; empty if it was permuted."""


@dataclass(frozen=True)
class PermutationReport:
    """What `permute_` did: for each set of channels that move together (a space), its new order or why it stayed as it was."""

    pattern: str
    spaces: tuple[PermutedSpace, ...]
    retained_before: float
    """Fraction of the score of all layers that the pattern keeps, before."""
    retained_after: float
    time_s: float
    untraced: dict[str, str]
    """Parts that torch.fx could not trace as they run, and layers that the example did not reach, with the reason."""

    def __str__(self) -> str:
        done = sum(not space.reason for space in self.spaces)
        hidden = sum(space.reason.startswith(NOT_SHOWN) for space in self.spaces)
        remedy = f"; {NOT_SHOWN} in {hidden} of them: {REMEDY}" if hidden else ""
        return (
            f"{done} of {len(self.spaces)} channel spaces permuted for {self.pattern}: {100 * self.retained_before:.2f} -> "
            f"{100 * self.retained_after:.2f} % of the score kept, {self.time_s:.1f} s{remedy}"
        )


def permute_(
    model: nn.Module,
    pattern: str | Pattern,
    example: Any,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    scores: Callable[[Layer], Tensor] | Literal["magnitude"] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    steps: int = 60,
    rounds: int = 2,
    tolerance: float | None = None,
    seed: int = 0,
) -> PermutationReport:
    """Permute a network's channels, in place, so that masks of the pattern keep more; its outputs stay as they are.

    On an error the model is as it was.

    Args:
        example: a batch of real or random data for tracing the network and comparing its outputs. A space stays as it is if the
            outputs do not depend on the order of channels in one of its weights, such as those on zeros or behind a gate of zero.
        include, exclude: layers that will be pruned; see `find_layers`. Others are permuted too, but their scores do not count.
        layouts: how single layers store their matrices, as for `prune_`.
        scores: a layer's scores, of its weight's shape; by default magnitude.
        steps: maximum per space and round. rounds: passes over all spaces; later ones see the new order of the other side.
        tolerance: maximum difference of the outputs, from rounding, relative to their largest number; a space that exceeds it is
            undone. By default 1e-4, or eight times the rounding of half-precision weights: .008 in float16, .06 in bfloat16.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> report = permute_(model, "2:4", torch.randn(4, 8))
    >>> report.retained_after > report.retained_before
    True
    """
    started = time.perf_counter()
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, Pattern):
        raise ValueError(f"permutation at {parsed} is not defined: expected a pattern such as '2:4' or '4:8-T'")
    check_unheld(model, "permuting channels")
    check_count("steps", steps, least=0)
    check_count("rounds", rounds, least=0)
    check_count("seed", seed, least=0)
    if tolerance is not None:
        check_number("tolerance", tolerance, least=0)
    if isinstance(scores, str) and scores == "magnitude":
        scores = None
    if scores is not None and not callable(scores):
        raise ValueError(f"scores={scores!r:.60}: expected a function of a layer, or 'magnitude'")
    layers, _ = find_layers(model, include, exclude, layouts=layouts)
    by_weight = {id(layer.weight): layer for layer in layers if layer.layout.kind is not LayoutKind.PACKED}
    score_of = scores or (lambda layer: magnitude(layer.weight))
    training = [(module, module.training) for module in model.modules()]
    limit = rounding_tolerance(model) if tolerance is None else tolerance
    with torch.no_grad(), Rollback(model) as rollback:
        model.eval()
        spaces, untraced = channel_spaces(model, example, forward)
        names_of = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for tensor in [tensor for space in spaces if not space.frozen for tensor in space.tensors]:
            check_not_of_inference_mode(names_of[id(tensor)], tensor)
        goal = comparable_outputs(model, example, forward)
        run = ExampleRun(model)
        goal_training = _training_outputs(model, example, forward, run)
        freeze_direct_reads(spaces, run)
        del run  # it holds activations
        random = not _equal(goal_training, _training_outputs(model, example, forward))
        if random or _equal(goal_training, goal):
            goal_training = []  # nothing to compare

        def unchanged() -> bool:
            return close(goal, outputs_of(model, example, forward), limit) and (
                not goal_training or close(goal_training, _training_outputs(model, example, forward), limit)
            )

        before_all, total = _kept(layers, parsed, score_of)
        found: list[PermutedSpace] = []
        # The outputs after a permutation sum in another order; undone ones are those that differ by more.
        done = {id(space): _reason(space, by_weight) for space in spaces}
        first = {id(space): _space_value(space, by_weight, parsed, score_of) for space in spaces}
        last = dict(first)
        shown: set[int] = set()
        for turn in range(rounds):
            before_turn = dict(last)
            for space in spaces:
                if done[id(space)]:
                    continue
                order = _best_order(space, by_weight, parsed, score_of, steps, seed + turn)
                value = last[id(space)]
                rollback.touch(*space.tensors)
                space.permute_(order)
                after = _space_value(space, by_weight, parsed, score_of)
                back = torch.argsort(order)
                if after <= value:
                    space.permute_(back)
                elif not unchanged():
                    space.permute_(back)
                    done[id(space)] = "the outputs changed by more than rounding: the graph hides a use of these channels"
                elif id(space) not in shown and (blind := _without_effect(space, back, unchanged)) is not None:
                    space.permute_(back)
                    done[id(space)] = f"{NOT_SHOWN}: the order in {names_of[id(blind)]} has no effect; {REMEDY}"
                else:
                    shown.add(id(space))
                    last[id(space)] = after
            if last == before_turn:
                break
        for space in spaces:
            names = _names(space, by_weight)
            value = _space_value(space, by_weight, parsed, score_of)
            reason = done[id(space)]
            if not reason and last[id(space)] == first[id(space)]:
                reason = "no better order was found"
            if names:
                found.append(PermutedSpace(names, space.size, first[id(space)], value, reason))
        after_all, _ = _kept(layers, parsed, score_of)
        for module, mode in training:
            module.training = mode
    return PermutationReport(
        str(parsed),
        tuple(found),
        before_all / total if total else 1.0,
        after_all / total if total else 1.0,
        time.perf_counter() - started,
        untraced,
    )


def _without_effect(space: ChannelSpace, back: Tensor, unchanged: Callable[[], bool]) -> Tensor | None:
    """A weight of a permuted space that could be in its old order without a change of the outputs; None if there is none.

    A comparison of outputs cannot find a wrong order of such a weight's channels.
    """
    weights = {id(tensor): tensor for tensor, _ in [*space.writers, *space.readers]}
    for weight in weights.values():
        permuted = weight.clone()
        space.permute_(back, only=weight)
        if same_bits(weight, permuted):  # all channels that moved are equal
            continue
        blind = unchanged()
        weight.copy_(permuted)
        if blind:
            return weight
        if len(weights) == 2:  # the other one in its old order is the same error
            return None
    return None


def _names(space: ChannelSpace, by_weight: dict[int, Layer]) -> tuple[str, ...]:
    tensors = [*space.writers, *space.readers]
    return tuple(dict.fromkeys(by_weight[id(tensor)].name for tensor, _ in tensors if id(tensor) in by_weight))


def _reason(space: ChannelSpace, by_weight: dict[int, Layer]) -> str:
    if space.frozen:
        return space.frozen
    return "" if _names(space, by_weight) else "no layer to prune reads or writes it"


def _kept(layers: list[Layer], pattern: Pattern, score_of: Callable[[Layer], Tensor]) -> tuple[float, float]:
    kept = total = 0.0
    for layer in layers:
        scores = score_of(layer)
        kept += solve(scores, pattern, layout=layer.layout).value
        total += float(scores.double().sum())
    return kept, total


def _space_value(
    space: ChannelSpace, by_weight: dict[int, Layer], pattern: Pattern, score_of: Callable[[Layer], Tensor]
) -> float:
    counted = {id(tensor): by_weight[id(tensor)] for tensor, _ in [*space.writers, *space.readers] if id(tensor) in by_weight}
    return _kept(list(counted.values()), pattern, score_of)[0]


def _best_order(
    space: ChannelSpace,
    by_weight: dict[int, Layer],
    pattern: Pattern,
    score_of: Callable[[Layer], Tensor],
    steps: int,
    seed: int,
) -> Int[Tensor, " C"]:
    """The order found for one space, from the scores of all weights that read it and, if transposable, write it."""
    stacked = []
    for tensor, _ in space.readers:
        if layer := by_weight.get(id(tensor)):
            stacked.append(_bands(to_matrices(score_of(layer), layer.layout), pattern.m))
    if pattern.transposable:
        for tensor, _ in space.writers:
            if layer := by_weight.get(id(tensor)):
                stacked.append(_bands(to_matrices(score_of(layer), layer.layout).transpose(1, 2), pattern.m))
    if not stacked:
        return torch.arange(space.size, device="cpu")
    scores = torch.cat(stacked).float()
    with full_precision(scores.device):
        return search_order(scores, pattern, steps=steps, seed=seed)


def _bands(matrices: Float[Tensor, "B R C"], m: int) -> Float[Tensor, "R2 C"]:
    """Matrices stacked along the rows, each padded with zeros to a multiple of m rows."""
    padded = torch.nn.functional.pad(matrices, (0, 0, 0, -matrices.shape[1] % m))
    return padded.flatten(0, 1)


def search_order(scores: Float[Tensor, "R C"], pattern: Pattern, *, steps: int = 60, seed: int = 0) -> Int[Tensor, " C"]:
    """An order of the columns whose groups of M keep more; ``scores[:, order]`` is the permuted matrix.

    For a transposable pattern M must divide R, and rows stay where they are. Deterministic for a seed.
    """
    columns, m = scores.shape[1], pattern.m
    order = torch.arange(columns, device=scores.device)
    groups = columns // m
    if groups < 2 or pattern.n >= m:
        return order
    assign = _linear_sum_assignment()
    generator = torch.Generator().manual_seed(seed)
    # Sums of large scores must fit float32.
    scores = (scores.double() / scores.max().double().clamp(min=torch.finfo(torch.float64).tiny)).float()
    # A short last group stays together: its position at the edge is unlike any other.
    members = order[: groups * m].view(groups, m).clone()
    idle = 0
    # Gains are exact for a plain pattern; for a transposable one they bound what the tiles' masks keep, which is looked at.
    best, best_value = members.clone(), solve(scores[:, : groups * m], pattern).value if pattern.transposable else 0.0
    for step in range(steps):
        # The column that leaves a group is random, but each position is drawn equally often.
        if step % m == 0:
            turns = torch.rand(groups, m, generator=generator, dtype=torch.float32, device="cpu").argsort(1).to(scores.device)
        taken = turns[:, step % m : step % m + 1]
        leaving = members.gather(1, taken)[:, 0]
        rest = members[torch.arange(m, device=scores.device) != taken].view(groups, m - 1)
        gain = _gains(scores, rest, leaving, pattern)
        choice = torch.from_numpy(assign(gain.cpu().double().numpy(), maximize=True)[1]).to(scores.device)
        stay = float(gain.diagonal().double().sum())
        move = float(gain.gather(1, choice[:, None]).double().sum())
        if move > stay:
            members.scatter_(1, taken, leaving[choice][:, None])
            if pattern.transposable and (value := solve(scores[:, members.flatten()], pattern).value) > best_value:
                best, best_value = members.clone(), value
        idle = idle + 1 if move - stay <= 1e-5 * abs(stay) else 0
        if idle >= m:
            break
    if pattern.transposable:
        members = best
    elif m == 4:
        unchanged = order[: groups * m].view(groups, m)
        members = refine_stripes(scores, torch.stack([unchanged, members]), pattern.n, generator)
    return torch.cat([members.flatten(), order[groups * m :]])


def _linear_sum_assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(f"channel permutation needs SciPy; {install_extra('calibration')}") from error
    assignment: Callable[..., Any] = linear_sum_assignment
    return assignment


def _gains(
    scores: Float[Tensor, "R C"], rest: Int[Tensor, "S M1"], leaving: Int[Tensor, " S"], pattern: Pattern
) -> Float[Tensor, "S S"]:
    """The gain of adding column ``leaving[j]`` to group i: the excess over the smallest kept entry that it replaces."""
    groups, m = len(rest), pattern.m
    gain = torch.zeros(groups, groups, device=scores.device)
    rows = max(m, CHUNK // (groups * groups) // m * m)
    for part in scores.split(rows):
        others = part[:, rest]  # (rows, S, M-1)
        threshold = _largest([one.unsqueeze(0) for one in others.unbind(2)], pattern.n)[-1]  # (rows, S)
        extra = (part[:, None, leaving] - threshold[:, :, None]).clamp(min=0)  # (rows, S, S)
        if pattern.transposable:
            extra = _largest(list(extra.unflatten(0, (-1, m)).unbind(1)), pattern.n)
        gain += extra.sum(0)
    return gain


def _largest(entries: list[Tensor], n: int) -> Tensor:
    """The n largest per position over M tensors, stacked: n passes of a bubble sort, faster than topk at these sizes."""
    for place in range(n):
        for i in range(len(entries) - 1, place, -1):
            entries[i - 1], entries[i] = torch.maximum(entries[i - 1], entries[i]), torch.minimum(entries[i - 1], entries[i])
    return torch.cat(entries[:n])


def _training_outputs(
    model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None, run: ExampleRun | None = None
) -> list[Tensor]:
    """The outputs in training mode, with dropout and batch norms as in evaluation; none if they need labels."""
    containers = [module for module in model.modules() if any(True for _ in module.children())]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for module in containers:
            module.training = True
        with run or nullcontext():
            return outputs_of(model, example, forward)
    except CalibrationError:
        return []
    finally:
        for module in containers:
            module.training = False
        for buffer, before in buffers:
            buffer.copy_(before)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
