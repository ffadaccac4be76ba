"""Decides how a layer can run sparse, or why it cannot, from its weight, mask and backend. Changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from bisparse.accelerate.backends import BACKENDS, HALF, Backend, BackendError, Refusal
from bisparse.accelerate.backends.base import token_count
from bisparse.accelerate.backends.cpu import (
    ANY_TOKENS,
    CPU,
    MANY_TOKENS,
    MIN_SPEEDUP,
    cpu_reason,
    density_refusal,
    int8_reason,
    measured,
)
from bisparse.diversity import hardware
from bisparse.layers import Layer, computed_reason
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured
from bisparse.training import MVUELinear
from bisparse.training.layer import Accelerated
from bisparse.training.parametrizations import LayerState, Masked, SoftThreshold, layer_state
from bisparse.verification import verify

__all__ = ["BackendName", "Directions", "Plan", "choose_backend", "directions_of", "is_2to4", "pattern_refusal", "plan_layer"]

BackendName = Literal["auto", "cusparselt", "cutlass", "cpu", "reference"]

WIDER_PATTERNS = ("4:8-T", "8:16-T", "16:32-T", "32:64-T", "4:8", "8:16", "16:32", "32:64")
"""Wider patterns to mention if a weight that is not 2:4 obeys one of them; the strictest first."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POSITIONS = 49
"""Number of positions, 7 x 7, for which convolutions are timed if the caller names none; with many they must not be slower."""
MIN_BROKEN_FRACTION = 0.05
"""Minimum fraction of groups that break 2:4 for a wider pattern to be searched for; a few broken groups are an accident."""


@dataclass(frozen=True)
class Directions:
    """A mask that is 2:4 along the rows of W, and whether it is along the rows of W^T too."""

    both: bool


@dataclass(frozen=True)
class Plan:
    """The way in which one layer will run sparse."""

    kind: Literal["packed", "trained"]
    """"packed" permanently, or "trained": dense, with its kept values read in every pass."""
    backend: str
    dtype: torch.dtype
    """Dtype of the packed weight, or of the inputs in training."""
    both_ways: bool
    """Whether the gradient of the input is a sparse product too."""
    note: str = ""
    """Why the gradient of the input stays dense, or the result of a timing."""
    max_tokens: int = 0
    """For "cpu": the maximum number of tokens for which the weight is multiplied in packed form."""
    int8: bool = False
    """For "cpu": whether the weight is rounded to int8."""


def plan_layer(
    layer: Layer, backend: BackendName | str, dtype: torch.dtype | None, tied: set[int], tokens: int = 1, int8: bool = False
) -> Plan | Refusal:
    """The plan of a layer, or why it cannot run sparse. Changes nothing.

    Args:
        dtype: dtype of the inputs of layers in training; by default the weight's if it is half precision, otherwise bfloat16.
        tied: ids of the parameters that several modules share.
        tokens: on a CPU, the number of tokens for which the layer is timed.
        int8: on a CPU, whether the weight is to be rounded to int8.

    Raises:
        BackendError: the backend does not run on the weight's device, or is "cpu" and this processor has no kernels for it.
        ValueError: the layer is in dynamic training and its weight is sharded.
    """
    module, state = layer.module, layer_state(layer.module, layer.parameter)
    device = state.weight.device
    if backend == CPU or (backend == "auto" and device.type == "cpu"):
        return _plan_on_cpu(layer, state, backend, tied, tokens, int8)
    if int8:
        return Refusal("int8 is for packed weights on a CPU; it stays masked-dense")
    chosen, found = choose_backend(backend, device), directions_of(layer)
    if isinstance(found, Refusal):
        return found
    if isinstance(chosen, Refusal):
        return Refusal(f"{chosen.reason}; it stays masked-dense")
    trained = _is_trained(layer, state)
    if not trained and (refusal := _tied_refusal(state, tied)) is not None:
        return refusal
    used = state.weight.dtype if not trained else dtype or _dtype_of_inputs(state, chosen)
    if (reason := chosen.dtype_reason(used)) is not None:
        hint = "pass dtype=torch.bfloat16" if trained else "convert the model first, as with model.to(torch.bfloat16)"
        return Refusal(f"{reason}; {hint}")
    rows, columns = state.weight.shape
    if (reason := chosen.matrix_reason(rows, columns, used, device)) is not None:
        return Refusal(f"{reason}; it stays masked-dense")
    note = ""
    if not found.both:
        note = "gradient of the input stays dense: the mask is not 2:4 on W^T"
    elif (reason := chosen.matrix_reason(columns, rows, used, device)) is not None:
        note = f"gradient of the input stays dense: for W^T, {reason}"
    elif not trained and not module.training:
        note = "evaluation mode: W^T is not packed"
    return Plan("trained" if trained else "packed", chosen.name, used, not note, note)


