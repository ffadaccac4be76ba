"""`accelerate_`: runs every layer sparse that can be on its device, and reports a reason for every other one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bisparse.accelerate.advice import Advice, check_tokens
from bisparse.accelerate.backends import BackendError, Refusal
from bisparse.accelerate.conv_packed import PACKED_CONVOLUTIONS
from bisparse.accelerate.eligibility import BackendName, Plan, plan_layer
from bisparse.accelerate.linear_packed import PackedLayer, PackedLinear
from bisparse.accelerate.linear_trained import SparseLinear
from bisparse.arguments import check_flag, entry_of
from bisparse.layers import Filter, Layer, Skipped, find_layers
from bisparse.rollback import Rollback
from bisparse.tiles import Layout
from bisparse.training.layer import Accelerated
from bisparse.verification import PatternError
from bisparse.wrappers import check_module

__all__ = ["AcceleratedLayer", "AccelerationReport", "accelerate_", "held_bytes", "install", "tied_parameters"]


@dataclass(frozen=True)
class AcceleratedLayer:
    """One layer that runs sparse."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    backend: str
    weight: Literal["packed", "trained"]
    """"packed" permanently, or "trained": dense, with its kept values read in every pass."""
    backward: bool
    """Whether the gradient of the input is a sparse product too."""
    bytes_before: int
    """Bytes of the module's tensors, before and after."""
    bytes_after: int
    note: str = ""
    """Such as why the gradient of the input stays dense, or the result of a timing."""


