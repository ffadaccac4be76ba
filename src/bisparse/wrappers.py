"""Modules that wrap another one, such as compiled ones and DistributedDataParallel, and names without what they add."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

__all__ = ["check_module", "is_wrapper", "plain_names", "unwrapped_model"]

DISTINCT = ("_orig_mod", "_checkpoint_wrapped_module")
"""Attributes that only wrappers have: those of `torch.compile` and of torch's activation checkpointing."""


def _attribute(module: nn.Module) -> str | None:
    """The attribute that holds the wrapped module; None for a module that is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel | AveragedModel):
        return "module"
    return next((name for name in DISTINCT if name in module._modules), None)


def check_module(model: object) -> None:
    """Raise TypeError for what is no torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, not {type(model).__name__}")


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module wraps another one, whose attributes it may show as its own."""
    return _attribute(module) is not None


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DistributedDataParallel, DataParallel or AveragedModel; others as they are."""
    check_module(model)
    while (name := _attribute(model)) is not None:
        inner = model._modules[name]
        assert inner is not None
        model = inner
    return model


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """What turns a name in a model (of a module, a parameter, a key of its state_dict) into that of the model without wrappers.

    >>> model = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    >>> plain_names(model)("0.module.weight")
    '0.weight'
    """
    paths = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if (name := _attribute(module)) is not None:
            paths.append((f"{prefix}.{name}" if prefix else name, prefix))
    paths.sort(key=lambda path: -len(path[0]))  # the inner ones first: outer paths are prefixes of theirs

    def plain(name: str) -> str:
        for path, prefix in paths:
            if name == path:
                name = prefix
            elif name.startswith(f"{path}."):
                name = f"{prefix}.{name[len(path) + 1 :]}" if prefix else name[len(path) + 1 :]
        return name

    return plain
