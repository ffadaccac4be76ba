"""2:4-T masks of layers on a GPU, all launched before the one wait for all: the host never stands between two searches.

Nothing is gathered and no magnitudes are stored: each weight is read where it lies, 4 bytes a weight in float32, and its mask
written, 1. What a kernel alone cannot decide, a tile of too wide a range or numbers that are not finite, is left to `MaskSearch`.
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
"""Where a launch returns before its kernel has run."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATTERN = Pattern(2, 4, transposable=True)


def masks_together(layers: Iterable[SparseLayer], exactly: bool) -> dict[str, Bool[Tensor, "O I"]]:
    """The best masks by magnitude, by name, of those layers for which this is all there is to do."""
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
