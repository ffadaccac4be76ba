"""Runs a model for evaluation, in eval mode and without gradients, and extracts the tensor of an output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.apart import read_text
from bisparse.arguments import check_count

__all__ = [
    "as_json",
    "device_of",
    "evaluating",
    "fitting_length",
    "has_decoder",
    "naming_input",
    "positions_of",
    "tensor_of",
    "text_of",
]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context manager: the model is in eval mode and torch in inference mode; restores each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def has_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder, as T5 and BART have."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def tensor_of(output: Any, attribute: str) -> Tensor:
    """The tensor in a model's output: the attribute or key of this name, the first item of a tuple, or the output itself.

    Raises:
        ValueError: there is none.
    """
    found = output.get(attribute) if isinstance(output, dict) else getattr(output, attribute, None)
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise ValueError(f"the model returned a {type(output).__name__} without {attribute}: expected a tensor")
    return found


@contextmanager
def naming_input(inputs: Tensor) -> Iterator[None]:
    """A context manager for a forward pass: torch's errors become a ValueError with the shape and dtype of the input."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"the model failed on an input of shape {tuple(inputs.shape)} and {inputs.dtype}: {first}") from error


def text_of(path: str | Path) -> str:
    """The content of a text file.

    Raises:
        CheckpointError: no system could have such a path, or it cannot be read.
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text.
    """
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, as by iconv -f latin1 -t utf-8") from error


def positions_of(model: nn.Module) -> int | None:
    """The most tokens that a transformers model takes at a time, by its configuration; None if that does not say."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    config = of_text() if callable(of_text) else config
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((size for size in sizes if type(size) is int and size > 0), None)


def fitting_length(model: nn.Module, given: int | None, default: int, name: str) -> int:
    """The given number of tokens or, without one, the default or the model's positions if these are fewer.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    positions = positions_of(model)
    if given is None:
        return default if positions is None else min(default, positions)
    check_count(name, given)
    if positions is not None and given > positions:
        raise ValueError(f"{name}={given}: the model has only {positions:,} positions; pass a {name} of at most {positions}")
    return given


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def as_json(value: float | None) -> float | None:
    """A number as a JSON value: None if it is not finite."""
    return value if value is not None and abs(value) < float("inf") else None
