"""What the memory of tensors is mapped as: read-only, or from a file as a copy of its own. Only Linux lists it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["mapped_ids", "memory_of", "read_only_ids"]

MAPS = Path("/proc/self/maps")
READ_ONLY = re.compile(rb"\S+ r-")
PRIVATE_FILE = re.compile(rb"\S+ rw-p [0-9a-f]+ [0-9a-f:]+ [1-9]\d*\s+/")


def memory_of(tensor: Tensor) -> tuple[int, int] | None:
    """The first address of a tensor's memory, and the one after its last; None unless it is plain memory of the CPU."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    return (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) if tensor.numel() else None


def mapped_ids(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors whose memory is mapped from a file, writable and private: writing does not change the file.

    >>> mapped_ids([nn.Linear(2, 2).weight])
    set()
    """
    return _lie_in(tensors, PRIVATE_FILE)


def read_only_ids(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors whose memory is mapped read-only, so that writing to it would end the process."""
    return _lie_in(tensors, READ_ONLY)


def _lie_in(tensors: Iterable[Tensor], kind: re.Pattern[bytes]) -> set[int]:
    """Ids of the tensors that are within one mapping of a kind.

    Mappings change while a process runs, so they are read for each call: some milliseconds in a process with many libraries.
    They are not read for memory that torch has allocated, and could enlarge: it is anonymous and writable. What comes from a
    file, from NumPy or from any other owner has a storage that cannot be resized.
    """
    foreign = (one for one in tensors if memory_of(one) is not None and not one.untyped_storage().resizable())
    places = {id(one): place for one in foreign if (place := memory_of(one)) is not None}
    if not places:
        return set()
    try:
        lines = MAPS.read_bytes().split(b"\n")[:-1]  # by rising addresses; a name may hold any other character
    except OSError:
        return set()
    found = set()
    for key, (start, end) in places.items():
        number = bisect_right(lines, start, key=_start) - 1
        if number >= 0 and kind.match(lines[number]) and end <= int(lines[number].split(b" ", 1)[0].partition(b"-")[2], 16):
            found.add(key)
    return found


def _start(line: bytes) -> int:
    return int(line.partition(b"-")[0], 16)
