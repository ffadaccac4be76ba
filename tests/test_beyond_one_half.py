"""6:8, 4:6 and their transposable forms in every place that takes a pattern."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bisparse
from bisparse.checkpoint import detect_patterns, verify_checkpoint
from bisparse.diversity import mask_diversity
from bisparse.pruning import METHODS, parse_method

PATTERNS = ("6:8", "6:8-T", "4:6", "4:6-T")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(48, 72), (20, 26)])
def test_masks_are_optimal_with_proof_and_fill_plain_groups(pattern: str, shape: tuple[int, int]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    solution = bisparse.solve(scores, pattern)
    bisparse.verify(solution.mask, pattern).check()
    assert solution.relative_gap == pytest.approx(0, abs=1e-9)
    if shape == (48, 72) and not pattern.endswith("-T"):  # a transposable optimum may leave a place free
        n, m = map(int, pattern.split(":"))
        assert (solution.mask.unflatten(1, (-1, m)).sum(-1) == n).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "adaprune", "alps"])
def test_methods_prune_to_them(pattern: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)).eval()
    batches = [torch.randn(64, 24) for _ in range(5)]
    report = bisparse.prune_(model, pattern, method, batches if parse_method(method).needs else None, include=["*"])
    for layer in report:
        bisparse.verify(model.get_parameter(layer.parameter), pattern, name=layer.name).check()
        assert 0.6 < layer.density <= int(pattern[0]) / int(pattern[2])
    assert method in METHODS


@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpoints_are_pruned_verified_and_recognised(pattern: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({"a.weight": torch.randn(48, 72), "b.weight": torch.randn(24, 48)}, tmp_path / "model.safetensors")
    bisparse.prune_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", pattern)
    assert verify_checkpoint(tmp_path / "out") and verify_checkpoint(tmp_path / "out", pattern)
    assert not verify_checkpoint(tmp_path / "model.safetensors", pattern)
    assert all([str(found) for found in one.notable] == [pattern] for one in detect_patterns(tmp_path / "out"))


def test_counts_are_those_of_their_complements() -> None:
    assert mask_diversity("6:8", 8).count == 28 and mask_diversity("4:6", 6).count == 15
    assert mask_diversity("4:6-T", (6, 6)).count == mask_diversity("2:6-T", (6, 6)).count
