"""Packed integers of compressed-tensors are verified by their zeros, and only where a stored zero is a zero weight."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import State, write_folder

import bisparse
from bisparse.checkpoint import detect_patterns, verify_checkpoint
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.reader import open_source


def packed(name: str, integers: torch.Tensor, bits: int) -> State:
    """By the format's description: plus 2^(bits - 1), 32 / bits to an int32, the first in the lowest bits."""
    rows, columns = integers.shape
    per_word = 32 // bits
    shifted = np.zeros((rows, -(-columns // per_word) * per_word), dtype=np.int64)
    shifted[:, :columns] = integers.numpy().astype(np.int64) + (1 << (bits - 1))
    words = (shifted.reshape(rows, -1, per_word) << (np.arange(per_word) * bits)).sum(-1).astype(np.uint32).view(np.int32)
    return {
        f"{name}.weight_packed": torch.from_numpy(words.copy()),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
        f"{name}.weight_scale": torch.ones(rows, 1),
    }


def integers(rows: int, columns: int, bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    values = torch.randint(1, half, (rows, columns)) * torch.where(torch.rand(rows, columns) < 0.5, 1, -1)
    return values * bisparse.solve(torch.rand(rows, columns), "2:4").mask


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_are_read_from_packed_integers(tmp_path: Path, bits: int) -> None:
    truth = {name: integers(*shape, bits) for name, shape in {"up": (40, 64), "down": (24, 100), "o": (8, 36)}.items()}
    state: State = {}
    for name, values in truth.items():
        state |= packed(f"model.layers.0.{name}_proj", values, bits)
    folder = write_folder(tmp_path / "model", state)
    tensors = unpacked(open_source(folder)).tensors
    for name, values in truth.items():
        whole = tensors[f"model.layers.0.{name}_proj.weight"]
        assert torch.equal(whole.read().view(whole.shape).long(), values)
        for start, stop in ((0, 1), (7, 150), (whole.size - 3, whole.size)):
            assert torch.equal(whole.read(start, stop).long(), values.flatten()[start:stop])
    assert verify_checkpoint(folder, "2:4") and not verify_checkpoint(folder, "1:4")
    assert {str(pattern) for one in detect_patterns(folder) for pattern in one.patterns} >= {"2:4"}


@pytest.mark.parametrize("beside", ["weight_zero_point", "weight_g_idx"])
def test_with_zero_points_or_an_order_they_stay_unchecked(tmp_path: Path, beside: str) -> None:
    state = packed("model.layers.0.up_proj", integers(16, 64, 4), 4)
    state |= {f"model.layers.0.up_proj.{beside}": torch.zeros(16, 2, dtype=torch.int32)}
    found = verify_checkpoint(write_folder(tmp_path / "model", state), "2:4")
    assert not found and [one.name for one in found.unchecked] == ["model.layers.0.up_proj"]


def test_a_shape_that_does_not_fit_stays_unchecked(tmp_path: Path) -> None:
    state = packed("model.layers.0.up_proj", integers(16, 64, 4), 4)
    state["model.layers.0.up_proj.weight_shape"] = torch.tensor([16, 999])
    found = verify_checkpoint(write_folder(tmp_path / "model", state), "2:4")
    assert not found and len(found.unchecked) == 1
