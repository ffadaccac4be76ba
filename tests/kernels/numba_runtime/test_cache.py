"""Compiled kernels on disk: whatever is wrong with the cache, the answer is right, and one warning says what it costs."""

from __future__ import annotations

import errno
import importlib.util
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import caching, config

from bisparse.kernels.numba_runtime import cache
from bisparse.kernels.numba_runtime.cache import cached_cfunc, cached_njit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(cache, "_warned", set())
    (tmp_path / "module.py").write_text("def plus(x):\n    return x + 40\n")
    return tmp_path


def run(folder: Path) -> tuple[bool, list[str]]:
    """Compile or load a function and check what it computes; whether it came from the cache, and the warnings."""
    spec = importlib.util.spec_from_file_location("module", folder / "module.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function = cached_njit()(module.plus)
        assert function(2) == 42
    return sum(function.stats.cache_hits.values()) > 0, [str(one.message) for one in caught]


def files(folder: Path) -> dict[str, Path]:
    return {path.suffix: path for path in (folder / "cache").rglob("*.nb?")}


def test_what_was_compiled_is_loaded(folder: Path) -> None:
    assert run(folder) == (False, [])
    assert run(folder) == (True, [])


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_is_compiled_again_and_replaced(folder: Path, kind: str, seed: int) -> None:
    run(folder)
    path, choose = files(folder)[kind], random.Random(seed)
    data = bytearray(path.read_bytes())
    if seed < 4:
        data = data[: [0, 10, 70, len(data) - 1][seed]]
    else:
        data[choose.randrange(cache.DIGEST, len(data))] ^= 1 << choose.randrange(8)
    path.write_bytes(data)
    hit, said = run(folder)
    assert not hit and len(said) == 1 and "is damaged" in said[0]
    assert run(folder) == (True, [])


def test_a_pickle_that_is_not_ours_is_not_read(folder: Path) -> None:
    run(folder)
    path = files(folder)[".nbi"]
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    run(folder)
    assert not Path("owned").exists()


def test_an_entry_of_other_arguments_is_not_used(folder: Path) -> None:
    """As two processes leave it that write at once: the index of one, the data of the other."""
    run(folder)
    first = files(folder)[".nbc"]
    whole = first.read_bytes()
    spec = importlib.util.spec_from_file_location("module", folder / "module.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert cached_njit()(module.plus)(np.float32(2)) == 42.0
    for path in (folder / "cache").rglob("*.nbc"):
        path.write_bytes(whole)
    again = cached_njit()(module.plus)
    assert again(np.float32(2.5)) == 42.5 and not again.stats.cache_hits
    assert again(2) == 42


def test_a_constant_that_changed_in_another_file_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    monkeypatch.setattr(cache, "_stamp_of_sources", lambda: b"another release")
    assert run(folder) == (False, [])
    assert run(folder) == (True, [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EDQUOT])
def test_a_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    @contextmanager
    def refuses(self: Any, path: str) -> Iterator[Any]:
        raise OSError(number, "no")
        yield

    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", refuses)
    hit, said = run(folder)
    assert not hit and len(said) == 1 and "cannot be written" in said[0] and "NUMBA_CACHE_DIR" in said[0]
    assert run(folder) == (False, []), "said once per process"


def test_no_folder_for_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", str(folder / "file" / "cache"))
    hit, said = run(folder)
    assert not hit and len(said) == 1 and "is not available" in said[0]


def test_a_cache_that_is_a_folder_where_a_file_should_be(folder: Path) -> None:
    run(folder)
    path = files(folder)[".nbi"]
    path.unlink()
    path.mkdir()
    hit, said = run(folder)
    assert not hit and len(said) == 1


def test_callbacks_are_cached_too(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("module", folder / "module.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert cached_cfunc("int64(int64)", module.plus).ctypes(2) == 42
    again = cached_cfunc("int64(int64)", module.plus)
    assert again.ctypes(2) == 42 and again.cache_hits == 1
