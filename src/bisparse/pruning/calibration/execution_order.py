"""The layers of a model in order of execution, as calibration data run through them.

The first batch gives the order. If it misses layers (a mixture routes it to some experts only), further batches are run until
every layer was seen; and one of each kind, since other arguments or flags may call layers more often or on other inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.layers import Layer
from bisparse.pruning.calibration.expert_inputs import ExpertInputs
from bisparse.pruning.calibration.hooks import call_model, observed, unseen_reason

__all__ = ["discover", "one_of_each_kind"]


def discover(
    model: nn.Module, layers: Sequence[Layer], data: Sequence[Any], forward: Callable[..., Any] | None
) -> tuple[list[list[Layer]], dict[str, int], int]:
    """The layers in order of execution, grouped by shared input.

    Returns:
        The groups; how often one of these batches calls each layer at most, and more than once for layers that share their input
        in some of them only; how many batches were run.
    """
    stages: list[list[Layer]] = []
    calls: dict[str, int] = {}
    missing = {layer.name for layer in layers if unseen_reason(layer) is None}
    kinds: set[Hashable] = set()
    runs = 0
    for index, batch in enumerate(data):
        if (kind := _kind(batch)) in kinds and not missing:
            continue
        kinds.add(kind)
        found, counts = _stages_of(model, layers, batch, forward, index)
        place = {layer.name: number for number, stage in enumerate(found) for layer in stage}
        for stage in stages:
            if len({place[layer.name] for layer in stage if layer.name in place}) > 1:
                counts |= {layer.name: max(2, counts.get(layer.name, 0)) for layer in stage}
        stages = _joined(stages, found)
        calls |= {name: max(count, calls.get(name, 0)) for name, count in counts.items()}
        missing -= counts.keys()
        runs += 1
    return stages, calls, runs


def one_of_each_kind(data: Sequence[Any]) -> list[Any]:
    """The first batch of each kind; see `discover`."""
    return list({_kind(batch): batch for batch in reversed(data)}.values())[::-1]


def _kind(batch: Any) -> Hashable:
    """What a model may branch on without looking at numbers: which arguments there are, and flags among them."""
    leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    return repr(structure), tuple(leaf if leaf is None or isinstance(leaf, bool) else type(leaf) for leaf in leaves)


def _stages_of(
    model: nn.Module, layers: Sequence[Layer], batch: Any, forward: Callable[..., Any] | None, index: int
) -> tuple[list[list[Layer]], dict[str, int]]:
    """`execution_order` for one batch."""
    stages: list[list[Layer]] = []
    calls: dict[str, int] = {}
    # Holding the input keeps its id from being given to another tensor.
    current: tuple[Tensor | ExpertInputs, int] | None = None

    def seen(layer: Layer, inputs: Tensor | ExpertInputs, part: int | None) -> None:
        nonlocal current
        calls[layer.name] = calls.get(layer.name, 0) + (1 if part in (None, 0) else 0)
        if calls[layer.name] > 1 or part not in (None, 0):
            return
        version = 0 if isinstance(inputs, ExpertInputs) or inputs.is_inference() else inputs._version
        # A tensor that was worked on in place in between is another input.
        same = part is None and current is not None and current[0] is inputs and current[1] == version
        if same:
            stages[-1].append(layer)
        else:
            stages.append([layer])
        current = (inputs, version) if part is None else None

    with torch.no_grad(), observed(model, layers, seen):
        call_model(model, batch, forward, index)
    return stages, calls


def _joined(stages: list[list[Layer]], found: list[list[Layer]]) -> list[list[Layer]]:
    """Stages, with layers that only another batch reaches inserted directly after their predecessors in that batch."""
    position = {layer.name: number for number, stage in enumerate(stages) for layer in stage}
    behind: dict[int, list[list[Layer]]] = {}
    last = -1
    for stage in found:
        last = max([last, *(position[layer.name] for layer in stage if layer.name in position)])
        if new := [layer for layer in stage if layer.name not in position]:
            behind.setdefault(last, []).append(new)
    return behind.get(-1, []) + [one for number, stage in enumerate(stages) for one in (stage, *behind.get(number, []))]
