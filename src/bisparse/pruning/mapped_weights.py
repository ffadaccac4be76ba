"""Weights that are mapped from a file go on being mapped when a job writes them, so that a model may be larger than memory.

transformers maps the weights of a safetensors file: the system reads pages when they are used, and drops them when memory is
short. A page that is written to becomes a private copy, which it cannot drop. So instead of copying new values into such a
weight, a job lets it refer to the values as they are mapped from its journal. Only on Linux, which lists what is mapped.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from bisparse.memory_map import mapped_ids

__all__ = ["MappedWeights"]


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library than GNU's
        return None
    return found


def _trim() -> None:
    """Give the memory of freed tensors back to the system; GNU's C library would keep most of what each layer needed."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


def _shared(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors whose memory others use: another one of them, or any view elsewhere, such as one in a graph."""
    plain = [one for one in tensors if type(one) in (Tensor, nn.Parameter) and one.layout == torch.strided and one.nbytes]
    plain = [one for one in plain if one.device.type == "cpu"]
    own = Counter(one.untyped_storage()._cdata for one in plain)
    found, end, last = set(), 0, 0
    for one in sorted(plain, key=Tensor.data_ptr):
        storage, first = one.untyped_storage(), one.data_ptr()
        # One use is that of `storage` itself.
        if torch._C._storage_Use_Count(storage._cdata) > own[storage._cdata] + 1:
            found.add(id(one))
        if first < end:
            found |= {id(one), last}
        if (own_end := first + _extent(one)) > end:
            end, last = own_end, id(one)
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    steps = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(steps) + 1) * tensor.element_size()


class MappedWeights:
    """Gives new values to a model's weights that are mapped from a file.

    Args:
        model: the model; of its tensors, those whose memory is used elsewhere are not replaced, since these uses see what is
            written to a weight in place: by other tensors of the model, and by views that anything in this process holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._shared = _shared({id(one): one for one in (*model.parameters(), *model.buffers())}.values())
        from_files = mapped_ids(model.parameters())
        self._places = {id(one): one.data_ptr() for one in model.parameters() if id(one) in from_files}
        """By id, where the weights that are mapped from a file are mapped."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """By id, weights that were replaced, and what they referred to."""

    def place(self, weight: Tensor, values: Tensor) -> bool:
        """Let a weight refer to values; False if it is not mapped, or must keep its memory for another reason."""
        if (
            type(weight) is not nn.Parameter
            or id(weight) not in self._places
            or self._places[id(weight)] != weight.data_ptr()
            or id(weight) in self._shared
            or weight.is_inference()
            or values.is_inference()  # of a call in inference mode: the weight could not be trained any more
            or not (weight.is_contiguous() and values.is_contiguous())
            or (weight.shape, weight.dtype) != (values.shape, values.dtype)
            or not mapped_ids([values])
        ):
            return False
        self._before.setdefault(id(weight), (weight, weight.data))
        weight.data = values
        self._places[id(weight)] = values.data_ptr()
        increment_version(weight)  # for graphs that need the values of before
        _trim()
        return True

    def restore(self) -> None:
        """Let all weights refer to what they referred to before."""
        for weight, before in self._before.values():
            weight.data = before
            increment_version(weight)
        self._before.clear()

    def __len__(self) -> int:
        return len(self._before)
