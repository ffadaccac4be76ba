"""A network's outputs on an example, and whether a change of the network has changed them by more than rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bisparse.pruning.calibration.hooks import call_model

__all__ = ["close", "comparable_outputs", "outputs_of", "rounding_tolerance"]

LEAST_TOLERANCE = 1e-4
ROUNDINGS = 8
"""By how many roundings of its least precise weights the outputs of a network may differ."""


def outputs_of(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None) -> list[Tensor]:
    """All tensors among the outputs, without gradients."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(call_model(model, example, forward)) if isinstance(leaf, Tensor)]


def comparable_outputs(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None) -> list[Tensor]:
    """The outputs.

    Raises:
        ValueError: no floating-point number among them, or one that is not finite.
    """
    outputs = outputs_of(model, example, forward)
    floats = [one for one in outputs if one.is_floating_point()]
    if not floats:
        raise ValueError("the model returned no floating-point tensor to compare: pass forward=, which returns one")
    if not all(bool(torch.isfinite(one).all()) for one in floats):
        raise ValueError(
            "the model's outputs on the example are not finite, so that nothing can be compared: give an example without NaN, or "
            "pass forward=, which returns finite outputs"
        )
    return outputs


def rounding_tolerance(model: nn.Module) -> float:
    """By how much outputs may differ from rounding, relative to the largest: 1e-4, .008 with float16, .06 with bfloat16."""
    precisions = [torch.finfo(one.dtype).eps for one in model.parameters() if one.dtype in (torch.float16, torch.bfloat16)]
    return max([LEAST_TOLERANCE, *(ROUNDINGS * one for one in precisions)])


def close(goal: list[Tensor], now: list[Tensor], tolerance: float) -> bool:
    """Whether all floating-point outputs are within the tolerance, relative to the largest number of each."""
    return len(goal) == len(now) and all(
        float((a.double() - b.double()).abs().max()) <= tolerance * max(float(a.double().abs().max()), 1e-12)
        for a, b in zip(goal, now, strict=True)
        if a.numel() and a.is_floating_point()
    )