@dataclass(frozen=True)
class AccelerationReport:
    """The layers that `accelerate_` changed, and why each other layer stays as it is."""

    layers: tuple[AcceleratedLayer, ...] = field(repr=False)
    left_dense: tuple[Skipped, ...] = field(repr=False)
    bytes_before: int
    """Bytes of parameters, buffers and packed weights of the whole model, each storage counted once."""
    bytes_after: int
    already: int = 0
    """Number of layers in `left_dense` that run sparse already, since an earlier call."""

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[AcceleratedLayer]:
        return iter(self.layers)

    def __getitem__(self, key: str | int) -> AcceleratedLayer | Skipped:
        """The entry of a layer: by name, accelerated or not, or by its number among those that run sparse."""
        names: dict[str, AcceleratedLayer | Skipped] = {one.name: one for one in self.left_dense}
        return entry_of(key, self.layers, names | {one.name: one for one in self.layers})

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        both = sum(layer.backward for layer in self.layers)
        already = f"; {self.already} did already" if self.already else ""
        left = len(self.left_dense) - self.already
        return (
            f"{len(self)} layers run sparse, {both} of them both ways{already}; {left} stay as they are; "
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
    layouts: Mapping[str, str | Layout] | None = None,
    dtype: torch.dtype | None = None,
    search: bool = True,
    tokens: int = 1,
    int8: bool = False,
) -> AccelerationReport:
    """Run layers sparse, in place: 2:4 or 2:4-T weights on tensor cores, any zeros on CPUs. Returns a report.

    >>> import bisparse
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    >>> _ = bisparse.prune_(model, "2:4-T")
    >>> print(accelerate_(model, backend="reference"))
    2 layers run sparse, 0 of them both ways; 0 stay as they are; 33,280 -> 17,920 bytes

    A layer in sparse training (`sparsify_`) stays trainable, with a dense parameter. So does any other layer whose weight
    requires a gradient in a model in training mode; its mask is fixed to the weight's non-zeros. All other weights are packed,
    and the dense ones freed. Gradients of the input are sparse products too if the weight is 2:4 on W^T, except in packed
    layers of a model in evaluation mode, for which W^T is not packed.

    On a CPU, weights that are not trained are packed as non-zeros and a bit mask, whatever their pattern, if at most 0.8 of the
    entries are not zero. Each layer is timed with `tokens` tokens, and packed only if that is faster. So are convolutions of
    kernel size 1 without groups, on CPUs alone, timed for `tokens` positions; if `tokens` is 1, they must be
    faster at 49 (7 x 7), and no slower at 512.

    A layer that runs sparse already stays as it is. On an error the model is unchanged, and its parameters are the same objects.

    Args:
        backend: "cusparselt" or "cutlass" on a GPU, "cpu" on a CPU; "reference" packs weights like the first two on any device
            but is no faster than dense; "auto" takes the device's backend, or leaves the model masked-dense if there is none.
        advice: the result of `advise` for this model: layers that are not faster sparse stay as they are, the others use the
            fastest backend. Layers without advice are converted as usual.
        include, exclude: which layers, by name, glob, ``re:`` or function.
        layouts: how single layers store their matrices, as for `prune_`; only plain Linear layers, and convolutions as above,
            run sparse.
        dtype: dtype of the inputs of layers in training: by default the weight's if it is half precision, otherwise bfloat16.
            With either half precision, inputs in the other one run sparse as well.
        tokens: on a CPU, the number of input rows for which layers are timed: 1 for decoding, more for prompts and batches.
        int8: on a CPU, round bfloat16 weights to int8 with one scale per row; inputs and sums are not rounded. The report gives
            each layer's relative error. Zeros stay zeros; `state_dict` and `finalize_` give the rounded weights.
        search: let cuSPARSELt try its algorithms once per new shape. Turn it off if the number of tokens varies a lot.

    Raises:
        BackendError: the given backend does not run here, or cannot run any layer, or not one that was included by name.
        PatternError: a layer included by name, with a given backend, is not 2:4 or, for "cpu", has too few zeros.
        ValueError: weights in dynamic training are sharded over ranks already; tokens below 1.
    """
    check_module(model)
    check_flag("search", search)
    check_flag("int8", int8)
    check_tokens(tokens)
    if advice is not None and not isinstance(advice, Advice):
        raise ValueError(f"advice={advice!r:.60}: expected what advise() returns")
    before, tied = held_bytes(model), tied_parameters(model)
    layers, left = find_layers(model, include, exclude, layouts=layouts)
    advised = {} if advice is None else {one.name: one for one in advice.layers}
    asked_for = backend != "auto" and include is not None
    plans: list[tuple[Layer, Plan]] = []
    already = 0
    for layer in layers:
        if isinstance(layer.module, Accelerated):
            left.append(Skipped(layer.name, "accelerated already"))
            already += 1
            continue
        known = advised.get(layer.name)
        if known is not None and known.convert is False:
            left.append(Skipped(layer.name, known.reason))
            continue
        own_backend = backend if backend != "auto" or known is None or known.backend is None else known.backend
        plan = plan_layer(layer, own_backend, dtype, tied, tokens, int8)
        if isinstance(plan, Plan):
            plans.append((layer, plan))
        else:
            left.append(_left_dense(layer.name, plan, asked_for))
    done: list[AcceleratedLayer] = []
    with Rollback(model) as rollback:
        for layer, plan in plans:
            outcome = install(layer, plan, search)
            if isinstance(layer.module, PackedLayer):  # otherwise the rollback would hold the dense weights of the whole model
                rollback.release(layer.module, "weight", layer.module.parameter)
            if isinstance(outcome, AcceleratedLayer):
                done.append(outcome)
            else:
                left.append(_left_dense(layer.name, outcome, asked_for))
        report = AccelerationReport(tuple(done), tuple(left), before, held_bytes(model), already)
    if backend != "auto" and not done and not advised and not already:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in left[:5])
        raise BackendError(f"backend={backend!r}: no layer of the model can run sparse ({reasons or 'it has no prunable layer'})")
    return report


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, buffers and packed weights, each storage counted once; of sharded ones, this rank's part."""
    storages = {}
    own = [one for one in module.modules() if isinstance(one, PackedLayer | SparseLinear)]
    derived = [tensor for one in own for tensor in one.derived_tensors]
    for tensor in (*module.parameters(), *module.buffers(), *derived):
        if nn.parameter.is_lazy(tensor):  # without memory until its first forward pass
            continue
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if not tensor.is_meta:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tied_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules share."""
    holders = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)
    return {parameter for parameter, count in holders.items() if count > 1}


def _left_dense(name: str, refusal: Refusal, asked_for: bool) -> Skipped:
    """The entry of a layer that stays dense; raises if it was included by name."""
    if asked_for:
        raise (PatternError if refusal.cause == "weight" else BackendError)(f"{name}: {refusal.reason}")
    return Skipped(name, refusal.reason)


def install(layer: Layer, plan: Plan, search: bool) -> AcceleratedLayer | Refusal:
    """Convert a layer by its plan; returns a refusal if it cannot be packed."""
    module: Any = layer.module
    before, shape = held_bytes(module), (module.weight.shape[0], module.weight.shape[1])
    packed: type[PackedLayer] = PACKED_CONVOLUTIONS.get(type(module), PackedLinear)
    try:
        if plan.kind == "packed":
            slow = packed.install_(module, plan, search=search, name=layer.name)
        else:
            assert isinstance(module, nn.Linear)
            slow = SparseLinear.install_(module, plan, search=search, name=layer.name)
    except torch.OutOfMemoryError as error:
        return Refusal(f"out of memory while packing {before:,} bytes, it stays as it is: {str(error).splitlines()[0]}")
    except (BackendError, PatternError) as error:
        return Refusal(str(error), "weight" if isinstance(error, PatternError) else "backend")
    note = "; ".join(filter(None, (plan.note, slow)))
    return AcceleratedLayer(layer.name, shape, plan.backend, plan.kind, plan.both_ways, before, held_bytes(module), note)
