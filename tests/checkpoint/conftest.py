"""A small checkpoint, and bands small enough for it to have many."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import State, write_folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forcing files to disk protects from power failure, which no test can cause, and takes seconds on a busy machine."""
    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)


@pytest.fixture
def state() -> State:
    """A bit of everything: two layers to prune, and what stays dense."""
    return {
        "embed_tokens.weight": torch.randn(50, 16),
        "layers.0.up.weight": torch.randn(40, 16),
        "layers.0.up.bias": torch.randn(40),
        "layers.0.down.weight": torch.randn(16, 40).bfloat16(),
        "norm.weight": torch.randn(16),
        "lm_head.weight": torch.randn(50, 16),
        "position_ids": torch.arange(9).view(1, 9),
    }


@pytest.fixture
def folder(tmp_path: Path, state: State) -> Path:
    """That state as a folder with one safetensors file, a config and a tokenizer."""
    return write_folder(tmp_path / "model", state)


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Bands of a few rows, so that small weights have many."""

    def shrink() -> None:
        monkeypatch.setattr("bisparse.checkpoint.bands.BAND_WEIGHTS", 100)

    return shrink
