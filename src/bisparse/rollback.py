"""All or nothing: a model that a failed call has begun to change goes back to what it was, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from bisparse.memory_map import memory_of, read_only_ids

__all__ = ["Rollback", "same_bits"]

CONTAINERS = (dict, set, list)
"""Attributes that are changed in place: parameters, buffers, submodules, hooks."""


class Rollback:
    """Undoes, when its ``with`` block raises anything at all, what the block did to a model and to tensors.

    Of the model it restores everything but the numbers in its tensors: classes, parameters, buffers, submodules, hooks,
    attributes, training mode, ``requires_grad``, gradients; and the state of torch's random number generators. Numbers are
    restored for the tensors that `touch` was called with, which are copied: call it before each write.

    Args:
        model: None: only tensors are restored.

    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.detach().clone()
    >>> try:
    ...     with Rollback(layer) as rollback:
    ...         rollback.touch(layer.weight)
    ...         _ = layer.eval().weight.data.zero_()
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     print(bool((layer.weight == before).all()), layer.training)
    True True
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._model = model
        self._modules: list[tuple[nn.Module, type[nn.Module], dict[str, Any], dict[str, Any]]] = []
        self._gradients: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        self._released: list[tuple[dict[str, Any], str, TensorWeakRef, Callable[[], nn.Parameter]]] = []
        self._writable: set[tuple[int, int] | None] = {None}
        """Addresses that were found writable, of tensors that the model holds; None stands for other kinds of memory."""

    def touch(self, *tensors: Tensor) -> None:
        """Keep a copy of tensors that are about to be written to; of each the first copy counts.

        Raises:
            ValueError: the memory of one is mapped read-only.
        """
        self.check_writable(*tensors)
        for one in tensors:
            if id(one) not in self._tensors:
                self._tensors[id(one)] = one, one.detach().clone()

    def check_writable(self, *tensors: Tensor) -> None:
        """Raise ValueError if the memory of a tensor is mapped read-only: writing would end the process. Only Linux says so."""
        unknown = [one for one in tensors if memory_of(one) not in self._writable]
        if not unknown:
            return
        # The whole model at once, since the list of mappings is long; what it does not hold can be freed, and its address reused.
        own = [] if self._model is None else [*self._model.parameters(), *self._model.buffers()]
        refused = read_only_ids([*unknown, *own])
        self._writable |= {memory_of(one) for one in own if id(one) not in refused}
        for one in unknown:
            if id(one) in refused:
                raise ValueError(
                    f"the memory of a weight of shape {tuple(one.shape)} is mapped read-only, such as by "
                    "numpy.load(mmap_mode='r'): it cannot be changed in place; copy it first, by parameter.data = "
                    "parameter.data.clone()"
                )

    def release(self, module: nn.Module, parameter: str, rebuild: Callable[[], nn.Parameter]) -> None:
        """Stop holding a parameter that the block has taken from a module; after an error `rebuild` makes it again.

        It stays the same object if anyone else holds it. One that has a gradient, attributes or hooks is held nevertheless.
        """
        contents = next(contents for one, _, _, contents in self._modules if one is module)["_parameters"]
        held = contents[parameter]
        if held.grad is not None or vars(held) or held._backward_hooks:
            return
        self._gradients = [entry for entry in self._gradients if entry[0] is not held]
        contents[parameter] = None
        self._writable = {None}  # its address can be reused
        self._released.append((contents, parameter, TensorWeakRef(held), rebuild))

    def __enter__(self) -> Rollback:
        modules = [] if self._model is None else list(self._model.modules())
        self._modules = [(module, type(module), dict(vars(module)), _contents(module)) for module in modules]
        self._gradients = [(one, one.requires_grad, one.grad) for module in modules for one in module.parameters(recurse=False)]
        self._random = _random_state()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._restore()
        torch.clear_autocast_cache()  # casts of weights that the block has changed, in an autocast of the caller
        self._tensors.clear()
        self._modules, self._gradients, self._released, self._writable = [], [], [], {None}

    def _restore(self) -> None:
        for content, name, reference, rebuild in self._released:
            live = reference()
            content[name] = rebuild() if live is None else live
        for module, kind, attributes, contents in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, held in contents.items():
                _refill_(attributes[name], held)
        with torch.no_grad():
            # The last copy first: of tensors that share memory the earlier copy has the older numbers.
            for live, before in reversed(self._tensors.values()):
                # A tensor that could not be written to cannot be restored either, and need not be.
                if not same_bits(live, before):
                    live.copy_(before)
        for parameter, required, gradient in self._gradients:
            # What has not changed is not set: of a tensor made in inference mode it cannot be.
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        _set_random_state(self._random)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits: NaN equals itself, and 0.0 is not -0.0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    with torch.no_grad():
        plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in (one, other)]
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in plain]
        return torch.equal(*(tensor.to(bits[0].device) for tensor in bits))


def _contents(module: nn.Module) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, CONTAINERS)}


def _refill_(container: Any, contents: Any) -> None:
    """Make a container hold what its copy holds, and stay the same object."""
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
