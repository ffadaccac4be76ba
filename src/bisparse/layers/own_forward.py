"""Tests whether a subclass of Linear or a convolution multiplies by its weight unchanged.

Weight standardisation (timm's `StdConv2d`), BitLinear and ternary layers compute another weight from their parameter in every
forward pass, some only in training mode, so zeros of the parameter may not be zeros of the product. Such classes, and modules
with a `forward` of their own, are run in evaluation and in training mode. Their output is compared with that of the base class;
and with half of the weight zero, outputs must not depend on inputs that only zeros multiply. Other parameters that are zero, as
adapters are when they start, are random numbers in the second test. In training mode the second test decides, since dropout and
batch norms change outputs for other reasons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bisparse.user_errors import ends_the_process, error_in_one_line

__all__ = ["has_own_forward", "own_forward_reason"]

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
OTHER_TOLERANCE = 3e-2
"""Maximum difference, relative to the largest output, between two computations of the same product; more in half precision."""
TRIED_INPUTS = 6
"""Number of inputs that are changed one by one, to find out which outputs depend on them."""

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRUSTED = ("torch.nn.modules.", "bisparse.")
"""Python modules that define known forward passes."""


def own_forward_reason(module: nn.Module) -> str | None:
    """Why a Linear or convolution cannot be pruned: its class has a forward pass that does not multiply by the weight unchanged.

    None if it does, for classes that use torch's forward pass, and for weights on the meta device. The module is as before
    afterwards, its hooks do not run, and random number generators are not advanced.
    """
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    if base is None or not has_own_forward(module) or not isinstance(module.weight, Tensor) or module.weight.is_meta:
        return None
    kind, device = type(module).__name__, module.weight.device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
        trial = _Trial(module, base)
        try:
            differs = trial.compare()
            mixing = next((mode for mode in (False, True) if trial.zeros_leak(training=mode)), None)
        except (Exception, SystemExit) as error:
            if ends_the_process(error):
                raise
            problem = error_in_one_line(error)
            return f"{kind} has its own forward pass, with inputs other than {base.__name__}'s ({problem})"
        if differs == "shape":
            return f"{kind} has its own forward pass, with an output other than {base.__name__}'s"
        if mixing is not None:
            when = (
                "in training mode"
                if mixing and not differs
                else "as with weight standardisation, or outputs that are normalised together"
            )
            return (
                f"{kind} does not multiply by its weight unchanged ({when}): its outputs depend on inputs whose weights are "
                "zero, so zeros of the weight have no effect"
            )
        if not differs:
            return None
        scale = trial.scale()
    how = f"{scale:.6g} times its weight" if scale is not None else "something else"
    what = "" if scale is not None else " (it scales, rounds or quantises it, or changes the output)"
    return (
        f"{kind} does not multiply by its weight unchanged: its output is that of {how}{what}. Zeros of the weight were zeros of "
        f"the product when tried, but what is fitted to {base.__name__}'s output would be wrong; give its layout, such as "
        f"{'conv' if issubclass(base, _ConvNd) else 'linear'!r}, to make it sparse anyway"
    )


class _Trial:
    """Runs a module and its base class on the same inputs."""

    def __init__(self, module: nn.Module, base: type[nn.Module]) -> None:
        self.module, self.base = module, base
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.weight = weight.detach()
        self.tolerance = TOLERANCES.get(weight.dtype, OTHER_TOLERANCE)
        self.inputs = _inputs(module, weight)

    def compare(self) -> str:
        """How the output in evaluation mode differs from the base class's: "shape", "numbers", or "" if it does not."""
        expected, output = _plain_output(self.module, self.base, self.inputs), self._own(self.inputs, None, training=False)
        if not isinstance(output, Tensor) or output.shape != expected.shape:
            return "shape"
        return "" if self._close(output, expected) else "numbers"

    def zeros_leak(self, *, training: bool) -> bool:
        """Whether, with half of the weight zero, an output depends on an input that only zeros multiply.

        Every pass in training mode uses the same random numbers.
        """
        if "weight" not in self.module._parameters:
            return False  # the weight is computed from another parameter, such as by a parametrization
        generator = torch.Generator().manual_seed(1)
        pairs = torch.rand(self.weight.shape[:2], generator=generator, dtype=torch.float32, device="cpu") < 0.5
        kept = pairs.view(*pairs.shape, *[1] * (self.weight.ndim - 2)).to(self.weight.device)
        probe = torch.where(kept, self.weight + self.weight.abs().mean() + 1, 0).to(self.weight.dtype)
        before = self._own(self.inputs, probe, training=training)
        plain = _plain_output(_with_weight(self.module, probe), self.base, self.inputs)
        if not isinstance(before, Tensor) or before.shape != plain.shape:
            return False
        for changed in self._changed_inputs():
            after = self._own(changed, probe, training=training)
            other = _plain_output(_with_weight(self.module, probe), self.base, changed)
            untouched = other == plain
            largest = float((after - before).abs().max())
            moved = (after - before).abs() > self.tolerance * max(largest, float(before.abs().max()) * 1e-3)
            if bool((moved & untouched).any()):
                return True
        return False

    def scale(self) -> float | None:
        """The positive factor between the products of the two classes; None if there is none."""
        zero = torch.zeros_like(self.inputs)
        own = (self._own(self.inputs, None, training=False) - self._own(zero, None, training=False)).double()
        plain = (_plain_output(self.module, self.base, self.inputs) - _plain_output(self.module, self.base, zero)).double()
        factor = float((own * plain).sum() / plain.square().sum().clamp(min=1e-300))
        return factor if factor > 0 and self._close(own, factor * plain) else None

    def _changed_inputs(self) -> Iterator[Tensor]:
        channels = self.inputs.shape[1]
        for channel in sorted({number * channels // TRIED_INPUTS for number in range(TRIED_INPUTS)}):
            changed = self.inputs.clone()
            changed[:, channel] += 3
            yield changed

    def _own(self, inputs: Tensor, weight: Tensor | None, *, training: bool) -> Any:
        if "forward" in vars(self.module):  # a function that may refer to the module itself
            return self._on_the_module(inputs, weight, training=training)
        twin = _twin(self.module)
        if weight is not None:
            _fill_zeros(twin)
            twin._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
        torch.manual_seed(0)
        return twin.train(training).forward(inputs.clone())

    def _on_the_module(self, inputs: Tensor, weight: Tensor | None, *, training: bool) -> Any:
        parameters, buffers, mode = self.module._parameters, self.module._buffers, self.module.training
        twin = _twin(self.module)
        if weight is not None:
            twin._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
        torch.manual_seed(0)
        try:
            self.module._parameters, self.module._buffers, self.module.training = twin._parameters, twin._buffers, training
            return self.module.forward(inputs.clone())
        finally:
            self.module._parameters, self.module._buffers, self.module.training = parameters, buffers, mode

    def _close(self, output: Tensor, expected: Tensor) -> bool:
        scale = float(expected.abs().max()) or 1.0
        return float((output.to(expected.dtype) - expected).abs().max()) <= self.tolerance * scale


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module is computed by a forward pass that neither torch nor this package defines."""
    names = ("forward", "_conv_forward") if isinstance(module, _ConvNd) else ("forward",)
    if any(name in vars(module) for name in names):
        return True
    return not all(_module_of(getattr(type(module), name)).startswith(TRUSTED) for name in names)


def _module_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__module__", None) or ""


def _inputs(module: nn.Module, weight: Tensor) -> Tensor:
    """Two random inputs, all positive, so that subtracting the weight's mean would change every output."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, _ConvNd):
        spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = (2, module.in_channels, *(max(span, 3) for span in spans))
    else:
        shape = (2, weight.shape[1])
    inputs = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5
    return inputs.to(weight.device, weight.dtype)


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the module, since some modules write to their weight or statistics in the forward pass."""
    twin = copy.copy(module)
    for name, held in vars(module).items():
        if isinstance(held, Tensor):
            vars(twin)[name] = held.clone()
    twin._buffers = {name: None if one is None else one.clone() for name, one in module._buffers.items()}
    twin._parameters = {
        name: None if one is None else nn.Parameter(one.detach().clone(), requires_grad=False)
        for name, one in module._parameters.items()
    }
    twin._modules = copy.deepcopy(module._modules)
    return twin


def _fill_zeros(twin: nn.Module) -> None:
    """Replace parameters that are all zero, other than weight and bias, by random numbers."""
    for name, one in twin.named_parameters():
        if name not in ("weight", "bias") and one.is_floating_point() and not bool(one.any()):
            generator = torch.Generator().manual_seed(2)
            one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float32, device="cpu"))


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters) | {"weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def _plain_output(module: nn.Module, base: type[nn.Module], inputs: Tensor) -> Tensor:
    if issubclass(base, _ConvNd) and not issubclass(base, _ConvTransposeNd):
        # The functions that the base class's `forward` calls; a subclass may have overridden them.
        plain: Callable[..., Tensor] = vars(base)["_conv_forward"]
        return plain(module, inputs, module.weight, module.bias)
    forward: Callable[..., Tensor] = vars(base)["forward"]
    return forward(module, inputs)
