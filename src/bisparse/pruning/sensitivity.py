"""How much a network's output depends on the output of each of its layers, from gradients on calibration data.

An error d of a layer's output changes the network's output by the distance::

    E (sum over positions and channels of g d)^2  ~  sum over positions and channels of g^2 d^2

g is the gradient of ``log p(label)``, with the label drawn from the network's own probabilities, for outputs that are logits (the
distance is then twice the divergence of the probabilities, to second order), otherwise of a sum of outputs with random signs (the
squared distance of the outputs). A layer's sensitivity is the sum of g^2 over positions, by channel: times the mean squared error
of each channel it estimates the distance, in a unit that is the same for all layers of a network.
Departures: g^2 and d^2 are averaged over positions apart, and errors at different positions and channels count as independent.
Cost: a forward and a backward pass per batch, of at most `MAX_BATCHES`, and memory for the activations of one batch.
Source: the Fisher information of a layer's output, as in Theis et al. 2018 (arXiv 1801.05787), for channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bisparse.layers import Layer
from bisparse.pruning.calibration.calibrate import evaluating, showing
from bisparse.pruning.calibration.hooks import call_model
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.pruning.kept_fit import only_these_require_grad
from bisparse.pruning.network_reconstruction import tensor_of
from bisparse.token_masks import TokenMasks, fitted
from bisparse.user_errors import error_in_one_line

__all__ = ["MAX_BATCHES", "output_sensitivity"]

MAX_BATCHES = 8
"""Batches that are looked at, evenly spread over the calibration data."""
CONV_1D = "Conv1D"
"""The name of transformers' own linear layer, which is no `nn.Linear`."""


def output_sensitivity(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    progress: bool | None = False,
) -> dict[str, Float[Tensor, " C"]] | str:
    """The sensitivity of each layer by its name, float64 by output channel; or why there is none for all of them, as text.

    Labels and signs are drawn from a fixed seed. Nothing of the model changes.
    """
    if odd := [layer.name for layer in layers if not _is_product(layer)]:
        return f"the outputs of {odd[0]} are not those of one linear or convolution layer"
    sums: dict[str, Tensor] = {}
    generator = torch.Generator("cpu").manual_seed(0)
    step = -(-len(batches) // MAX_BATCHES)
    try:
        with (
            torch.inference_mode(False),
            evaluating(model),
            only_these_require_grad(model, []),
            _squares_added_to(sums, layers),
        ):
            for index in showing(progress)(range(0, len(batches), step), "weighing layers"):
                masks = TokenMasks.of_batch(model, batches[index])
                output, classes = tensor_of(call_model(model, batches[index], forward, index), index)
                if not output.requires_grad:
                    return "the network's output has no gradient with respect to its layers"
                _sampled(output, classes, fitted(masks.of(""), output.shape[:-1]), generator).backward()
    except (CalibrationError, RuntimeError) as error:
        return f"the network's gradients could not be computed ({error_in_one_line(error)})"
    if unseen := [layer.name for layer in layers if layer.name not in sums]:
        return f"the output of {unseen[0]} was not seen, or does not reach the network's output"
    if not all(bool(one.isfinite().all()) for one in sums.values()) or not any(bool(one.any()) for one in sums.values()):
        return "the network's gradients are zero or not finite"
    return sums


def _is_product(layer: Layer) -> bool:
    plain = isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd) or type(layer.module).__name__ == CONV_1D
    return plain and layer.module._parameters.get("weight") is layer.weight


@contextmanager
def _squares_added_to(sums: dict[str, Tensor], layers: Sequence[Layer]) -> Iterator[None]:
    """While open, backward passes add the squares of the gradients of layers' outputs."""

    def hook_of(name: str, channel: int) -> Callable[..., Tensor]:
        def add(gradient: Tensor) -> None:
            own = gradient.double().square().movedim(channel, 0).flatten(1).sum(1).cpu()
            sums[name] = sums[name] + own if name in sums else own

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or output.ndim < -channel:
                return output
            # A copy, since a later module may work in place, which a leaf that requires a gradient does not allow.
            watched = (output if output.requires_grad else output.detach().requires_grad_()).clone()
            if watched.requires_grad:  # not under torch.no_grad()
                watched.register_hook(add)
            return watched

        return hook

    with ExitStack() as stack:
        for layer in layers:
            kernel = layer.module.weight.ndim - 2 if isinstance(layer.module, nn.modules.conv._ConvNd) else 0
            stack.callback(layer.module.register_forward_hook(hook_of(layer.name, -1 - kernel)).remove)
        yield


def _sampled(output: Tensor, classes: bool, keep: Tensor | None, generator: torch.Generator) -> Tensor:
    """The sum over positions whose gradient is g; `keep`: positions that count."""
    output = output.float()
    if not classes:
        signs = torch.randint(0, 2, output.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(output.device)
        return (output * (signs if keep is None else signs * keep[..., None].to(output.device))).sum()
    rows = output.flatten(0, -2)
    labels = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
    if keep is not None:
        labels = labels.where(keep.flatten().to(rows.device), -100)
    return torch.nn.functional.cross_entropy(rows, labels, ignore_index=-100, reduction="sum")
