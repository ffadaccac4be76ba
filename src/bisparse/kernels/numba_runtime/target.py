"""The processor that numba compiles for, and the folder of its cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numba
from numba.core.registry import cpu_target

__all__ = ["cache_folder", "processor"]


@cache
def processor() -> tuple[str, frozenset[str]]:
    """The name of the processor and its features, as LLVM calls them, such as "avx512bf16"."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return name, frozenset(one[1:] for one in features.split(",") if one.startswith("+"))


def cache_folder() -> Path | None:
    """The folder that NUMBA_CACHE_DIR names; None where each kernel is cached next to its source file, or in the user's cache."""
    return Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else None
