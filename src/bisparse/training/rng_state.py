"""Saves and restores the state of random generators, for runs that resume bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators (all devices), in types that `torch.load` reads safely."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore all generators from a `random_state`: all of them, or, on an error, none.

    Raises:
        ValueError: not what `random_state` returned, or with another number of CUDA devices than there are here.
    """
    if not isinstance(state, Mapping) or not {"python", "numpy", "torch", "cuda"} <= state.keys():
        raise ValueError(f"{state!r:.60} is not what random_state() returned: expected entries python, numpy, torch and cuda")
    python, numbers, cuda = _python(state["python"]), _numpy(state["numpy"]), _cuda(state["cuda"])
    try:
        torch.Generator().set_state(state["torch"])
    except (TypeError, RuntimeError, AttributeError) as error:
        raise _refused("torch", error) from error
    random.setstate(python)
    np.random.set_state(numbers)
    torch.set_rng_state(state["torch"])
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def _python(state: Any) -> tuple[Any, ...]:
    """The state of Python's generator, tried on one of its own."""
    try:
        version, words, gauss = state
        restored = version, tuple(words), gauss
        random.Random().setstate(restored)
        if gauss is not None and not isinstance(gauss, float):
            raise TypeError(f"{gauss!r:.40} is no number")
    except (TypeError, ValueError, OverflowError) as error:
        raise _refused("python", error) from error
    return restored


def _numpy(state: Any) -> tuple[str, Any, int, int, float]:
    """The state of NumPy's generator, tried on one of its own."""
    try:
        kind, keys, position, has_gauss, cached = state
        if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.min() < 0 or keys.max() >= 1 << 32:
            raise TypeError("its keys are no tensor of 32-bit numbers")
        restored = kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached
        np.random.RandomState().set_state(restored)
    except (TypeError, ValueError, RuntimeError, OverflowError, IndexError) as error:
        raise _refused("numpy", error) from error
    return restored


def _cuda(states: Any) -> list[Tensor]:
    """The states of the CUDA devices; none where the run that stored them had none."""
    if not isinstance(states, list | tuple) or not all(isinstance(one, Tensor) and one.dtype == torch.uint8 for one in states):
        raise ValueError(f"the random state has cuda={states!r:.60}: expected a list of byte tensors")
    present = torch.cuda.device_count()
    if states and len(states) != present:
        raise ValueError(
            f"the random state is of {len(states)} CUDA devices, and {present} are here: a run cannot resume bit by bit on them"
        )
    sizes = {one.numel() for one in torch.cuda.get_rng_state_all()} if states else set()
    if any(one.numel() not in sizes for one in states):
        raise ValueError("the random state has states of CUDA devices of another size than those here")
    return list(states)


def _refused(which: str, error: Exception) -> ValueError:
    return ValueError(f"the random state of {which} is not what random_state() returned: {error}")
