"""Parameters whose elements share memory with each other, or with a part of another parameter: writing one changes the other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["clashes", "memory_of"]


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
