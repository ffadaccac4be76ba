"""Checks the masks in a state_dict against the patterns of their layers, before `load_state_dict` changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bisparse.training.parametrizations import Masked, SoftThreshold
from bisparse.verification import PatternError

__all__ = ["check_loaded_masks", "remove_mask_checks"]


def check_loaded_masks(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """A pre-hook of `load_state_dict`: raises PatternError, naming the layer, if a mask in the state breaks its pattern."""
    for name, own in module.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        if not isinstance(own, Masked | SoftThreshold):
            continue
        mask = state_dict.get(f"{name}.mask" if name else "mask")
        if isinstance(mask, Tensor) and mask.shape == own.mask.shape and (reason := own.mask_refusal(mask)) is not None:
            layer = name.split(".parametrizations.")[0].removesuffix("parametrizations")
            raise PatternError(f"{layer or 'the layer'}: {reason}; nothing was loaded")


def remove_mask_checks(module: nn.Module) -> None:
    """Remove this hook from a module."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is check_loaded_masks]:
        del hooks[key]
