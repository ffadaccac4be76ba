"""State dicts saved by `torch.save`: names, shapes and offsets, without reading the weights and without running a pickle."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bisparse.checkpoint.stored_tensor import CODES, FileTensor, MemoryTensor, StoredTensor, StridedTensor
from bisparse.errors import CheckpointError

__all__ = ["read_state_dict"]

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Where training checkpoints keep the model's weights."""


def read_state_dict(path: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors of a state dict file, and notes on what else the file holds.

    Loaded with ``weights_only=True``: nothing but tensors and plain containers is ever built.

    Raises:
        CheckpointError: not a state dict, a pickle of other objects, truncated or corrupt.
    """
    # Files of torch < 1.6 are one pickle stream: no offsets to know, so they are read whole.
    streamed = zipfile.is_zipfile(path)
    content = _load(path, fake=streamed)
    weights, notes = _weights(content, path)
    return {name: _stored(name, tensor, path, streamed) for name, tensor in weights.items()}, notes


def _load(path: Path, *, fake: bool) -> Any:
    try:
        if fake:
            with FakeTensorMode():
                return torch.load(path, weights_only=True, map_location="cpu")
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            path,
            f"is no state dict of tensors, or is corrupt (its pickle asks for {named[1] if named else 'more than tensors'})",
            "save `model.state_dict()` with torch.save, or use safetensors; other pickles can run code and are never loaded",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CheckpointError(path, f"is truncated or corrupt ({first})", "fetch or save it again") from error


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            path, f"holds a {type(content).__name__}, not a state dict", "save `model.state_dict()` with torch.save"
        )
    inner = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
    weights = content[inner] if inner else content
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise CheckpointError(
            path, f"holds no tensors; its keys are {list(content)[:8]}", "save `model.state_dict()` with torch.save"
        )
    notes = []
    if inner:
        others = [str(key) for key in content if key != inner]
        notes.append(
            f"{path.name}: only the weights under '{inner}' are kept" + (f", not {', '.join(others[:8])}" if others else "")
        )
    if dropped := [str(key) for key in weights if key not in tensors]:
        notes.append(f"{path.name}: entries that are no tensors are not kept: {', '.join(dropped[:8])}")
    return tensors, tuple(notes)


def _stored(name: str, tensor: Tensor, path: Path, streamed: bool) -> StoredTensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(path, f"is stored as {tensor.layout}, {tensor.dtype}", "save dense tensors", tensor=name)
    code = CODES.get(tensor.dtype)
    if code is None:
        raise CheckpointError(path, f"has dtype {tensor.dtype}, which safetensors lacks", "convert it first", tensor=name)
    shape, nbytes = tuple(tensor.shape), tensor.numel() * tensor.dtype.itemsize
    if not streamed:
        return MemoryTensor(name, code, shape, path, nbytes, tensor)
    storage = tensor.untyped_storage()
    start: int | None = storage._checkpoint_offset
    if start is None:
        raise CheckpointError(path, "has no place in the file", "save it again with torch.save", tensor=name)
    if tensor.is_contiguous():
        return FileTensor(name, code, shape, path, nbytes, start + int(tensor.storage_offset()) * tensor.dtype.itemsize)
    whole = FileTensor(name, code, (storage.nbytes() // tensor.dtype.itemsize,), path, storage.nbytes(), start)
    return StridedTensor(name, code, shape, path, nbytes, whole, tensor.stride(), int(tensor.storage_offset()))
