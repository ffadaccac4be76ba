"""Weights that are stored in parts are read, verified, pruned and loaded as the plain ones that they stand for."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import State, write_folder, write_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import bisparse
from bisparse.checkpoint import CheckpointError, detect_patterns, load, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source


def bitmask(name: str, weight: Tensor, mask: Tensor, *, kind: str) -> State:
    """A weight as compressed-tensors stores it, by its documentation: bits of a row from the lowest on, kept values in order."""
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    integers = weight.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[weight.itemsize])
    values = integers[mask].view(weight.dtype)
    parts = {"shape": torch.tensor(weight.shape), "compressed": values, "bitmask": torch.from_numpy(bits)}
    if kind == "sparse-bitmask":
        parts["row_offsets"] = mask.sum(1).cumsum(0) - mask.sum(1)
    else:
        name = name.removesuffix(".weight")
        parts |= {"compressed": values.view(len(weight), -1), "shape": parts["shape"].view(-1, 1)}
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def sparse(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns)
    mask = bisparse.solve(weight.abs(), "2:4").mask
    return (weight * mask).to(dtype), mask


def read(path: Path) -> State:
    """Every tensor, whole, and the same in random pieces."""
    found = {}
    for name, stored in open_source(path).tensors.items():
        whole = stored.read()
        for _ in range(10):
            start, stop = sorted(random.choices(range(stored.size + 1), k=2))
            assert torch.equal(stored.read(start, stop).float(), whole[start:stop].float()), name
        assert b"".join(bytes(piece) for piece in stored.pieces()) == whole.view(torch.uint8).numpy().tobytes()
        found[name] = whole.view(stored.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
def test_bit_masks_are_read_as_plain_weights(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    state: State = {"norm.weight": torch.ones(4)}
    truth = {}
    for number, (rows, columns) in enumerate([(24, 40), (1, 8), (7, 20), (16, 4)]):
        truth[f"l.{number}.weight"], mask = sparse(rows, columns, dtype)
        state |= bitmask(f"l.{number}.weight", truth[f"l.{number}.weight"], mask, kind=kind)
    found = read(write_folder(tmp_path / "model", state))
    assert found.keys() == truth.keys() | {"norm.weight"}
    for name, weight in truth.items():
        assert found[name].dtype == dtype and torch.equal(found[name].float(), weight.float()), name


@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
def test_bit_masks_are_verified_and_pruned_in_bands(tmp_path: Path, kind: str, small_bands: object) -> None:
    small_bands()  # type: ignore[operator]
    weight, mask = sparse(96, 64)
    source = write_folder(tmp_path / "model", bitmask("up.weight", weight, mask, kind=kind))
    assert verify_checkpoint(source, "2:4") and not verify_checkpoint(source, "2:4-T")
    assert [str(one) for one in next(iter(detect_patterns(source))).notable] == ["2:4"]
    prune_checkpoint(source, tmp_path / "out", "2:4-T")
    best = bisparse.solve(weight.abs(), "2:4-T")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["up.weight"], weight * best.mask)


def test_the_parts_of_a_weight_may_be_in_several_shards(tmp_path: Path) -> None:
    weight, mask = sparse(16, 16)
    parts = bitmask("a.weight", weight, mask, kind="sparse-bitmask")
    states: list[State] = [{name: tensor} for name, tensor in parts.items()]
    source = write_shards(tmp_path / "model", [*states, {"b.weight": torch.randn(8, 8)}])
    assert torch.equal(read(source)["a.weight"], weight)
    prune_checkpoint(source, tmp_path / "out", "2:4")
    assert read(tmp_path / "out").keys() == {"a.weight", "b.weight"}
    assert verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a value too few", r"l has 127 values where its bit mask has 128 bits|has 127 values"),
        ("a bit too many", "values where its bit mask has"), ("another shape", r"has a bit mask of shape \(16, 2\)"),
        ("a shape of one", "has a shape of 1 entries"), ("huge", "has a bit mask of shape"),
        ("a shape of floats", "two integers are expected"), ("whole, too", "is stored both as a whole and in parts"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_errors(tmp_path: Path, how: str, message: str) -> None:
    weight, mask = sparse(16, 16)
    state = bitmask("l.weight", weight, mask, kind="sparse-bitmask")
    match how:
        case "a value too few":
            state["l.weight.compressed"] = state["l.weight.compressed"][1:].clone()
        case "a bit too many":
            state["l.weight.bitmask"][0, 0] = 255
        case "another shape":
            state["l.weight.shape"] = torch.tensor([16, 24])
        case "a shape of one":
            state["l.weight.shape"] = torch.tensor([16])
        case "huge":
            state["l.weight.shape"] = torch.tensor([1 << 40, 1 << 40])
        case "a shape of floats":
            state["l.weight.shape"] = torch.tensor([16.0, 16.0])
        case _:
            state["l.weight"] = weight
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(tmp_path / "w.safetensors", "2:4")


@pytest.mark.parametrize("saved_as", ["torch", "safetensors"])
def test_weights_with_the_masks_of_torch_prune(tmp_path: Path, saved_as: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Conv2d(8, 8, 3))
    truth = {}
    for index in (0, 2):
        layer = model[index]
        mask = bisparse.solve(layer.weight.detach().abs(), "2:4").mask
        torch_prune.custom_from_mask(layer, "weight", mask)
        truth[f"{index}.weight"] = layer.weight.detach()
    torch_prune.l1_unstructured(model[0], "bias", 3)
    path = tmp_path / "w"
    torch.save(model.state_dict(), path) if saved_as == "torch" else save_file(model.state_dict(), path)
    found = read(path)
    assert found.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(torch.equal(found[name], weight) for name, weight in truth.items())
    assert int((found["0.bias"] == 0).sum()) == 3
    assert verify_checkpoint(path, "2:4") and not verify_checkpoint(path, "1:4")
    with pytest.raises(CheckpointError, match=r"0\.weight_mask is not a mask"):
        torch.save(model.state_dict() | {"0.weight_mask": torch.full((16, 16), 0.5)}, path)
        verify_checkpoint(path, "2:4")
    torch.save(model.state_dict() | {"0.weight_mask": torch.ones(8, 16)}, path)
    with pytest.raises(
        CheckpointError, match=r"0\.weight_orig of shape \(16, 16\).*does not fit 0\.weight_mask of shape \(8, 16\)"
    ):
        verify_checkpoint(path, "2:4")


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T"])
def test_checkpoints_of_dynamic_training_are_read_verified_and_loaded(tmp_path: Path, pattern: str) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))

    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsity = bisparse.sparsify_(model, pattern, refresh=2, include=["0", "2"]).attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    x = torch.randn(4, 16)
    expected = model(x)  # what is next evaluated is what is in the file
    torch.save({"model": model.state_dict(), "sparsity": sparsity.state_dict(), "step": 5}, tmp_path / "last.pt")
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, tmp_path / "model.safetensors")
    for path in (tmp_path / "last.pt", tmp_path / "model.safetensors"):
        assert verify_checkpoint(path, pattern, include=["0", "2"])
        assert read(path).keys() == build().state_dict().keys()
        plain = build()
        load(plain, path)
        assert torch.equal(plain(x), expected)


def test_a_soft_threshold_cannot_be_read_without_its_pattern(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    bisparse.sparsify_(model, "2:4", method="s-ste", include="0")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"0\.parametrizations\.weight\.original .*soft threshold \(S-STE\).*finalize_"):
        verify_checkpoint(tmp_path / "w.pt", "2:4")


def test_parametrizations_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    torch.save(
        {f"a.{name}": one for name, one in layer.state_dict().items()} | {"b.weight": torch.randn(8, 8)}, tmp_path / "w.pt"
    )
    assert read(tmp_path / "w.pt").keys() == {f"a.{name}" for name in layer.state_dict()} | {"b.weight"}
