"""The tensors of a layer that a pruning job changes: current, new, and as stored in a journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.layers import Layer
from bisparse.pruning.bias import bias_of
from bisparse.pruning.journal import Journal, JournalError
from bisparse.pruning.layer import Change
from bisparse.pruning.mapped_weights import MappedWeights
from bisparse.results import LayerResult
from bisparse.rollback import same_bits
from bisparse.tiles import Layout, LayoutKind

__all__ = ["live_tensors", "restore_", "resumed_result", "tensors_after", "write_"]


def live_tensors(layer: Layer, norms: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors that pruning a layer may change."""
    bias = bias_of(layer, norms)
    return {"weight": layer.weight} | ({} if bias is None else {"bias": bias.tensor})


def tensors_after(change: Change, norms: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The values of `live_tensors` after a change; the layer itself is not written."""
    after = live_tensors(change.layer, norms)
    weight = after["weight"] if change.weight is None else change.weight
    after["weight"] = weight.masked_fill(~change.mask.to(weight.device), 0)
    if change.bias is not None:
        assert change.bias_at is not None
        after["bias"] = (change.bias * change.bias_at.sign).to(after["bias"].dtype)
    return after


def write_(
    layer: Layer, tensors: Mapping[str, Tensor], norms: Mapping[str, nn.Module], mapped: MappedWeights | None = None
) -> None:
    """Overwrite a layer's tensors in place, by the names of `live_tensors`, and check them by reading back.

    Args:
        mapped: where a weight that is mapped from a file refers to the new values instead.

    Raises:
        RuntimeError: reading back returns other values.
    """
    with torch.no_grad():
        for key, live in live_tensors(layer, norms).items():
            if mapped is None or not mapped.place(live, tensors[key]):
                live.copy_(tensors[key])
    for key, live in live_tensors(layer, norms).items():
        if not same_bits(live, tensors[key]):
            raise RuntimeError(
                f"{layer.name}: its {key} differs from what was written to it: {type(layer.module).__name__} or "
                f"{type(live).__name__} changes the values written to it; exclude the layer"
            )


def restore_(layer: Layer, tensors: Mapping[str, Tensor], norms: Mapping[str, nn.Module]) -> None:
    """Restore a layer's tensors. Unchanged tensors are not written, since they may not be writable."""
    with torch.no_grad():
        for key, live in live_tensors(layer, norms).items():
            if not same_bits(live, tensors[key]):
                live.copy_(tensors[key])


def resumed_result(layer: Layer, journal: Journal, norms: Mapping[str, nn.Module]) -> LayerResult:
    """The result that an interrupted job stored for a layer. The layer itself is still unchanged.

    Raises:
        JournalError: the result does not match the layer, or its file is damaged.
    """
    live = live_tensors(layer, norms)
    tensors, result = journal.get("done", layer.name)
    kinds, expected = ({key: (one.shape, one.dtype) for key, one in group.items()} for group in (tensors, live))
    if kinds != expected:
        raise JournalError(f"{layer.name}: {journal.folder} has {kinds} for it, but the layer is {expected}; start a new journal")
    # The model's own values take precedence over those that the interrupted job stored.
    journal.put("dense", layer.name, live)
    return _result_from(result)


def _result_from(saved: dict[str, Any]) -> LayerResult:
    layout = saved.pop("layout")
    shape = tuple(saved.pop("shape"))
    return LayerResult(layout=Layout(LayoutKind(layout["kind"]), layout["groups"], layout["parts"]), shape=shape, **saved)
