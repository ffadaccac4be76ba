"""Tensors whose elements share memory with each other, or with a part of another tensor: writing one changes the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["clashes", "memory_of", "not_written"]


def memory_of(weight: Tensor) -> Hashable:
    """Equal for tensors that are the same view of the same memory, such as tied weights; for others unequal."""
    if not _is_plain(weight):
        return id(weight)
    return weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype


def clashes(parameters: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """By id of the parameter, why it cannot be pruned by itself; tied weights, which are the same view, are no clash."""
    found: dict[int, str] = {}
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for name, weight in parameters:
        if not _is_plain(weight):
            continue
        if any(step == 0 and side > 1 for side, step in zip(weight.shape, weight.stride(), strict=True)):
            found[id(weight)] = "its elements share memory, as after expand(): make it a weight of its own by .clone()"
        storages.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))
    for held in storages.values():
        for number, (name, one) in enumerate(held):
            for other_name, other in held[:number]:
                if one is not other and memory_of(one) != memory_of(other) and _overlap(one, other):
                    for own, theirs in ((one, other_name), (other, name)):
                        found.setdefault(
                            id(own),
                            f"shares a part of its memory with {theirs}, which is another view: pruning one would change the "
                            "other; make one of them a weight of its own by .clone()",
                        )
    return found


def not_written(tensors: Mapping[str, Tensor], written: Collection[str]) -> list[str]:
    """The names of tensors that still hold an old number once the tensors named `written` are written to.

    A tensor that is not written itself is new as a whole if it is tied to a written one, or a view of written memory alone.
    """
    new = [tensor for name, tensor in tensors.items() if name in written]
    same = {memory_of(tensor) for tensor in new}
    ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for tensor in new:
        if _is_plain(tensor) and _has_no_gaps(tensor):
            ranges[tensor.untyped_storage().data_ptr()].append(_bytes(tensor))
    merged = {storage: _merged(parts) for storage, parts in ranges.items()}

    def is_new(tensor: Tensor) -> bool:
        if memory_of(tensor) in same:
            return True
        if not _is_plain(tensor):
            return False
        start, stop = _bytes(tensor)
        return any(first <= start and stop <= last for first, last in merged.get(tensor.untyped_storage().data_ptr(), ()))

    return [name for name, tensor in tensors.items() if name not in written and not is_new(tensor)]


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The part of its storage from a tensor's first element to the end of its last."""
    first, last = _range(tensor)
    return first, last + tensor.element_size()


def _has_no_gaps(tensor: Tensor) -> bool:
    """Whether a tensor has each element between its first and its last in memory, and each once."""
    expected = 1
    for step, side in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if side > 1:
            if step != expected:
                return False
            expected *= side
    return True


def _merged(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch or overlap, joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _is_plain(weight: Tensor) -> bool:
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or weight.layout != torch.strided:
        return False
    return weight.numel() > 0 and weight.untyped_storage().data_ptr() != 0


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two views of a storage have an element in common; views of different dtypes, whether their ranges do."""
    first, last = _range(one)
    other_first, other_last = _range(other)
    if last < other_first or other_last < first:
        return False
    if one.dtype != other.dtype:
        return True
    start = min(one.storage_offset(), other.storage_offset())
    size = max(last, other_last) // one.element_size() + 1 - start
    taken = torch.zeros(size, dtype=torch.bool, device="cpu")
    taken.as_strided(one.shape, one.stride(), one.storage_offset() - start).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset() - start).any())


def _range(weight: Tensor) -> tuple[int, int]:
    """Bytes of the first and of the last element."""
    first = int(weight.storage_offset())
    last = first + sum(int((side - 1) * step) for side, step in zip(weight.shape, weight.stride(), strict=True))
    return first * weight.element_size(), last * weight.element_size()
