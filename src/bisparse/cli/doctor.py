"""`bisparse doctor`: what this machine has, which parts of bisparse work on it, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import typer

from bisparse.cli.console import AsJson, command, print_json, to_stdout
from bisparse.cli.tables import table

__all__ = ["doctor"]

PACKAGES = ("bisparse", "torch", "numba", "numpy", "triton", "transformers", "safetensors", "typer")
FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi2", "avx512bf16", "avx512vnni", "amx-bf16",
)  # fmt: skip


@command
def doctor(as_json: AsJson = False) -> None:
    """Show versions, the processor's instructions and the kernels they select, threads, GPUs, backends and the kernel cache.

    Exit code 1 if the exact solver does not work here, otherwise 0.
    """
    found = _examine()
    if as_json:
        print_json({"ok": found["works"], **found})
    else:
        _show(found)
    if not found["works"]:
        raise typer.Exit(1)


def _examine() -> dict[str, Any]:
    import torch

    from bisparse.accelerate import usable_backends

    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    problem = _solve()
    return {
        "works": problem is None,
        "problem": problem,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
        "processor": _processor(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "gpus": [torch.cuda.get_device_name(one) for one in devices[1:]],
        "backends": {str(one): usable_backends(one) for one in devices},
        "kernel_cache": _cache(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _solve() -> str | None:
    """Why the solver fails on a small matrix; None if its mask is valid and optimal."""
    import torch

    from bisparse import solve, verify

    try:
        found = solve(torch.arange(256.0).view(16, 16), "4:8-T")
    except (RuntimeError, ImportError, OSError) as error:
        return f"the solver fails: {error}"
    return None if verify(found.mask, "4:8-T") and found.gap < 1e-6 else "the solver returns a wrong mask"


def _processor() -> dict[str, Any]:
    import torch

    from bisparse.kernels.numba_runtime.target import processor
    from bisparse.kernels.packed_cpu.instructions import NUMBERS, usable_ways

    name, features = processor()
    ways = {str(dtype).removeprefix("torch."): [way.name for way in usable_ways(dtype)] for dtype in NUMBERS}
    return {
        "name": name,
        "features": [one for one in FEATURES if one in features],
        "packed_products": {dtype: own[0] if own else "plain torch" for dtype, own in ways.items()},
        "torch": torch.backends.cpu.get_cpu_capability(),
    }


def _cache() -> dict[str, Any]:
    """The folder of compiled kernels, and why nothing can be written there, if so."""
    import bisparse
    from bisparse.kernels.numba_runtime.target import cache_folder

    folder = cache_folder() or Path(bisparse.__file__).parent
    try:
        with tempfile.TemporaryFile(dir=folder if folder.exists() else folder.parent):
            problem = None
    except OSError as error:
        problem = f"{error.strerror or error}: numba uses another folder, or compiles again in each process"
    return {"folder": str(folder), "writable": problem is None, "problem": problem}


def _show(found: dict[str, Any]) -> None:
    console, processor, cache = to_stdout(), found["processor"], found["kernel_cache"]
    products = ", ".join(f"{dtype} by {way}" for dtype, way in processor["packed_products"].items())
    rows = [("works", "yes: a small matrix was solved, and its mask is optimal" if found["works"] else found["problem"])]
    rows += [("system", f"{found['platform']}, Python {found['python']}")]
    rows += [(package, version or "not installed") for package, version in found["versions"].items()]
    rows += [
        ("processor", f"{processor['name']}: {' '.join(processor['features']) or 'no vector instructions that bisparse uses'}")
    ]
    rows += [("packed products", products), ("torch's kernels", processor["torch"])]
    rows += [("threads", f"{found['threads']['torch']} of {found['threads']['cores']} cores")]
    rows += [("GPUs", ", ".join(found["gpus"]) or "none that torch can use")]
    for device, backends in found["backends"].items():
        rows += [(f"{name} on {device}", reason or "usable") for name, reason in backends.items()]
    rows += [("kernel cache", f"{cache['folder']}: {cache['problem'] or 'writable'}")]
    console.print(table(("", ""), rows))
