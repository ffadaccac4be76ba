"""The saved state of a run: what is stored per layer, and whether it fits another run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bisparse.pattern import Structure
from bisparse.tiles import to_matrices
from bisparse.training.decay import Decay, TotalDecay
from bisparse.training.history import history_from_state
from bisparse.training.layer import SparseLayer
from bisparse.training.mask_search import Prices
from bisparse.training.parametrizations import mask_refusal
from bisparse.verification import PatternError, verify

__all__ = ["STATE_VERSION", "check_mask", "check_not_ended", "check_state", "entry_of", "load_entry"]

STATE_VERSION = 2


def check_not_ended(ended: int | None, doing: str) -> None:
    """Raise ValueError for a run that `finalize_` has ended; `ended` is the step at which it did, or None."""
    if ended is not None:
        raise ValueError(
            f"cannot {doing}: this Sparsity ended with finalize_ after optimizer step {ended}, and the model is dense "
            "with zeros since; call sparsify_ again to train on with masks (mode='static', masks='nonzero' keeps the zeros)"
        )


def entry_of(layer: SparseLayer, mode: str, prices: Prices | None, decay: TotalDecay | None) -> dict[str, Any]:
    """The entry of a layer in `Sparsity.state_dict`: pattern, shape, prices, the mask of a static run, and the decay done."""
    entry: dict[str, Any] = {"pattern": str(layer.pattern), "shape": list(layer.mask.shape)}
    if prices is not None:
        entry |= {"u": prices.u, "v": prices.v, "exponent": prices.exponent}
    if mode == "static":
        entry["mask"] = layer.mask
    if decay is not None:
        entry["decay"] = [decay.done, decay.peak]
    return entry


def load_entry(
    entry: Mapping[str, Any], layer: SparseLayer, given: Decay | None, prices: dict[str, Prices], decays: dict[str, TotalDecay]
) -> None:
    """Load an entry that `check_state` accepts into its layer and the run's prices and decays, both by layer name.

    Args:
        given: the decay of the layer in this run.
    """
    if "u" in entry:
        device = layer.mask.device
        moved = (entry[side].detach().clone().to(device) for side in ("u", "v", "exponent"))
        prices[layer.name] = Prices(*moved)
    if "decay" in entry:
        decays[layer.name] = TotalDecay.resumed(entry["decay"], given=given)
    if "mask" in entry:
        layer.mask.copy_(entry["mask"])
        layer.zero_pruned()


def check_state(state: Mapping[str, Any], layers: Iterable[SparseLayer], mode: str) -> None:
    """Raise ValueError unless a run of these layers and this mode can load the result of `Sparsity.state_dict`."""
    if not isinstance(state, Mapping):
        raise ValueError(f"a sparsity state is a mapping from Sparsity.state_dict(), not a {type(state).__name__}")
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"sparsity state of version {state.get('version')!r}: this release reads version {STATE_VERSION}")
    if missing := [key for key in ("mode", "step", "refreshes", "due", "ended", "layers") if key not in state]:
        raise ValueError(f"the checkpoint lacks {missing}: it is not a complete result of Sparsity.state_dict()")
    if state["mode"] != mode:
        raise ValueError(f"the checkpoint comes from a {state['mode']} run, this run is {mode}: pass mode={state['mode']!r}")
    if state["ended"] is not None:
        raise ValueError(
            f"the checkpoint comes from a run that ended with finalize_ after optimizer step {state['ended']}: load only the "
            "model's weights, and sparsify_ it with mode='static', masks='nonzero' to keep its zeros"
        )
    for key in ("step", "refreshes"):
        if isinstance(state[key], bool) or not isinstance(state[key], int) or state[key] < 0:
            raise ValueError(f"the checkpoint has {key}={state[key]!r}: expected an integer that is 0 or more")
    history_from_state(state.get("history", []), state["step"])
    if not isinstance(state["layers"], Mapping):
        raise ValueError(f"the checkpoint has layers of type {type(state['layers']).__name__}, not a mapping by name")
    saved, own = state["layers"], {layer.name: layer for layer in layers}
    if saved.keys() != own.keys():
        missing, surplus = sorted(saved.keys() - own.keys()), sorted(own.keys() - saved.keys())
        raise ValueError(
            f"the checkpoint has other sparse layers: {missing[:3]} are sparse there and not here, {surplus[:3]} here and "
            "not there; call sparsify_ with the include, exclude and patterns of the run that saved it"
        )
    for name, entry in saved.items():
        layer = own[name]
        if (
            not isinstance(entry, Mapping)
            or not {"pattern", "shape"} <= entry.keys()
            or not isinstance(entry["shape"], list | tuple)
        ):
            raise ValueError(f"{name}: the checkpoint's entry is not a mapping with the layer's pattern and shape")
        if entry["pattern"] != str(layer.pattern):
            raise ValueError(f"{name}: the checkpoint has pattern {entry['pattern']}, this run {layer.pattern}")
        if list(entry["shape"]) != list(layer.mask.shape):
            raise ValueError(f"{name}: the checkpoint has shape {tuple(entry['shape'])}, this run {tuple(layer.mask.shape)}")
        if "u" in entry:
            _check_prices(name, entry, layer)
        if "decay" in entry:
            _check_decay(name, entry["decay"])
        if mode == "static" and "mask" not in entry:
            raise ValueError(f"{name}: the checkpoint of a static run must have a mask, but has none")
        if "mask" in entry:
            check_mask(name, entry["mask"], layer.pattern, layer)


def _check_decay(name: str, given: Any) -> None:
    numbers = given if isinstance(given, list | tuple) else ()
    if len(numbers) != 2 or not all(isinstance(one, int | float) and 0 <= one < math.inf for one in numbers):
        raise ValueError(
            f"{name}: the checkpoint has decay={given!r:.60}: expected the decay done and the largest rate, two numbers"
        )


def _check_prices(name: str, entry: Mapping[str, Any], layer: SparseLayer) -> None:
    """Raise ValueError unless the next mask search of the layer can start from these prices."""
    m = getattr(layer.pattern, "m", 1)
    matrices, rows, columns = to_matrices(torch.empty(layer.mask.shape, device="meta"), layer.layout).shape
    tiles = matrices * -(-rows // m) * -(-columns // m)
    for side, shape in (("u", (tiles, m)), ("v", (tiles, m)), ("exponent", (tiles,))):
        given = entry.get(side)
        if not isinstance(given, Tensor) or given.dtype != torch.int32 or tuple(given.shape) != shape:
            found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name}: the checkpoint's prices {side!r} are {found}; expected int32 of shape {shape}")


def check_mask(name: str, mask: Tensor, pattern: Structure, layer: SparseLayer) -> None:
    """Raise ValueError unless a given mask has the layer's shape, obeys its pattern and keeps something."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: a mask must be a bool tensor, True = kept; this one is {found}")
    if mask.shape != layer.weight.shape:
        raise ValueError(f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(layer.weight.shape)}")
    verify(mask, pattern, layout=layer.layout, name=name).check()
    if (reason := mask_refusal(mask, pattern, layer.layout)) is not None:
        raise PatternError(f"{name}: {reason}")
