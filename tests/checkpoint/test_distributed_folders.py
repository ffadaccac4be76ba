"""Checkpoints of torch.distributed.checkpoint are read as torch reads them, and nothing in them is executed."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import bisparse
from bisparse import CheckpointError, load, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source
from rank_processes import results_of_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

STATE = {
    "up.weight": torch.randn(16, 32),
    "up.bias": torch.randn(16),
    "down.weight": torch.randn(32, 16).bfloat16(),
    "count": torch.tensor(3),
    "empty": torch.empty(0, 4),
}


def written(folder: Path, state: Any) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def equal(found: dict[str, Any], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].torch_dtype == one.dtype and torch.equal(found[name].read().view(found[name].shape), one)
        for name, one in expected.items()
    )


@pytest.mark.parametrize("nested", [False, True])
def test_what_one_process_saved_is_read(tmp_path: Path, nested: bool) -> None:
    state = (
        {"model": dict(STATE), "optimizer": {"state": {"up.weight": torch.ones(16, 32)}}, "step": 5} if nested else dict(STATE)
    )
    folder = written(tmp_path / "dcp", state)
    assert equal(open_source(folder).tensors, STATE)
    if nested:
        assert equal(open_source(folder, "optimizer.state").tensors, {"up.weight": torch.ones(16, 32)})
    prune_checkpoint(folder, tmp_path / "out", "2:4-T")
    assert verify_checkpoint(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.distcp")) and (tmp_path / "out" / "model.safetensors").exists()


def test_shards_of_ranks_are_put_together(tmp_path: Path) -> None:
    expected = results_of_ranks(Path(__file__).with_name("dcp_ranks.py"), 2, tmp_path)[0]
    folder = tmp_path / "dcp"
    tensors = open_source(folder).tensors
    assert equal(tensors, expected)
    for name, one in expected.items():  # any piece, as bands are read
        flat = one.flatten()
        for start, stop in ((0, 1), (3, 5), (5, len(flat)), (len(flat) // 2, len(flat) // 2 + 1)):
            assert torch.equal(tensors[name].read(start, stop), flat[start:stop]), (name, start, stop)
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    assert {one.layer for one in verify_checkpoint(tmp_path / "out").layers} >= {"rows", "columns", "whole"}
    model = nn.ModuleDict({"rows": nn.Linear(32, 16, bias=False)})
    load(model, folder, strict=False)
    assert torch.equal(model["rows"].weight, expected["rows.weight"])


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("harm",)


def test_nothing_in_the_metadata_is_executed(tmp_path: Path) -> None:
    folder = written(tmp_path / "dcp", dict(STATE))
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match="metadata"):
        open_source(folder)
    assert not Path("harm").exists()


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def of(metadata: Any, name: str) -> Any:
    return next(one for index, one in metadata.storage_data.items() if index.fqn == name)


def chunk_of(metadata: Any, name: str) -> Any:
    return metadata.state_dict_metadata[name].chunks[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: setattr(of(metadata, "up.weight"), "relative_path", "../../secret"),
        lambda metadata: setattr(of(metadata, "up.weight"), "relative_path", "x" * 5000),
        lambda metadata: setattr(of(metadata, "up.weight"), "relative_path", "a\0b"),
        lambda metadata: setattr(of(metadata, "up.weight"), "offset", 10**12),
        lambda metadata: setattr(of(metadata, "up.weight"), "length", -1),
        lambda metadata: setattr(of(metadata, "up.weight"), "offset", of(metadata, "up.bias").offset),
        lambda metadata: setattr(of(metadata, "up.weight"), "transform_descriptors", ["zstd"]),
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: setattr(metadata.state_dict_metadata["up.weight"], "size", torch.Size([32, 32])),
        lambda metadata: metadata.state_dict_metadata["up.weight"].chunks.append(chunk_of(metadata, "up.weight")),
        lambda metadata: metadata.state_dict_metadata["up.weight"].chunks.clear(),
        lambda metadata: setattr(metadata.state_dict_metadata["up.weight"], "size", ("a", None)),
        lambda metadata: setattr(metadata, "storage_data", None),
        lambda metadata: setattr(metadata, "planner_data", {"up.weight": ()}),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_their_files_are_an_error(tmp_path: Path, change: Callable[[Any], None]) -> None:
    folder = written(tmp_path / "dcp", dict(STATE))
    changed(folder, change)
    with pytest.raises(CheckpointError):
        prune_checkpoint(folder, tmp_path / "out", "2:4")
    assert not (tmp_path / "out").exists()


def test_every_damaged_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    folder = written(tmp_path / "dcp", dict(STATE))
    file = next(folder.glob("*.distcp"))
    good, generator = file.read_bytes(), torch.Generator().manual_seed(0)
    for at in torch.randint(len(good), (150,), generator=generator).tolist():
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            tensors = open_source(folder).tensors
            assert equal(tensors, STATE)
        except CheckpointError:
            pass
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError):
        verify_checkpoint(folder, "2:4")


def test_a_model_in_sparse_training_is_read_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    bisparse.sparsify_(model, "2:4-T")
    folder = written(tmp_path / "dcp", {"model": model.state_dict()})
    assert verify_checkpoint(folder, "2:4-T", include=["0", "2"])
