"""Finds a model's weights in a torch file: a state dict, possibly nested in a training checkpoint, or a pickled module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bisparse.checkpoint.formats.unpickle import NotPlain, StorageRef, Stub, TensorRef, Wrapped
from bisparse.errors import CheckpointError

__all__ = ["Stored", "find_weights"]

Stored = TensorRef | NotPlain | Wrapped
"""The representation of a tensor that was not loaded."""

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys of the model's weights in training checkpoints; the first one with tensors counts."""
MAX_DEPTH = 64
MAX_MODULES = 1 << 17
SHOWN = 8
SAVE = "save `model.state_dict()` with torch.save, or use safetensors"


def find_weights(content: Any, path: Path, key: str | None = None) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """A model's tensors by name, and notes on other content of the file.

    Args:
        key: key of the weights, such as ``"model.state_dict"``; by default it is found.

    Raises:
        CheckpointError: there are none, or several state dicts to choose from.
    """
    if key is not None:
        place, node = key, _lookup(content, key)
        if node is None:
            raise CheckpointError(path, f"holds no {key!r}; {_outline(content)}", "name one of these with --key (key=)")
        if not _tensors(node):
            inner, node = _search(node, path, key)
            place = ".".join((key, *inner))
    else:
        inner, node = _search(content, path)
        place = ".".join(inner)
    tensors, notes = _tensors(node), []
    for name in tensors:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise CheckpointError(path, f"has a tensor named {name!a}, which is no Unicode text", "rename it and save again")
    if place:
        others = [str(one) for one in _mapping(content) if one != place.partition(".")[0] and one != place]
        notes.append(
            f"{path.name}: only the weights under '{place}' are kept" + (f", not {', '.join(others[:SHOWN])}" if others else "")
        )
    if isinstance(node, Stub) and (_is_module(node) or _is_script(node)):
        notes.append(f"{path.name}: of {node.path} only the tensors are read; its code was not loaded")
    elif dropped := [str(one) for one in _mapping(node) if one not in tensors]:
        notes.append(f"{path.name}: entries that are no tensors are not kept: {', '.join(dropped[:SHOWN])}")
    return tensors, tuple(notes)


def _search(content: Any, path: Path, under: str = "") -> tuple[tuple[str, ...], Any]:
    """The state dict in a file's content, and its keys from the outside in."""
    place: tuple[str, ...] = ()
    node = content
    for _ in range(MAX_DEPTH):
        children = {name: inner for name, inner in _mapping(node).items() if isinstance(name, str) and _holds_tensors(inner)}
        conventional = next((name for name in NESTED if name in children), None)
        if conventional is not None and not isinstance(_mapping(node)[conventional], Stored):
            place, node = (*place, conventional), children[conventional]
        elif _tensors(node):
            return place, node
        elif len(children) == 1:
            ((name, node),) = children.items()
            place = (*place, name)
        elif children:
            raise CheckpointError(
                path,
                f"holds several state dicts: {', '.join('.'.join((*place, name)) for name in list(children)[:SHOWN])}",
                "choose one with --key (key=)",
            )
        else:
            break
    raise CheckpointError(path, f"holds no tensors{f' under {under!r}' if under else ''}; {_outline(content)}", SAVE)


def _outline(content: Any) -> str:
    if isinstance(content, Stub):
        return f"it is a {content.path}"
    if isinstance(content, Mapping):
        return f"its keys are {[str(one) for one in list(content)[:SHOWN]]}"
    return f"it is a {type(content).__name__}, not a state dict"


def _mapping(node: Any) -> Mapping[Any, Any]:
    """The content of a node by name: a dict's items, or the attributes of a stub."""
    if isinstance(node, Mapping):
        return node
    if isinstance(node, Stub):
        return node.items or (node.state if isinstance(node.state, Mapping) else {})
    return {}


def _is_module(node: Any) -> bool:
    return isinstance(node, Stub) and isinstance(node.state, Mapping) and "_parameters" in node.state and "_modules" in node.state


def _is_script(node: Any) -> bool:
    return isinstance(node, Stub) and node.path.startswith("__torch__.")


def _tensors(node: Any) -> dict[str, Stored]:
    """The tensors of a state dict, or of a module under the names that its state_dict would have."""
    if _is_module(node) or _is_script(node):
        return _module_tensors(node)
    named = ((name, _stored(value)) for name, value in _mapping(node).items() if isinstance(name, str))
    return {name: value for name, value in named if value is not None}


def _stored(value: Any) -> Stored | None:
    """The representation of a tensor, or None; tensors made by an unknown function become `NotPlain`."""
    if isinstance(value, Stored):
        return value
    if isinstance(value, Stub) and any(isinstance(one, StorageRef | Stored) for one in value.args):
        return NotPlain(f"is made by {value.path}, not a plain tensor", "save dense tensors")
    return None


def _module_tensors(module: Any) -> dict[str, Stored]:
    """The tensors of a module and its submodules, in the order of its state_dict.

    Raises:
        ValueError: too many modules, counted under each of their names, such as if each contains the next one twice.
    """
    found: dict[str, Stored] = {}
    waiting = [("", module, 0)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return found
        prefix, one, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError("modules nested too deeply")
        tensors, modules = _parts(one)
        found |= {f"{prefix}{name}": stored for name, value in tensors.items() if (stored := _stored(value)) is not None}
        waiting += [(f"{prefix}{name}.", inner, depth + 1) for name, inner in reversed(modules.items())]
    raise ValueError(f"more than {MAX_MODULES:,} modules")


def _parts(module: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """A module's own tensors and its submodules, by name."""
    if _is_script(module):
        own = dict(_mapping(module))
        return own, {name: inner for name, inner in own.items() if _is_script(inner)}
    if not _is_module(module):
        return {}, {}
    left_out = module.state.get("_non_persistent_buffers_set")
    left_out = left_out if isinstance(left_out, set) else set()
    buffers = {name: value for name, value in _mapping(module.state.get("_buffers")).items() if name not in left_out}
    return {**_mapping(module.state["_parameters"]), **buffers}, dict(_mapping(module.state["_modules"]))


def _holds_tensors(node: Any) -> bool:
    """Whether a node contains named tensors at any depth; lists, such as an optimizer's, are not searched."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Stored):
            return True
        if id(one) in seen:
            continue
        seen.add(id(one))
        if _tensors(one):
            return True
        waiting.extend(inner for name, inner in _mapping(one).items() if isinstance(name, str) and not isinstance(inner, Stored))
    return False


def _lookup(node: Any, key: str) -> Any:
    """The node at a path of keys, which may contain dots."""
    own = _mapping(node)
    if key in own:
        return own[key]
    for place in (i for i, letter in enumerate(key) if letter == "."):
        if (head := key[:place]) in own and (found := _lookup(own[head], key[place + 1 :])) is not None:
            return found
    return None
