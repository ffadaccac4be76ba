"""How a kernel registers itself for an operator: `@register_kernel("exact_mask", "CPU")`.

torch dispatches by device. A schema defines an operator without any backend; a backend registers functions that import expensive
packages (numba, Triton) at their first call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

__all__ = ["ANY_DEVICE", "HAS_TRITON", "define", "register_kernel"]

ANY_DEVICE = "CompositeExplicitAutograd"
"""The dispatch key of a specification in plain torch: it runs where no backend has a kernel of its own."""
HAS_TRITON = find_spec("triton") is not None
"""Without it, as on Windows, the specification runs on GPUs too."""
LIBRARY = torch.library.Library("bisparse", "DEF")

KernelT = TypeVar("KernelT", bound=Callable[..., Any])


def define(schema: str) -> None:
    """Define an operator of the library `bisparse`, for example ``"keep_largest(Tensor groups, int n) -> Tensor"``."""
    LIBRARY.define(schema)


def register_kernel(operator: str, key: str) -> Callable[[KernelT], KernelT]:
    """Register the decorated function as the operator's kernel for a dispatch key: "CPU", "CUDA" or `ANY_DEVICE`."""

    def register(kernel: KernelT) -> KernelT:
        LIBRARY.impl(operator, kernel, key)
        return kernel

    return register
