"""Running a model to look at its outputs: in eval mode, without gradients, and the tensor that an output holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_json", "device_of", "evaluating", "tensor_of"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode and torch in inference mode; each module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def tensor_of(output: Any, attribute: str) -> Tensor:
    """The tensor of a model's output: its attribute or key of that name, its first item if it is a tuple, or itself.

    Raises:
        ValueError: it holds none.
    """
    found = output.get(attribute) if isinstance(output, dict) else getattr(output, attribute, None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise ValueError(f"the model returned a {type(output).__name__} without {attribute}: expected a tensor")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def as_json(value: float | None) -> float | None:
    """A number as JSON knows it: what is not finite becomes None."""
    return value if value is not None and abs(value) < float("inf") else None