def _plan_on_cpu(layer: Layer, state: LayerState, backend: str, tied: set[int], tokens: int, int8: bool) -> Plan | Refusal:
    """The plan of a layer on the CPU, of any pattern, or why it stays dense; the layer is timed."""
    weight = state.weight
    if backend == CPU and (reason := cpu_reason(weight.device)) is not None and not weight.is_meta:
        raise BackendError(f"backend={CPU!r}: {reason}. Pass backend='auto' for what the device has")
    if (refusal := _layer_refusal(layer, on_cpu=True)) is not None:
        return refusal
    if _is_trained(layer, state):
        reason = "its weight is trained, and only constant weights are packed on CPUs; it stays masked-dense"
        return Refusal(f"{reason}. For inference: finalize_ where it is in sparse training, then model.eval()", "layer")
    if (reason := cpu_reason(weight.device, weight.dtype)) is not None:
        return Refusal(f"{reason}; it stays masked-dense")
    if (refusal := _tied_refusal(state, tied) or density_refusal(weight)) is not None:
        return refusal
    from bisparse.kernels.packed_cpu.multiply import expands

    if int8 and ((reason := int8_reason(weight.dtype)) is not None or not bool(torch.isfinite(weight).all())):
        return Refusal(
            f"{reason or 'its weight has NaN or infinities, which int8 does not have'}; it stays masked-dense", "weight"
        )
    if isinstance(layer.module, CONVOLUTIONS):
        known, tokens = tokens > 1, max(tokens, POSITIONS)
        at = f"at {tokens} positions, when timed here"
    else:
        known, at = True, f"at {token_count(tokens)}, when timed here"
    found = measured(weight, tokens, int8)
    if found.speedup <= MIN_SPEEDUP:
        slower = f"slower by {1 / found.speedup:.2f}x" if found.speedup < 1.0 else f"only {found.speedup:.2f}x faster"
        return Refusal(f"packed it was {slower} {at}; it stays masked-dense")
    if not known and found.many < 1.0:
        slower = f"slower by {1 / found.many:.2f}x at {MANY_TOKENS}"
        return Refusal(f"packed it was {found.speedup:.2f}x faster {at}, and {slower}; it stays masked-dense")
    note = f"{found.speedup:.2f}x faster {at}"
    if expands(weight.dtype) and not int8 and found.max_tokens < ANY_TOKENS:
        note += f"; expanded in bands beyond {found.max_tokens} tokens"
    if found.many < 1.0 / MIN_SPEEDUP:
        note += f", slower by {1 / found.many:.2f}x at {MANY_TOKENS}"
    return Plan("packed", CPU, weight.dtype, both_ways=False, note=note, max_tokens=found.max_tokens, int8=int8)


def _is_trained(layer: Layer, state: LayerState) -> bool:
    return state.phase != "plain" or (state.weight.requires_grad and layer.module.training)


def _tied_refusal(state: LayerState, tied: set[int]) -> Refusal | None:
    if id(state.weight) not in tied:
        return None
    return Refusal("another module shares its weight, and packing would untie them; it stays as it is", "layer")


def choose_backend(name: str, device: torch.device) -> Backend | Refusal:
    """The 2:4 backend of this name; for "auto", the first of cuSPARSELt and CUTLASS that runs on the device, or a refusal.

    cuSPARSELt is tried first, since it has kernels for every GPU generation and searches for the fastest. `advise` measures both.

    Raises:
        BackendError: there is no backend of this name, or it does not run on the device.
    """
    if name == "auto":
        reasons = {one: BACKENDS[one].device_reason(device) for one in ("cusparselt", "cutlass")}
        for one, reason in reasons.items():
            if reason is None:
                return BACKENDS[one]
        return Refusal("; ".join(str(reason) for reason in reasons.values()))
    if name == CPU:
        raise BackendError(f"backend={name!r} packs weights of any pattern, and is not a backend for 2:4 matrices")
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r}: expected 'auto', {', '.join(map(repr, (*BACKENDS, CPU)))}")
    if (reason := BACKENDS[name].device_reason(device)) is not None:
        raise BackendError(
            f"backend={name!r}: {reason}. Pass backend='auto' to stay masked-dense there, or 'reference' for the same results"
        )
    return BACKENDS[name]


def directions_of(layer: Layer) -> Directions | Refusal:
    """The sides along which a layer's mask or weight is 2:4, or why the layer cannot run sparse with any backend."""
    if (refusal := _layer_refusal(layer)) is not None:
        return refusal
    state = layer_state(layer.module)
    if state.pattern is not None and state.phase != "static":  # a static mask may obey more than its pattern
        rows, columns = is_2to4(state.pattern)
        return Directions(columns) if rows else pattern_refusal(state.pattern)
    mask = state.weight if state.mask is None else state.mask
    return _weight_refusal(mask) or Directions(bool(verify(mask, "2:4-T")))


