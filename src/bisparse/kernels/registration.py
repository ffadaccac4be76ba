"""How a kernel registers itself for an operator: `@register_kernel("exact_mask", "CPU")`.

torch dispatches by device. A schema defines an operator without any backend; a backend registers functions that import expensive
packages (numba, Triton) at their first call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["ANY_DEVICE", "HAS_TRITON", "call", "define", "is_plain_on_cpu", "register_kernel", "unviewed"]

ANY_DEVICE = "CompositeExplicitAutograd"
"""The dispatch key of a specification in plain torch: it runs where no backend has a kernel of its own."""
HAS_TRITON = find_spec("triton") is not None
"""Without it, as on Windows, the specification runs on GPUs too."""
LIBRARY = torch.library.Library("bisparse", "DEF")

_ON_CPU: dict[str, Callable[..., Any]] = {}
"""By operator, the kernel for CPUs."""

KernelT = TypeVar("KernelT", bound=Callable[..., Any])


def define(schema: str) -> None:
    """Define an operator of the library `bisparse`, for example ``"keep_largest(Tensor groups, int n) -> Tensor"``."""
    LIBRARY.define(schema)


def register_kernel(operator: str, key: str) -> Callable[[KernelT], KernelT]:
    """Register the decorated function as the operator's kernel for a dispatch key: "CPU", "CUDA" or `ANY_DEVICE`."""

    def register(kernel: KernelT) -> KernelT:
        LIBRARY.impl(operator, kernel, key)
        if key == "CPU":
            _ON_CPU[operator] = kernel
        return kernel

    return register


def call(operator: str, tensor: Tensor, *arguments: Any) -> Any:
    """Call an operator of the library; `tensor` is its first argument.

    A plain tensor on the CPU goes to its kernel directly, unless something could see the call: torch's dispatcher takes 10 to
    20 us, as long as the masks of thousands of weights.
    """
    kernel = _ON_CPU.get(operator)
    if kernel is None or not is_plain_on_cpu(tensor):
        kernel = getattr(torch.ops.bisparse, operator)
    return kernel(tensor, *arguments)


def unviewed(output: Tensor, *shape: int) -> Tensor:
    """An operator's output in a shape that its memory allows. Equivalent to ``output.view(shape)``, but no view for autograd.

    Autograd refuses writes in place, such as those of ``nn.ReLU(inplace=True)``, to a view that an operator returns.
    """
    result: Tensor = torch.ops.aten._unsafe_view(output, shape)
    return result


def is_plain_on_cpu(tensor: Tensor) -> bool:
    """Whether a kernel may read a tensor's memory directly: nothing traces, transforms or intercepts what is computed."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not tensor.requires_grad
        and not tensor.is_neg()  # a view that torch negates only when it is read
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )
