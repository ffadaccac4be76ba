"""Whether a module of a subclass multiplies by its weight as it is.

Weight standardisation (timm's `StdConv2d`), BitLinear and ternary layers compute another weight from their parameter in every
forward pass: zeros of the parameter are none of the product's. What such a class computes is not known, so it is tried: its
output is compared with that of the class that it derives from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bisparse.user_errors import ends_the_process, error_in_one_line

__all__ = ["own_forward_reason"]

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
OTHER_TOLERANCE = 3e-2
"""Of the largest output, in which two ways to compute the same product may differ; half precision rounds more."""

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRUSTED = ("torch.nn.modules.", "bisparse.")
"""Modules of Python whose forward passes are known."""


def own_forward_reason(module: nn.Module) -> str | None:
    """Why a Linear or convolution cannot be pruned: its class has a forward pass that does not multiply by the weight as it is.

    None where it does, for classes that use torch's own, and where the weight has no numbers (the meta device). The module is not
    changed, no hook of it runs, and the random number generators go on as they would have.
    """
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    if base is None or not _is_own(module) or not isinstance(module.weight, Tensor) or module.weight.is_meta:
        return None
    weight = module.weight
    kind = type(module).__name__
    inputs = _inputs(module, weight)
    twin = _twin(module)
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(weight.device.type, enabled=False):
        expected = _plain_output(module, base, inputs)
        try:
            output: Any = twin.forward(inputs)
        except (Exception, SystemExit) as error:
            if ends_the_process(error):
                raise
            problem = error_in_one_line(error)
            return f"{kind} has a forward pass of its own that takes other inputs than {base.__name__}'s ({problem})"
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return f"{kind} has a forward pass of its own whose output is not that of {base.__name__}"
    scale = float(expected.abs().max()) or 1.0
    if float((output.to(expected.dtype) - expected).abs().max()) <= TOLERANCES.get(weight.dtype, OTHER_TOLERANCE) * scale:
        return None
    return (
        f"{kind} does not multiply by its weight as it is (as with weight standardisation or ternary layers): its output differs "
        f"from {base.__name__}'s, so that zeros of the weight are none of the product"
    )


def _is_own(module: nn.Module) -> bool:
    names = ("forward", "_conv_forward") if isinstance(module, _ConvNd) else ("forward",)
    return not all(_module_of(getattr(type(module), name)).startswith(TRUSTED) for name in names)


def _module_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__module__", None) or ""


def _inputs(module: nn.Module, weight: Tensor) -> Tensor:
    """Two random inputs, all positive: a mean taken off the weight shows in every output."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, _ConvNd):
        spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = (2, module.in_channels, *(max(span, 3) for span in spans))
    else:
        shape = (2, weight.shape[1])
    inputs = torch.rand(shape, generator=generator) + 0.5
    return inputs.to(weight.device, weight.dtype)


def _twin(module: nn.Module) -> nn.Module:
    """The module with parameters, buffers and parts of its own, in evaluation mode: some write to their weight as they run."""
    twin = copy.copy(module)
    twin._buffers = {name: None if one is None else one.clone() for name, one in module._buffers.items()}
    twin._parameters = {
        name: None if one is None else nn.Parameter(one.detach().clone(), requires_grad=False)
        for name, one in module._parameters.items()
    }
    twin._modules = copy.deepcopy(module._modules)
    return twin.eval()


def _plain_output(module: nn.Module, base: type[nn.Module], inputs: Tensor) -> Tensor:
    if base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        # What their `forward` calls, of the class itself: a subclass may have another.
        plain: Callable[..., Tensor] = vars(base)["_conv_forward"]
        return plain(module, inputs, module.weight, module.bias)
    forward: Callable[..., Tensor] = vars(base)["forward"]
    return forward(module, inputs)
