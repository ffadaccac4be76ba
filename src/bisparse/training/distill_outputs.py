"""What distillation reads in the outputs of a model or module: hidden states, logits and the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_logits", "device_of", "hidden_state", "logits_of"]


def hidden_state(output: Any, name: str) -> Tensor:
    """The hidden state in a module's output: the tensor, or the first entry of a tuple or mapping."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise ValueError(f"{name}: its output is {type(output).__name__} and does not begin with a tensor: choose other layers=")
    return first


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: by their name, or the first tensor.

    Raises:
        ValueError: there are none.
    """
    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else getattr(output, "logits", output)
    if isinstance(found, tuple | list):
        found = next((one for one in found if isinstance(one, Tensor) and one.ndim > 0), None)
    if not isinstance(found, Tensor):
        raise ValueError(f"no logits in an output of type {type(output).__name__}: pass output=, a function that returns them")
    return found


def check_logits(own: Tensor, theirs: Tensor) -> None:
    """Check that the logits of student and teacher can be compared.

    Raises:
        ValueError: they have different shapes, or fewer than two classes.
    """
    if own.shape != theirs.shape or own.ndim < 2:
        raise ValueError(
            f"logits of shape {tuple(own.shape)} (student) and {tuple(theirs.shape)} (teacher): expected the same, (..., C)"
        )
    if own.shape[-1] < 2:
        raise ValueError(
            "outputs of one number per sample are not class probabilities, and their divergence is always 0: "
            "pass logits=0 and hidden=, or output="
        )


def device_of(output: Any) -> torch.device | None:
    """The device of the first tensor in an output."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    return next((one.device for one in values if isinstance(one, Tensor)), None)
