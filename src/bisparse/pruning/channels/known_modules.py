"""Modules whose effect on channels is known: torch's own, and activations that are element-wise on random numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bisparse.layers.own_forward import has_own_forward
from bisparse.user_errors import ends_the_process

__all__ = ["POOLING_MODULES", "is_conv1d", "is_elementwise"]

ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.ELU,
    nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POOLING_MODULES = {
    1: (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
"""By the number of dimensions that are pooled; one dimension more is an input without a batch, whose channels come first."""
SIZES = (1.0, 30.0, 1e4)
"""Sizes of the random numbers on which an activation is tried."""


def is_elementwise(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a module without tensors is known, or found, to apply one function to every number of an input of this shape."""
    if isinstance(module, ELEMENTWISE_MODULES) and not has_own_forward(module):
        return True
    named = type(module).__name__.endswith("Activation") or type(module).__name__ in (
        "NewGELU", "QuickGELU", "Swish", "MemoryEfficientSwish",
    )  # fmt: skip
    if not (named or isinstance(module, ELEMENTWISE_MODULES)) or _tensors(module):
        return False
    return _moves_with_its_numbers(module, shape)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's `Conv1D` of transformers, which multiplies by a weight of (inputs, outputs)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.forward.__module__.startswith("transformers.") and "forward" not in vars(module)


def _tensors(module: nn.Module) -> bool:
    held = [*module.parameters(), *module.buffers(), *(one for each in module.modules() for one in vars(each).values())]
    return any(isinstance(one, Tensor) for one in held)


def _moves_with_its_numbers(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether permuting random inputs permutes the outputs in the same way."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(module).eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for size in SIZES:
            numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * size
            order = torch.randperm(numbers.numel(), generator=generator, device="cpu")
            moved = numbers.flatten()[order].view(shape)
            try:
                before, after = (twin.forward(one.clone()) for one in (numbers, moved))
            except (Exception, SystemExit) as error:
                if ends_the_process(error):
                    raise
                return False
            if not (isinstance(before, Tensor) and isinstance(after, Tensor)) or before.shape != shape or after.shape != shape:
                return False
            if not torch.allclose(before.flatten()[order], after.flatten(), rtol=1e-4, atol=1e-6 * size):
                return False
    return True
