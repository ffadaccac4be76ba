"""`accelerate_`: every layer that a sparse tensor core can take runs on it, and every other one has a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from bisparse.accelerate.advice import Advice
from bisparse.accelerate.backends.base import HALF, Backend, BackendError, choose_backend
from bisparse.accelerate.linear_packed import PackedLinear
from bisparse.accelerate.linear_trained import SparseLinear
from bisparse.diversity import hardware
from bisparse.layers import Filter, Layer, Skipped, computed_reason, find_layers
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured, parse_pattern
from bisparse.solution import PatternError, verify
from bisparse.training import MVUELinear
from bisparse.training.parametrizations import Masked, SoftThreshold, masked_parameters, own_parametrization, trained_parameter

__all__ = ["AcceleratedLayer", "AccelerationReport", "BackendName", "accelerate_", "is_2to4", "layer_reason"]

BackendName = Literal["auto", "cusparselt", "cutlass", "reference"]

KNOWN = ("4:8-T", "8:16-T", "16:32-T", "32:64-T", "4:8", "8:16", "16:32", "32:64")
"""Patterns that a weight which is not 2:4 may have, to say so; from the one that says most."""


@dataclass(frozen=True)
class AcceleratedLayer:
    """One layer that runs sparse."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    backend: str
    weight: Literal["packed", "trained"]
    """Packed for good, or dense in training with its values taken in every pass."""
    backward: bool
    """Whether the gradient of the input is a sparse product too."""
    bytes_before: int
    """What the module's tensors took."""
    bytes_after: int
    note: str = ""
    """Why the gradient of the input stays dense, and the like."""


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate_` did, and why each other layer stays as it is."""

    layers: tuple[AcceleratedLayer, ...]
    left_dense: tuple[Skipped, ...]
    bytes_before: int
    """Parameters, buffers and packed weights of the whole model, each storage once."""
    bytes_after: int

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> AcceleratedLayer | Skipped:
        """The entry of a layer, accelerated or not."""
        entries: dict[str, AcceleratedLayer | Skipped] = {one.name: one for one in self.left_dense}
        return (entries | {one.name: one for one in self.layers})[name]

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON knows values."""
        return asdict(self)

    def __str__(self) -> str:
        both = sum(layer.backward for layer in self.layers)
        return (
            f"{len(self)} layers run sparse, {both} of them both ways; {len(self.left_dense)} stay as they are; "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )


@torch.no_grad()
def accelerate_(
    model: nn.Module,
    backend: BackendName = "auto",
    *,
    advice: Advice | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    dtype: torch.dtype | None = None,
    search: bool = True,
) -> AccelerationReport:
    """Run the Linear layers whose weights are 2:4, or 2:4-T, on sparse tensor cores. In place; returns what became of each layer.

    >>> import bisparse
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    >>> _ = bisparse.prune_(model, "2:4-T")
    >>> print(accelerate_(model, backend="reference"))
    2 layers run sparse, 0 of them both ways; 0 stay as they are; 33,280 -> 17,920 bytes

    A layer in sparse training (`sparsify_`) goes on being trained, its weight a dense parameter. So does any other layer whose
    weight requires a gradient in a model in training mode; its mask is the weight's non-zeros, and stays. All other weights are
    packed, and the dense ones freed. Gradients of the input are sparse products too where the weight is 2:4 on W^T, except in
    packed layers of a model in evaluation mode, for which W^T is not packed.

    Args:
        backend: "cusparselt" or "cutlass"; "reference" stores the same packed form anywhere, and is no faster than dense; "auto"
            takes what the device has, and leaves the model masked-dense where it has nothing.
        advice: what `advise` said of this model: layers that do not win stay as they are, the others take the backend that was
            fastest. Layers it knows nothing of are converted as without it.
        include, exclude: which layers, by name, glob, ``re:`` or function.
        dtype: of the inputs of layers in training: by default the weight's where it is half precision, else bfloat16. Either half
            precision serves the other as well.
        search: let cuSPARSELt try its algorithms once for each new shape. Turn it off where the number of tokens keeps varying.

    Raises:
        BackendError: the backend that was asked for does not run here; or it can take none of the layers, or not one that was
            asked for by name, and this says why.
        PatternError: a layer that was asked for by name, with a backend, is not 2:4: names the layer, row and columns.
        ValueError: weights in dynamic training are sharded over ranks already.
    """
    for name, module, parameter, _ in masked_parameters(model):
        if isinstance(trained_parameter(module, parameter), DTensor):
            raise ValueError(f"{name} is sharded over ranks already: call accelerate_ before fully_shard")
    before = held_bytes(model)
    layers, left = find_layers(model, include, exclude)
    holders = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)
    tied = {parameter for parameter, count in holders.items() if count > 1}
    if backend != "auto":
        for device in {trained_parameter(layer.module, layer.parameter).device for layer in layers}:
            choose_backend(backend, device)
    done: list[AcceleratedLayer] = []
    changed: list[PackedLinear | SparseLinear] = []
    advised = {} if advice is None else {one.name: one for one in advice.layers}
    for layer in layers:
        known = advised.get(layer.name)
        if known is not None and known.convert is False:
            left.append(Skipped(layer.name, known.reason))
            continue
        own_backend = backend if backend != "auto" or known is None or known.backend is None else known.backend
        outcome = _accelerate(layer, own_backend, dtype, search, tied)
        if isinstance(outcome, AcceleratedLayer):
            done.append(outcome)
            changed.append(layer.module)  # type: ignore[arg-type]
        elif backend != "auto" and include is not None:
            for module in changed:
                module.restore_()
            raise (PatternError if outcome.broken else BackendError)(f"{layer.name}: {outcome.reason}")
        else:
            left.append(Skipped(layer.name, outcome.reason))
    if backend != "auto" and not done and not advised:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in left[:5])
        raise BackendError(f"backend={backend!r}: no layer of the model can run sparse ({reasons or 'it has no prunable layer'})")
    return AccelerationReport(tuple(done), tuple(left), before, held_bytes(model))


def layer_reason(layer: Layer) -> str | None:
    """Why a layer has no sparse form here, whatever its weight holds; None where it has one."""
    module = layer.module
    if isinstance(module, PackedLinear | SparseLinear):
        return "accelerated already"
    if type(module).__name__ == "Conv1D":
        return "Conv1D of GPT-2 stores its weight transposed, which has no sparse form here yet; convert it to nn.Linear"
    kind = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    if kind not in (nn.Linear, MVUELinear):
        return f"{kind.__name__}: only nn.Linear runs sparse so far, and not its subclasses, which may read the weight themselves"
    if parametrize.is_parametrized(module) and set(module.parametrizations) != {"weight"}:  # type: ignore[arg-type]
        return "its bias is parametrized too"
    own = own_parametrization(module, "weight")
    if isinstance(own, SoftThreshold):
        return "S-STE moves its mask at every step, so that nothing packed would last; it stays masked-dense"
    if parametrize.is_parametrized(module) and not isinstance(own, Masked):
        return "its weight is parametrized by another library"
    if own is None and (reason := computed_reason(module, "weight")) is not None:
        return reason
    weight = trained_parameter(module, "weight")
    if isinstance(weight, DTensor):
        return "its weight is sharded already: call accelerate_ before fully_shard"
    if weight.is_meta:
        return "its weight is on the meta device and has no values yet"
    if own is not None and not is_2to4(own.pattern)[0]:
        return f"{own.pattern} has no path on tensor cores, it stays masked-dense. {hardware(own.pattern).note}"
    return None


def is_2to4(structure: str | Structure) -> tuple[bool, bool]:
    """Whether every mask of a structure is 2:4 along rows, and along columns.

    >>> [is_2to4(one) for one in ("2:4-T", "2:4", "1:4-T", "4:8-T", "4:8-paired", "50%")]
    [(True, True), (True, False), (True, True), (False, False), (False, False), (False, False)]
    """
    structure = parse_pattern(structure)
    if isinstance(structure, Unstructured):
        return False, False
    assert isinstance(structure, Pattern | Sequential | Paired)
    # One of an aligned four's groups at most keeps anything where 4 divides M; at N = 1 it touches two groups at most.
    rows = structure.n == 1 or (structure.n == 2 and structure.m % 4 == 0)
    return rows, rows and isinstance(structure, Pattern) and structure.transposable


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, buffers and packed weights, each storage once; of sharded ones, this rank's part."""
    storages = {}
    packed = [one for own in module.modules() if isinstance(own, PackedLinear) for one in own.operands() if one is not None]
    for tensor in (*module.parameters(), *module.buffers(), *packed):
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if not tensor.is_meta:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class Refusal:
    """Why a layer does not run sparse."""

    reason: str
    broken: bool = False
    """Its weight is not 2:4."""


def weight_refusal(weight: Shaped[Tensor, "O I"]) -> Refusal | None:
    """Why a weight, or a mask, has no sparse form; None where it is 2:4."""
    plain = verify(weight, "2:4")
    if plain:
        return None
    if plain.density == 1.0:
        return Refusal("its weight is dense: prune it to 2:4-T first", broken=True)
    first = plain.first
    assert first is not None
    start = 4 * first.group
    reason = (
        f"its weight is not 2:4: row {first.row}, columns {start} to {start + 3} keep {first.kept} "
        f"({plain.violations} of {plain.groups} groups keep more than 2), and packing would lose values; it stays masked-dense"
    )
    wider = next((pattern for pattern in KNOWN if verify(weight, pattern)), None)
    if wider is not None and 20 * plain.violations > plain.groups:  # a slip here and there is no wider pattern
        reason += f". It obeys {wider}. {hardware(wider).note}"
    return Refusal(reason, broken=True)


def _refused(backend: Backend, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
    return backend.shape_reason(rows, columns) or backend.refusal(rows, columns, dtype, device)


def _accelerate(layer: Layer, name: str, dtype: torch.dtype | None, search: bool, tied: set[int]) -> AcceleratedLayer | Refusal:
    if (reason := layer_reason(layer)) is not None:
        return Refusal(reason)
    module = layer.module
    assert isinstance(module, nn.Linear)
    parameter = trained_parameter(module, "weight")
    backend = choose_backend(name, parameter.device)
    if isinstance(backend, str):
        return Refusal(f"{backend}; it stays masked-dense")
    own, static = own_parametrization(module, "weight"), module._buffers.get("weight_mask")
    mask = static if isinstance(static, Tensor) and static.dtype == torch.bool else parameter
    if own is None and (refusal := weight_refusal(mask)) is not None:
        return refusal
    trained = own is not None or mask is static or (parameter.requires_grad and module.training)
    if not trained:
        if id(parameter) in tied:
            return Refusal("another module holds the same weight, and packing would part them; it stays as it is")
        used = parameter.dtype
    else:
        used = dtype or (parameter.dtype if parameter.dtype in HALF or name == "reference" else torch.bfloat16)
    if (reason := backend.dtype_reason(used)) is not None:
        hint = "pass dtype=torch.bfloat16" if trained else "convert the model first, as with model.to(torch.bfloat16)"
        return Refusal(f"{reason}; {hint}")
    rows, columns = parameter.shape
    if (reason := _refused(backend, rows, columns, used, parameter.device)) is not None:
        return Refusal(f"{reason}; it stays masked-dense")
    note = ""
    if not (is_2to4(own.pattern)[1] if own is not None else bool(verify(mask, "2:4-T"))):
        note = "gradient of the input stays dense: the mask is not 2:4 on W^T"
    elif (reason := _refused(backend, columns, rows, used, parameter.device)) is not None:
        note = f"gradient of the input stays dense: for W^T, {reason}"
    elif not trained and not module.training:
        note = "evaluation mode: W^T is not packed"
    before = held_bytes(module)
    try:
        if trained:
            SparseLinear.install_(module, backend.name, used, transposed=not note, search=search, name=layer.name)
        else:
            PackedLinear.install_(module, backend.name, transposed=not note, search=search)
    except torch.OutOfMemoryError as error:
        return Refusal(f"out of memory while packing {before:,} bytes, it stays as it is: {str(error).splitlines()[0]}")
    except (BackendError, PatternError) as error:
        return Refusal(str(error), broken=isinstance(error, PatternError))
    kind: Literal["packed", "trained"] = "trained" if trained else "packed"
    both_ways = not note
    if isinstance(module, SparseLinear) and module.anew and backend.learns_forms:
        unknown = (
            f"{backend.name} compresses its weight in every pass: the order of its metadata is not known, or memory was short"
        )
        note = f"{note}; {unknown}" if note else unknown
    return AcceleratedLayer(layer.name, (rows, columns), backend.name, kind, both_ways, before, held_bytes(module), note)
