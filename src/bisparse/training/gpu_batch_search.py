"""2:4-T masks of many layers on a GPU, with all kernels launched before a single synchronisation.

Nothing is gathered and no magnitudes are stored: weights are read in place, 4 bytes per weight in float32, and masks are
written, 1 byte per weight. Layers that the kernel cannot solve (wide ranges, non-finite numbers) are left to `MaskSearch`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.distributed.tensor import DTensor

from bisparse.kernels.exact.ops import exact_mask_of_magnitudes
from bisparse.pattern import Pattern
from bisparse.tiles import LayoutKind
from bisparse.training.layer import SparseLayer

__all__ = ["masks_together"]

DEVICES = ("cuda",)
"""Devices with asynchronous kernel launches."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATTERN = Pattern(2, 4, transposable=True)


def masks_together(layers: Iterable[SparseLayer], exactly: bool) -> dict[str, Bool[Tensor, "O I"]]:
    """The best masks by magnitude, by layer name, of the layers that this search can solve."""
    masks, doubts = {}, []
    for layer in layers:
        weight = layer.weight.detach()
        if _fits(layer, weight):
            masks[layer.name], coarse = exact_mask_of_magnitudes(weight, exactly)
            doubts.append(coarse.any())
    if not masks:
        return {}
    doubtful = torch.stack([one.to(doubts[0].device) for one in doubts]).tolist()
    return {name: mask for (name, mask), doubt in zip(masks.items(), doubtful, strict=True) if not doubt}


def _fits(layer: SparseLayer, weight: Tensor) -> bool:
    return (
        layer.pattern == PATTERN
        and layer.layout.kind is LayoutKind.LINEAR
        and not isinstance(weight, DTensor)
        and weight.device.type in DEVICES
        and weight.dtype in DTYPES
        and weight.shape[0] % 4 == 0
        and weight.shape[1] % 4 == 0
    )
