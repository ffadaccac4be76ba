"""Compiled kernels on disk, in numba's cache folder: a cache that is missing, full, stale or damaged costs time and nothing else.

numba's own cache raises where its folder cannot be written or a file in it is damaged, and does not notice that a constant
imported from another file has changed. Here each file carries a stamp of numba's version and of all kernel sources, and a
checksum: what does not match is compiled again. The files are pickles, so the folder must be writable by its user alone.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

from bisparse.kernels.numba_runtime.linked import LinkedCompiler

__all__ = ["cached_cfunc", "cached_njit"]

DIGEST = hashlib.sha256().digest_size
_warned: set[str] = set()


def cached_njit(*, from_python: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Equivalent to ``numba.njit(nogil=True, cache=True, **options)`` with this module's cache.

    Args:
        from_python: False for a function that only kernels call: it is compiled into them and nowhere else, without the wrappers
            that Python and C would call it through. A call from Python would crash.
    """

    def compile_lazily(function: Callable[..., Any]) -> Any:
        if not from_python:
            inner = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": LinkedCompiler}
            return njit(nogil=True, **inner, **options)(function)
        dispatcher = njit(nogil=True, **options)(function)
        if (found := _cache_of(function)) is not None:
            dispatcher._cache = found
        return dispatcher

    return compile_lazily


def cached_cfunc(signature: str, function: Callable[..., Any]) -> Any:
    """Equivalent to ``numba.cfunc(signature, cache=True)(function)`` with this module's cache."""
    callback: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options={})
    if (found := _cache_of(function)) is not None:
        callback._cache = found
    callback.compile()
    return callback


def _cache_of(function: Callable[..., Any]) -> _Cache | None:
    try:
        return _Cache(function)
    except (OSError, RuntimeError) as error:  # RuntimeError: numba found no folder that can be written
        _warn(f"is not available ({error})")
        return None


def _warn(problem: str) -> None:
    """Say once per process that kernels are compiled although there is, or could be, a cache."""
    if not _warned:
        _warned.add(problem)
        warnings.warn(
            f"numba's cache {problem}: kernels are compiled again, which takes seconds and changes no result; "
            "NUMBA_CACHE_DIR names another folder for it",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def _stamp_of_sources() -> bytes:
    """A digest of every source file of the package's kernels: constants of one are compiled into others."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*(package / "kernels").rglob("*.py"), *(package / "pruning" / "channels").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.digest()


class _Cache(FunctionCache):  # type: ignore[misc]
    """The cached overloads of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _CheckedFile(
            locator.get_cache_path(), f"{self._impl.filename_base}.checked", locator.get_source_stamp()
        )

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"cannot be written ({self._cache_path}: {error.strerror or error})")


class _CheckedFile(IndexDataCacheFile):  # type: ignore[misc]
    """An index and its data files, each as stamp, checksum, pickle. What cannot be read is as good as absent."""

    def save(self, key: Any, data: Any) -> None:
        overloads = self._load_index()
        taken = set(overloads.values())
        name = overloads.get(key) or next(one for number in itertools.count(1) if (one := self._data_name(number)) not in taken)
        # The data first, with their key: whenever a process is killed, and whoever else writes, no entry has another's code.
        self._write(self._data_path(name), (key, data))
        self._write(self._index_path, {**overloads, key: name})

    def flush(self) -> None:
        self._write(self._index_path, {})

    def load(self, key: Any) -> Any:
        name = self._load_index().get(key)
        found = None if name is None else self._read(self._data_path(name))
        return found[1] if found is not None and found[0] == key else None

    def _load_index(self) -> dict[Any, str]:
        return self._read(self._index_path) or {}

    def _stamp(self) -> bytes:
        return hashlib.sha256(repr((self._version, self._source_stamp, _stamp_of_sources())).encode()).digest()

    def _write(self, path: str, content: Any) -> None:
        pickled = self._dump(content)
        with self._open_for_write(path) as file:
            file.write(self._stamp() + hashlib.sha256(pickled).digest() + pickled)

    def _read(self, path: str) -> Any:
        """The content of a file; None if it is absent, of other sources or damaged. Nothing damaged is unpickled."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(f"cannot be read ({path}: {error.strerror or error})")
            return None
        stamp, checksum, pickled = data[:DIGEST], data[DIGEST : 2 * DIGEST], data[2 * DIGEST :]
        if len(data) >= DIGEST and stamp != self._stamp():
            return None
        if checksum != hashlib.sha256(pickled).digest():
            _warn(f"is damaged ({path})")
            return None
        try:
            return pickle.loads(pickled)
        except (ImportError, AttributeError):  # of a module that is not there, as one that was loaded by its path
            return None
