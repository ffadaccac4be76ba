"""Batch norms of pruned networks: re-estimating their statistics, and folding them into the layer before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bisparse.arguments import check_number, listed
from bisparse.layers import Layer, check_unheld
from bisparse.layers.own_forward import has_own_forward
from bisparse.pruning.calibration.hooks import call_model
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.pruning.example_outputs import close, comparable_outputs, outputs_of, rounding_tolerance
from bisparse.pruning.example_run import ExampleRun
from bisparse.pruning.layer import check_not_of_inference_mode
from bisparse.pruning.norms_after import norms_after
from bisparse.rollback import Rollback
from bisparse.tiles import Layout
from bisparse.wrappers import check_module

__all__ = ["fold_batch_norms_", "reestimate_batch_norms_"]


def reestimate_batch_norms_(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[str]:
    """Re-estimate running mean and variance of every batch norm on calibration data, as plain averages over the batches.

    Only the batch norms run in train mode; dropout stays off. On an error the model is unchanged.

    Returns:
        The names of the batch norms.

    Raises:
        CalibrationError: no batch, one that does not fit the model, or statistics that are not finite.
    """
    check_module(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    data = listed(batches)
    if norms and not data:
        raise CalibrationError("batch norms cannot be re-estimated from an empty calibration set")
    training = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms.values()]
    with Rollback(model) as rollback:
        rollback.touch(*(buffer for norm in norms.values() for buffer in norm.buffers()))
        model.eval()
        for norm in norms.values():
            norm.train()
            norm.reset_running_stats()
            # None: the average over all batches, each with the same weight.
            norm.momentum = None
        with torch.no_grad():
            for index, batch in enumerate(data if norms else []):
                call_model(model, batch, forward, index)
        for name, norm in norms.items():
            assert norm.running_mean is not None and norm.running_var is not None
            if not bool(torch.isfinite(norm.running_mean).all() & torch.isfinite(norm.running_var).all()):
                raise CalibrationError(f"{name}: the calibration data give batch-norm statistics that are not finite")
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, mode in training:
            module.training = mode
    return list(norms)


def fold_batch_norms_(
    model: nn.Module, batch: Any, *, forward: Callable[[nn.Module, Any], Any] | None = None, tolerance: float | None = None
) -> list[str]:
    """Fold every batch norm that directly follows a convolution or Linear layer into that layer; the norm becomes an Identity.

    The layer then has a bias. A layer is left as it is if something other than the norm reads its output, such as a skip
    connection, or if code outside of the layer reads its weight. The model's outputs on `batch`, in eval mode, are compared
    before and after; if they differ by more than `tolerance` times the largest value, the pairs are tried one by one, and those
    that change the output are not folded. By default that is 1e-4, or eight times the rounding of half-precision weights. Layers
    and norms with hooks, or with a forward pass of their own, are left as they are. On an error the model is unchanged.

    Returns:
        The names of the layers that a batch norm was folded into.

    Raises:
        ValueError: the model is in sparse training, or accelerated: call `finalize_` first; outputs without a tensor, or that are
            not finite; or a layer that cannot be changed in place, such as one made in inference mode.
    """
    check_unheld(model, "folding batch norms")
    if tolerance is None:
        tolerance = rounding_tolerance(model)
    check_number("tolerance", tolerance, least=0)
    # All layers of these types, not only those to prune: depthwise convolutions are not pruned, but can be folded into.
    layers = [
        Layer(name, module, "weight", Layout())
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and _is_plain(module)
    ]
    training = [(module, module.training) for module in model.modules()]
    with Rollback(model) as rollback:
        found = norms_after(model, layers, batch, forward)
        found = {name: norm for name, norm in found.items() if _is_plain(norm)}
        for name in found:
            weight = model.get_parameter(f"{name}.weight")
            check_not_of_inference_mode(f"{name}: its weight", weight)
            rollback.touch(weight)
        model.eval()
        with ExampleRun(model) as run:
            before = comparable_outputs(model, batch, forward)
        read = run.direct.keys() | run.shared
        found = {name: norm for name, norm in found.items() if not read & _tensors(model.get_submodule(name), norm)}
        undo = [_fold_(model, name, norm) for name, norm in found.items()]
        folded = list(found)
        if not close(before, outputs_of(model, batch, forward), tolerance):
            for back in reversed(undo):
                back()
            folded = []
            for name, norm in found.items():
                back = _fold_(model, name, norm)
                if close(before, outputs_of(model, batch, forward), tolerance):
                    folded.append(name)
                else:
                    back()
        for module, mode in training:
            module.training = mode
    return folded


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is computed by torch's own code from parameters of its own, and no hook sees its inputs and outputs."""
    if not {"weight", "bias"} <= module._parameters.keys():  # computed, as by a parametrization
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not has_own_forward(module) and not any(hooks)


def _tensors(*modules: nn.Module) -> set[int]:
    return {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}


def _fold_(model: nn.Module, name: str, norm: nn.Module) -> Callable[[], None]:
    """Fold one norm; returns a function that undoes it."""
    layer = model.get_submodule(name)
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    old_weight, old_bias = weight.detach().clone(), bias
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if isinstance(bias, Tensor):
            shift = shift + bias.double() * scale
        weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))
        with torch.inference_mode(False):  # a tensor made in inference mode could not be trained
            new_bias = nn.Parameter(shift.to(weight.dtype).clone(), requires_grad=weight.requires_grad)
        layer.register_parameter("bias", new_bias)
    where = next(other for other, module in model.named_modules() if module is norm)
    parent, _, child = where.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())

    def undo() -> None:
        with torch.no_grad():
            weight.copy_(old_weight)
        layer.register_parameter("bias", old_bias if isinstance(old_bias, nn.Parameter) else None)
        setattr(model.get_submodule(parent), child, norm)

    return undo
