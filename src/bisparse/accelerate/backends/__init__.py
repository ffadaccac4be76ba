"""The libraries that multiply by a 2:4 matrix: cuSPARSELt, CUTLASS, and a reference; `cpu` is for CPUs and any pattern."""

from __future__ import annotations

import torch

from bisparse.accelerate.backends.base import HALF, Backend, BackendError, Refusal
from bisparse.accelerate.backends.cpu import CPU, cpu_reason
from bisparse.accelerate.backends.cusparselt import CuSparseLt
from bisparse.accelerate.backends.cutlass import Cutlass
from bisparse.accelerate.backends.reference import Reference

__all__ = [
    "BACKENDS",
    "HALF",
    "Backend",
    "BackendError",
    "Refusal",
    "backend_or_reference",
    "usable_backends",
]

BACKENDS: dict[str, Backend] = {one.name: one for one in (CuSparseLt(), Cutlass(), Reference())}
"""Backends for 2:4 matrices, by name. "auto" takes the first one that runs, and never the reference."""


def usable_backends(device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """By backend, why it cannot run on this device with this dtype; None if it can. "cpu" is for weights of any pattern.

    Raises:
        ValueError: there is no such kind of device.

    >>> usable_backends("cpu")["cusparselt"]
    'cusparselt needs a CUDA device, and the weights are on cpu'
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r:.60}: expected a torch device or its name, such as 'cuda:0'") from error
    reasons = {
        name: (None if dtype is None else backend.dtype_reason(dtype)) or backend.device_reason(device)
        for name, backend in BACKENDS.items()
    }
    return reasons | {CPU: cpu_reason(device, dtype)}


def backend_or_reference(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The wanted backend if it runs on the device, otherwise the reference, such as for a copy on the CPU."""
    own = BACKENDS[wanted]
    return wanted if own.device_reason(device) is None and own.dtype_reason(dtype) is None else "reference"
