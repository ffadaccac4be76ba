"""All or nothing: modules that are changed one by one, and given back as they were if a later step fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.utils.weak import TensorWeakRef

from bisparse.accelerate.linear_packed import PackedLinear

__all__ = ["all_or_nothing"]

Remember = Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def all_or_nothing() -> Iterator[Remember]:
    """Remember each module before it is changed; after an exception all of them are as they were, down to the same parameters.

    >>> layer = nn.Linear(4, 4)
    >>> try:
    ...     with all_or_nothing() as remember:
    ...         with remember(layer):
    ...             layer.bias = None
    ...         raise RuntimeError("a later step fails")
    ... except RuntimeError:
    ...     layer.bias is None
    False
    """
    snapshots: list[_Snapshot] = []

    @contextmanager
    def remember(module: nn.Module) -> Iterator[None]:
        snapshots.append(_Snapshot(module))
        yield
        snapshots[-1].let_go_of_weight()

    try:
        yield remember
    except BaseException:
        for snapshot in reversed(snapshots):
            snapshot.restore()
        raise


class _Snapshot:
    """The class and attributes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, module.__class__
        self.attributes: dict[str, Any] = module.__dict__.copy()
        # Parameters, buffers and hooks are changed in place, and handles of hooks refer to the dictionary that they are in.
        self.contents: dict[str, Any] = {
            name: value.copy() for name, value in self.attributes.items() if isinstance(value, dict | set)
        }
        self.weight: TensorWeakRef | None = None

    def let_go_of_weight(self) -> None:
        """Free a dense weight once it is packed, unless someone else holds it or it carries what its numbers do not tell."""
        weight = self.contents["_parameters"].get("weight")
        if not isinstance(self.module, PackedLinear) or weight.grad is not None or vars(weight) or weight._backward_hooks:
            return
        self.weight = TensorWeakRef(weight)
        self.contents["_parameters"]["weight"] = None

    def restore(self) -> None:
        """Give the module its class and attributes back."""
        if self.weight is not None:
            weight = self.weight()
            if weight is None:
                assert isinstance(self.module, PackedLinear)
                packed = self.module.packed_weight
                weight = nn.Parameter(packed.dense(), packed.trainable)
            self.contents["_parameters"]["weight"] = weight
        self.module.__class__ = self.kind
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for name, content in self.contents.items():
            self.attributes[name].clear()
            self.attributes[name].update(content)
