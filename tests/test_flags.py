"""Settings that are True or False take nothing else: "no" would count as true, and replace a folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bisparse
from bisparse import pruning, solvers, training
from bisparse.accelerate import accelerate_, advise
from bisparse.checkpoint import prune_checkpoint, to_dense
from bisparse.export import export_onnx, save_quantized
from bisparse.quantization import quantize_
from bisparse.report import plot_diversity

BATCHES = [torch.randn(8, 16) for _ in range(3)]
Call = Callable[[nn.Module, Path, object], object]


def _quantised(model: nn.Module, place: Path, value: object) -> None:
    own = nn.Sequential(nn.Linear(16, 16))
    save_quantized(own, place / "theirs", quantize_(own, "int8"), overwrite=value)


CALLS: dict[str, Call] = {
    "transposable": lambda model, place, value: bisparse.Pattern(2, 4, value),  # type: ignore[arg-type]
    "mvue": lambda model, place, value: bisparse.sparsify_(model, "2:4-T", mvue=value),
    "check_gradients": lambda model, place, value: bisparse.sparsify_(model, "2:4-T", check_gradients=value),
    "new_mask": lambda model, place, value: training.merge_lora_(model, "2:4-T", new_mask=value),
    "rslora": lambda model, place, value: training.add_masked_lora_(model, "2:4-T", rslora=value),
    "dora": lambda model, place, value: training.add_masked_lora_(model, "2:4-T", dora=value),
    "keep_journal": lambda model, place, value: bisparse.prune_(
        model, "1:4", "adaprune", BATCHES, resume=place / "journal", keep_journal=value
    ),
    "progress": lambda model, place, value: bisparse.prune_(model, "1:4", progress=value),
    "regrow": lambda model, place, value: bisparse.convert_(model, "1:4", regrow=value),
    "search": lambda model, place, value: accelerate_(model, "reference", search=value),
    "training": lambda model, place, value: advise(model, 4, training=value, device="cpu", backend="cpu"),
    "overwrite of save": lambda model, place, value: bisparse.save(model, place / "theirs", "2:4-T", overwrite=value),
    "overwrite of prune": lambda model, place, value: prune_checkpoint(place / "in", place / "theirs", "2:4", overwrite=value),
    "overwrite of to_dense": lambda model, place, value: to_dense(place / "in", place / "theirs", overwrite=value),
    "overwrite of quantised": _quantised,
    "overwrite of onnx": lambda model, place, value: export_onnx(model, place / "theirs", BATCHES[0], overwrite=value),
    "dark": lambda model, place, value: plot_diversity(place / "theirs.svg", ["2:4"], dark=value),
    "exactly": lambda model, place, value: solvers.Exact(exactly=value),
    "strict": lambda model, place, value: solvers.Exact(strict=value),
    "fill": lambda model, place, value: solvers.Greedy(fill=value),
    "refit": lambda model, place, value: pruning.SparseGPT(refit=value),
}


@pytest.mark.parametrize("value", ["no", 1, 0, []], ids=repr)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_neither_true_nor_false_is_refused_and_nothing_changes(name: str, value: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    bisparse.prune_(model, "2:4-T", include="*")
    before = {key: one.clone() for key, one in model.state_dict().items()}
    (tmp_path / "in").mkdir()
    save_file({"a.up.weight": torch.randn(8, 8)}, tmp_path / "in" / "model.safetensors")
    files = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{name.split()[0]}="):
        CALLS[name](model, tmp_path, value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == files
    assert list(model.state_dict()) == list(before) and all(
        torch.equal(before[key], one) for key, one in model.state_dict().items()
    )
