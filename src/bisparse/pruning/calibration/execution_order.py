"""The layers of a model in order of execution, as calibration data run through them.

The first batch gives the order. If it misses layers (a mixture routes it to some experts only), further batches are run until
every layer was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.layers import Layer
from bisparse.pruning.calibration.expert_inputs import ExpertInputs
from bisparse.pruning.calibration.hooks import call_model, observed, unseen_reason

__all__ = ["discover"]


def discover(
    model: nn.Module, layers: Sequence[Layer], data: Sequence[Any], forward: Callable[..., Any] | None
) -> tuple[list[list[Layer]], dict[str, int], int]:
    """The layers in order of execution, grouped by shared input.

    Returns:
        The groups; how often each layer is called for the first batch that reaches it; how many batches were run.
    """
    stages: list[list[Layer]] = []
    calls: dict[str, int] = {}
    missing = {layer.name for layer in layers if unseen_reason(layer) is None}
    for index, batch in enumerate(data):
        found, counts = _stages_of(model, layers, batch, forward, index)
        stages = _joined(stages, found)
        calls = counts | calls
        missing -= counts.keys()
        if not missing:
            return stages, calls, index + 1
    return stages, calls, len(data)


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