def _layer_refusal(layer: Layer, *, on_cpu: bool = False) -> Refusal | None:
    """Why a layer cannot run sparse, apart from its zeros and the backend; None if it can."""
    module = layer.module
    if (reason := _kind_reason(module, on_cpu)) is not None:
        return Refusal(reason, "layer")
    state = layer_state(module)
    if state.parametrization is None and (reason := computed_reason(module, "weight")) is not None:
        return Refusal(reason, "layer")
    if isinstance(state.parametrization, SoftThreshold):
        return Refusal("S-STE changes its mask in every step, so packed values would be stale; it stays masked-dense", "layer")
    if isinstance(state.weight, DTensor):
        if state.phase in ("dynamic", "dense"):
            raise ValueError(f"{layer.name} is sharded over ranks already: call accelerate_ before fully_shard")
        return Refusal("its weight is sharded already: call accelerate_ before fully_shard", "layer")
    if state.weight.is_meta:
        return Refusal("its weight is on the meta device and has no values yet", "layer")
    return None


def pattern_refusal(pattern: Structure) -> Refusal:
    """The refusal of a layer whose pattern is not 2:4."""
    reason = f"{pattern} does not run on sparse tensor cores; it stays masked-dense. {hardware(pattern).note}"
    return Refusal(reason, "layer")


def is_2to4(structure: Structure) -> tuple[bool, bool]:
    """Whether every mask of a structure is 2:4 along rows, and along columns.

    >>> from bisparse.pattern import parse_pattern
    >>> [is_2to4(parse_pattern(one)) for one in ("2:4-T", "2:4", "1:4-T", "4:8-T", "4:8-paired", "50%")]
    [(True, True), (True, False), (True, True), (False, False), (False, False), (False, False)]
    """
    if isinstance(structure, Unstructured):
        return False, False
    assert isinstance(structure, Pattern | Sequential | Paired)
    # If 4 divides M, each aligned group of four is part of one group of M. With N = 1 it overlaps at most two groups.
    rows = structure.n == 1 or (structure.n == 2 and structure.m % 4 == 0)
    return rows, rows and isinstance(structure, Pattern) and structure.transposable


def _kind_reason(module: nn.Module, on_cpu: bool) -> str | None:
    """Why layers of this kind do not run sparse; None if they can."""
    if isinstance(module, Accelerated):
        return "accelerated already"
    if type(module).__name__ == "Conv1D":
        return "Conv1D of GPT-2 stores its weight transposed, which cannot run sparse yet; convert it to nn.Linear"
    parametrized = parametrize.is_parametrized(module)
    kind = type(module).__bases__[0] if parametrized else type(module)
    if on_cpu and kind in CONVOLUTIONS:
        if (reason := _pointwise_reason(module, kind.__name__)) is not None:
            return reason
    elif kind not in (nn.Linear, MVUELinear):
        return (
            f"{kind.__name__}: only nn.Linear itself and, on CPUs, convolutions of kernel size 1 run sparse so far; subclasses "
            "may read the weight themselves"
        )
    if not parametrized:
        return None
    if set(module.parametrizations) != {"weight"}:  # type: ignore[arg-type]
        return "its bias is parametrized too"
    if not isinstance(layer_state(module).parametrization, Masked | SoftThreshold):
        return "its weight is parametrized by another library"
    return None


def _pointwise_reason(module: nn.Module, kind: str) -> str | None:
    """Why a convolution is no product with the channels of every position; None if it is one."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if math.prod(module.kernel_size) > 1:
        kernel = " x ".join(map(str, module.kernel_size))
        return f"{kind} with a kernel of {kernel}: of convolutions, only those of kernel size 1 run packed"
    if module.groups > 1:
        return f"{kind} with {module.groups} groups: of convolutions, only those without groups run packed"
    padding = (0,) if isinstance(module.padding, str) else module.padding  # "same" and "valid" add nothing to kernels of size 1
    if any(padding):
        return f"{kind} with padding {padding}: of convolutions, only those without padding run packed"
    return None


def _weight_refusal(weight: Shaped[Tensor, "O I"]) -> Refusal | None:
    """Why a weight or mask cannot run sparse; None if it is 2:4."""
    found = verify(weight, "2:4")
    if found:
        return None
    if found.density == 1.0:
        return Refusal("its weight is dense: prune it to 2:4-T first", "weight")
    first = found.first
    assert first is not None
    start = 4 * first.group
    reason = (
        f"its weight is not 2:4: row {first.row}, columns {start} to {start + 3} keep {first.kept} "
        f"({found.violations} of {found.groups} groups keep more than 2), and packing would lose values; it stays masked-dense"
    )
    if found.violations > MIN_BROKEN_FRACTION * found.groups:
        wider = next((pattern for pattern in WIDER_PATTERNS if verify(weight, pattern)), None)
        reason += "" if wider is None else f". It obeys {wider}. {hardware(wider).note}"
    return Refusal(reason, "weight")


def _dtype_of_inputs(state: LayerState, backend: Backend) -> torch.dtype:
    return state.weight.dtype if state.weight.dtype in HALF or backend.name == "reference" else torch.bfloat16
