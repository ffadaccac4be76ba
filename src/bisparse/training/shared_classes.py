"""Classes of parametrized modules: one shared class for equal modules, so that they share compiled code, or a separate one.

torch makes a new class for each module that it parametrizes. Compiled code is guarded by the classes of its modules, so equal
blocks would be compiled separately, until torch's recompilation limit is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["separate_class", "share_class"]

_SHARED: WeakValueDictionary[tuple[type[nn.Module], frozenset[str]], type[nn.Module]] = WeakValueDictionary()
"""Shared classes by original class and parametrized names."""
PYTHONS_OWN = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__slotnames__"}
"""Attributes of any class; isinstance with a protocol adds `__annotations__`, copying and pickling add `__slotnames__`."""
TORCHS_OWN = {"__getstate__", "__deepcopy__"} | PYTHONS_OWN
"""Attributes of a class that torch made for a parametrized module."""


class _Shared(type):
    """Metaclass of shared classes: torch may add or remove a parametrization of one module without affecting the others."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if isinstance(value, property):
            value = _of_parametrized(name, value)
            for key in [key for key, kind in _SHARED.items() if kind is cls]:
                del _SHARED[key]  # it no longer matches its key; later modules get a new class
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):  # other modules still need these
            super().__delattr__(name)


def share_class(module: nn.Module) -> None:
    """Give a parametrized module the class shared by all with the same original class and parametrized names.

    A module whose class was also changed by another library keeps its own.
    """
    old, base = type(module), type(module).__bases__[0]
    own = {name: value for name, value in vars(old).items() if isinstance(value, property)}
    if own.keys() != set(module.parametrizations) or vars(old).keys() - own.keys() - TORCHS_OWN:  # type: ignore[arg-type]
        return
    key = base, frozenset(own)
    shared = _SHARED.get(key)
    if shared is None:
        guarded = {name: _of_parametrized(name, one) for name, one in own.items()}
        shared = cast(type[nn.Module], _Shared(old.__name__, (base,), _contents(old) | guarded))
        _SHARED[key] = shared
    module.__class__ = shared


def separate_class(module: nn.Module, base: type[nn.Module] | None = None) -> None:
    """Give a parametrized module a class of its own, derived from `base` or from its original class.

    Needed before a parametrization is removed, since copies share a class, and the removal deletes the parameter's property
    from it.
    """
    old = type(module)
    kind = base or old.__bases__[0]
    module.__class__ = type(f"Parametrized{kind.__name__}", (kind,), _contents(old))


def _refuse_pickling(module: nn.Module) -> Any:
    raise RuntimeError(
        f"a model with parametrized weights, as in sparse training, cannot be pickled (such as by torch.save(model); this is a "
        f"{type(module).__bases__[0].__name__}): save model.state_dict() and sparsity.state_dict(), or the plain model that "
        "finalize_(copy.deepcopy(model)) makes"
    )


def _contents(kind: type[nn.Module]) -> dict[str, Any]:
    found = {name: value for name, value in vars(kind).items() if name not in PYTHONS_OWN}
    return found | {"__getstate__": _refuse_pickling}


def _of_parametrized(name: str, own: property) -> property:
    """The property for modules in which this name is parametrized; for others it returns their parameter."""
    get: Callable[[Any], Tensor] = own.fget  # type: ignore[assignment]

    def guarded(self: Any) -> Any:
        if name not in self.parametrizations:
            return nn.Module.__getattr__(self, name)
        if not parametrize._cache_enabled:
            return get(self)
        # torch's own getter caches under the module for which it was made, so that all of the class would get that one's weight.
        key = (id(self), name)
        if parametrize._cache.get(key) is None:
            parametrize._cache[key] = self.parametrizations[name]()
        return parametrize._cache[key]

    return property(guarded, own.fset)
