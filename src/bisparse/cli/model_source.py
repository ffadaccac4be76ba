"""Load a model by name: a transformers folder, a model in the local Hugging Face cache, or a function of the user's."""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.checkpoint import CheckpointError
from bisparse.checkpoint.hub import find_source
from bisparse.checkpoint.names import some_of
from bisparse.checkpoint.reader import open_source as read_headers
from bisparse.cli.console import is_function
from bisparse.errors import install_extra
from bisparse.user_errors import ends_the_process, error_in_one_line

__all__ = ["Source", "open_source", "place_of"]


@dataclass(frozen=True)
class Source:
    """A model with its tokenizer, calibration data and folder."""

    model: nn.Module
    tokenizer: Any = None
    """Tokenizer of a transformers model."""
    batches: list[Any] | None = None
    """Calibration data that the function returned; None if it returned none."""
    folder: Path | None = None
    """The transformers folder that it was loaded from, whose other files belong to the model; None for .gguf and functions."""


def open_source(name: str, *, tokenizer: bool = True) -> Source:
    """Load ``module:function``, which returns a model or (model, batches), or a folder or .gguf file of transformers.

    ``org/name`` is taken from the local Hugging Face cache.

    Args:
        tokenizer: also load the model's tokenizer; image models have none. That of a .gguf file is always loaded.

    Raises:
        CheckpointError: the folder's files are damaged, config.json names no transformers class, or the model's tensors
            and those of the files do not match: missing, unexpected or of different shapes.
        ValueError: there is no such source, it cannot be loaded, or transformers is not installed.
    """
    if is_function(name):
        return _call(name)
    path = _path_of(name)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{name} is a file: pass the folder of the transformers model, a .gguf file, or module:function")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"{name} has no config.json, which describes the model: add the config.json that transformers saves with the "
            "weights, or pass module:function, your own function that builds the model, loads these weights and returns it"
        )
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{name}: loading it needs transformers; {install_extra('transformers')}") from error
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    with _loading(path, "the model"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    kind = transformers.AutoModelForCausalLM if options else _class_of(config, path)
    with _loading(path, "the model"):
        # So that the error can name tensors of a different shape.
        model, info = kind.from_pretrained(
            folder,
            dtype="auto" if not options else torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    _check_whole(path, info)
    if options:
        # Loaded weights are plain numbers; a record of their packed form would be wrong once the model is saved.
        for attribute in ("hf_quantizer", "quantization_method"):
            if hasattr(model, attribute):
                setattr(model, attribute, None)
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    words = None
    if tokenizer or options:
        with _loading(path, "the tokenizer"):
            words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    if options:
        # The folder of a .gguf file may hold other models: its other files are not copied.
        model.name_or_path = str(path)
    return Source(model.eval(), words, folder=None if options else path)


def place_of(name: str) -> Path | None:
    """The folder or file of a source, for a function that of its module or package; None if there is none. Imports nothing.

    Raises:
        ValueError: no such folder or file, and no such model in the local Hugging Face cache.
    """
    if not is_function(name):
        return _path_of(name)
    module = importlib.machinery.PathFinder.find_spec(name.partition(":")[0].partition(".")[0], [os.getcwd(), *sys.path])
    return None if module is None or module.origin is None else Path(module.origin)


def _path_of(name: str) -> Path:
    try:
        return find_source(name)
    except CheckpointError as error:
        raise ValueError(
            f"{name}: no such folder or file (it {error.problem}); {error.remedy}; a function is passed as module:function"
        ) from error


def _class_of(config: Any, path: Path) -> Any:
    """The transformers class that a configuration names; another class could drop the head and rename tensors."""
    import transformers

    named = config.architectures
    name = named[0] if isinstance(named, list | tuple) and named else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            path / "config.json",
            "names no architectures" if not named else f"has architectures {named!r}, which is not a model class of transformers",
            'add the class that the weights were saved from, such as "architectures": ["LlamaForCausalLM"], or pass '
            "module:function, your own function that builds and loads the model",
        )
    return kind


def _check_whole(path: Path, info: Mapping[str, Any]) -> None:
    """Refuse a model whose tensors are not exactly those of its files."""
    missing = [str(key) for key in info["missing_keys"]]
    unexpected = [str(key) for key in info["unexpected_keys"]]
    reshaped = [
        key if isinstance(key, str) else f"{key[0]}, stored as {tuple(key[1])}, not {tuple(key[2])}"
        for key in info["mismatched_keys"]
    ]
    found = {"missing": missing, "unexpected": unexpected, "of a different shape": reshaped}
    if said := [f"{len(keys)} {what} ({some_of(keys)})" for what, keys in found.items() if keys]:
        raise CheckpointError(
            path,
            f"does not match the model that its configuration describes: of the tensors, {'; '.join(said)}",
            "missing ones would be random and unexpected ones dropped: download config.json and all weights again, "
            "or correct config.json (its number of layers, sizes, architectures)",
        )
    if info.get("error_msgs"):
        raise CheckpointError(path, f"could not be loaded completely: {info['error_msgs'][0]}", "download its files again")


@contextmanager
def _loading(path: Path, what: str) -> Iterator[None]:
    """A context manager whose errors name the path, which most errors of transformers do not."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if path.is_dir():
            # bisparse's own reader finds which file is damaged, and how.
            read_headers(path)
        raise ValueError(f"{path}: transformers cannot load {what}: {error_in_one_line(error)}") from error


def _call(name: str) -> Source:
    module_name, _, function_name = name.partition(":")
    # Modules in the current folder are found, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with user_code_errors(f"{name}: importing {module_name} failed"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: there is no module {error.name!r} to import") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{name}: {module_name} has no function {function_name!r}")
    _check_needs_nothing(name, function)
    with user_code_errors(f"{name}() failed"):
        made = function()
    if isinstance(made, nn.Module):
        return Source(made)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ValueError(f"{name}() must return a model, or a model and its calibration batches, not {_described(made)}")
    model, batches = made
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        # Most of these are iterable, but iterating yields rows, keys or letters, not batches.
        raise ValueError(
            f"{name}() must return a model and its calibration batches, an iterable such as a list or a DataLoader, not "
            f"{_described(batches)}; return a single batch as [batch]"
        )
    with user_code_errors(f"{name}(): reading its calibration batches failed"):
        return Source(model, batches=list(batches))


@contextmanager
def user_code_errors(doing: str) -> Iterator[None]:
    """A context manager that turns errors of the user's code into a one-line `ValueError`."""
    try:
        yield
    except (MemoryError, ModuleNotFoundError):
        raise
    except (Exception, SystemExit) as error:
        if ends_the_process(error):
            raise
        raise ValueError(f"{doing}: {error_in_one_line(error)}") from error


def _check_needs_nothing(name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some functions written in C have no signature.
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(
            f"{name} is called without arguments, but takes {signature}: give them defaults, or pass a function without arguments"
        ) from error


def _described(made: Any) -> str:
    kind = type(made).__name__
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(one).__name__ for one in made)}" if made else "an empty tuple"
    return f"{kind} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else kind
