"""What the masks file of a checkpoint says of its weights, compared with these weights."""

from __future__ import annotations

import os

import numpy as np
import torch

from bisparse.checkpoint.input_file import open_input
from bisparse.checkpoint.reader import Source
from bisparse.checkpoint.sidecar import MASKS, Sidecar, packed_size
from bisparse.checkpoint.stored_tensor import StoredTensor, read_header
from bisparse.errors import CheckpointError
from bisparse.results import LayerResult
from bisparse.verification import verify

__all__ = ["wrong_masks"]

PIECE = 1 << 21
"""Weights compared at a time; a multiple of 8, since masks are packed bits."""


def wrong_masks(sidecar: Sidecar, source: Source) -> list[str]:
    """What the masks file next to a sidecar says that the weights contradict, each as a sentence; nothing without such a file.

    A mask keeps every weight that is not zero; it may keep zeros too, but as few as its pattern asks for.
    """
    path = source.path / MASKS
    if not source.path.is_dir() or not os.path.lexists(path):
        return []
    try:
        _, masks = read_header(open_input(path))
        return [
            said
            for result in sidecar.report
            if (tensor := source.tensors.get(result.parameter)) is not None
            and (said := _wrong(result, masks.get(result.parameter), tensor)) is not None
        ]
    except CheckpointError as error:
        return [f"{MASKS} cannot be used: it {error.problem}"]


def _wrong(result: LayerResult, mask: StoredTensor | None, tensor: StoredTensor) -> str | None:
    layer = result.name
    if mask is None:
        return f"{MASKS} has no mask of {layer}"
    if mask.dtype != "U8" or mask.nbytes != packed_size(tensor.shape):
        return f"the mask of {layer} in {MASKS} does not have the shape of its weight"
    if tensor.torch_dtype is None:
        return None
    lost = 0
    for start in range(0, tensor.size, PIECE):
        stop = min(start + PIECE, tensor.size)
        bits = np.unpackbits(mask.read(start // 8, -(-stop // 8)).numpy(), count=stop - start)
        weights = tensor.read(start, stop)
        weights = weights.float() if weights.is_floating_point() and weights.dtype.itemsize == 1 else weights
        lost += int(((weights != 0) & ~torch.from_numpy(bits).view(torch.bool)).sum())
    if lost:
        return f"the mask of {layer} in {MASKS} drops {lost:,} weights that are not zero"
    whole = torch.from_numpy(np.unpackbits(mask.read().numpy(), count=tensor.size)).view(torch.bool).view(tensor.shape)
    found = verify(whole, result.pattern, layout=result.layout)
    return None if found else f"the mask of {layer} in {MASKS} breaks {result.pattern} in {found.violations:,} groups"
