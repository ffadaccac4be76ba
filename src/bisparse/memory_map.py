"""What the memory of a tensor is mapped as: read-only, or from a file as a copy of its own. Only Linux lists it."""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["is_mapped", "is_read_only"]

MAPS = Path("/proc/self/maps")
READ_ONLY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-")
PRIVATE_FILE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ [0-9a-f:]+ [1-9]\d*\s+/")


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is mapped from a file, writable and private: writing does not change the file.

    >>> is_mapped(nn.Linear(2, 2).weight)
    False
    """
    return _lies_in(tensor, PRIVATE_FILE)


def is_read_only(tensor: Tensor) -> bool:
    """Whether a tensor's memory is mapped read-only, so that writing to it would end the process."""
    return _lies_in(tensor, READ_ONLY)


def _lies_in(tensor: Tensor, kind: re.Pattern[str]) -> bool:
    """Whether a tensor is within one mapping of a kind. Mappings change while a process runs, so they are read for each call."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    if not tensor.numel():
        return False
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    ranges = sorted((int(one[1], 16), int(one[2], 16)) for one in map(kind.match, lines) if one is not None)
    place = bisect_right(ranges, (tensor.data_ptr(), 2**64)) - 1
    return place >= 0 and tensor.data_ptr() + tensor.nbytes <= ranges[place][1]
