"""Block reconstruction: masks stay, held-out errors fall or nothing changes, and an interrupted job ends the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from failing import Failing
from torch import Tensor, nn

from bisparse import verify
from bisparse.pruning import AdaPrune, BlockReconstruction, Magnitude, Method, Wanda, convert_, prune_
from bisparse.pruning.calibration.finished_block import FinishedBlock


class Gated(nn.Module):
    """A block that no layer-by-layer fit sees through: a gate, a product, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Gated() for _ in range(3))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def case(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Network().to(dtype), [torch.randn(64, 8, dtype=dtype) for _ in range(10)]


def output_error(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).float().square().sum()) for x in data)


HOW = BlockReconstruction(epochs=5)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), AdaPrune(), AdaPrune(correct_upstream=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_stay_and_the_network_is_closer_to_the_dense_one_on_other_data(method: Method, dtype: torch.dtype) -> None:
    dense, batches = case(dtype)
    plain, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    # The layer before the chain is left dense: then the first block sees the same in both runs, and masks can be compared.
    prune_(plain, "4:8-T", method, batches, include="blocks.*")
    report = prune_(fitted, "4:8-T", method, batches, include="blocks.*", reconstruction=HOW)
    other = [torch.randn(64, 8, dtype=dtype) for _ in range(4)]
    assert output_error(fitted, dense, other) < 0.95 * output_error(plain, dense, other)
    for layer in report:
        assert verify(fitted.get_parameter(layer.parameter), "4:8-T")
    for name in ("gate", "up"):
        masks = [getattr(model.blocks[0], name).weight != 0 for model in (plain, fitted)]
        assert torch.equal(*masks)
    assert "reconstructed 3 of 3 blocks" in report.notes[-1]
    assert "fell from" in report["blocks.0.gate"].note
    assert all(parameter.grad is None and parameter.requires_grad for parameter in fitted.parameters())


def test_what_is_not_pruned_is_not_fitted() -> None:
    dense, batches = case()
    model = copy.deepcopy(dense)
    prune_(model, "2:4", AdaPrune(), batches, include="blocks.*.gate", reconstruction=HOW)
    for name, before in dense.state_dict().items():
        assert torch.equal(before, model.state_dict()[name]) == ("gate" not in name), name


def test_it_is_deterministic() -> None:
    one, batches = case()
    other = copy.deepcopy(one)
    for model in (one, other):
        prune_(model, "2:4-T", AdaPrune(), batches, reconstruction=HOW)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_epochs_go_on_while_they_are_worthwhile_and_the_best_is_kept() -> None:
    dense, batches = case()
    errors = []
    for how in (BlockReconstruction(epochs=1), BlockReconstruction(epochs=6), BlockReconstruction(epochs=6, worthwhile=1.0)):
        model = copy.deepcopy(dense)
        prune_(model, "2:4", Wanda(), batches, include="blocks.0.*", reconstruction=how)
        errors.append(output_error(model.blocks[0], dense.blocks[0], [dense.first(x) for x in batches]))
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] < errors[2] <= errors[0], "one more pass with a quarter of the step, and no further"


def test_after_a_step_that_is_too_large_a_quarter_of_it_is_tried_from_the_best_weights() -> None:
    dense, batches = case()
    errors = []
    for how in (None, BlockReconstruction(epochs=1, learning_rate=0.2), BlockReconstruction(epochs=2, learning_rate=0.2)):
        model = copy.deepcopy(dense)
        prune_(model, "6:8", Wanda(), batches, include="blocks.0.*", reconstruction=how)
        errors.append(output_error(model.blocks[0], dense.blocks[0], [dense.first(x) for x in batches]))
    assert errors[1] == errors[0], "the first step is too large for this test to mean something"
    assert errors[2] < 0.6 * errors[0]


def test_steps_that_lead_nowhere_are_taken_back() -> None:
    model, batches = case()
    plain = copy.deepcopy(model)
    prune_(plain, "2:4", AdaPrune(), batches)
    report = prune_(model, "2:4", AdaPrune(), batches, reconstruction=BlockReconstruction(learning_rate=1e4))
    assert "reconstructed 0 of 3 blocks" in report.notes[-1]
    assert "did not lower" in report["blocks.1.up"].note
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_the_target_is_what_the_dense_network_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, batches = case()
    model = copy.deepcopy(dense)
    states: list[Tensor] = []
    x = dense.first(batches[3])
    for block in dense.blocks:
        x = block(x)
        states.append(x.detach())
    seen: list[FinishedBlock] = []
    original = BlockReconstruction.fit_

    def spying(self: BlockReconstruction, block: FinishedBlock):
        number = len(seen)
        seen.append(block)
        torch.testing.assert_close(block.target(3), states[number])
        before = model.first(batches[3])
        for own in model.blocks[: number + 1]:
            before = own(before)
        torch.testing.assert_close(block.output(3), before)
        assert set(block.judge) == {4, 9} and not set(block.judge) & set(block.fit)
        return original(self, block)

    monkeypatch.setattr(BlockReconstruction, "fit_", spying)
    prune_(model, "2:4", Wanda(), batches, reconstruction=HOW)
    assert [block.name for block in seen] == ["blocks.0", "blocks.1", "blocks.2"]


def test_hidden_positions_do_not_count() -> None:
    torch.manual_seed(0)
    model = Network()
    twin = copy.deepcopy(model)
    mask = torch.ones(4, 6)
    mask[:, 4:] = 0
    batches = [{"x": torch.randn(4, 6, 8), "attention_mask": mask} for _ in range(6)]
    others = [{**batch, "x": torch.where(mask[..., None].bool(), batch["x"], torch.randn(4, 6, 8))} for batch in batches]
    for network, data in ((model, batches), (twin, others)):
        prune_(network, "2:4", AdaPrune(), data, reconstruction=BlockReconstruction(epochs=1))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_interrupted_job_changes_nothing_and_ends_the_same_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, batches = case()
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    expected = prune_(whole, "4:8-T", AdaPrune(), batches, reconstruction=HOW)
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "4:8-T", Failing(6, KeyboardInterrupt), batches, reconstruction=HOW, resume=tmp_path / "journal")
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    fitted = []
    original = BlockReconstruction.fit_
    monkeypatch.setattr(BlockReconstruction, "fit_", lambda self, block: (fitted.append(block.name), original(self, block))[1])
    report = prune_(model, "4:8-T", AdaPrune(), batches, reconstruction=HOW, resume=tmp_path / "journal")
    assert fitted == ["blocks.1", "blocks.2"]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert report.notes[-1] == expected.notes[-1]


def test_a_conversion_keeps_what_was_pruned() -> None:
    model, batches = case()
    prune_(model, "4:8")
    before = {name: weight == 0 for name, weight in model.state_dict().items() if weight.ndim == 2}
    convert_(model, "2:4", batches=batches, reconstruction=HOW)
    assert all(bool((model.state_dict()[name] == 0)[zeros].all()) for name, zeros in before.items())


def test_layers_in_no_chain_are_pruned_and_a_note_says_that_there_was_no_block() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    report = prune_(model, "2:4", AdaPrune(), [torch.randn(32, 16) for _ in range(5)], reconstruction=HOW)
    assert "no block" in report.notes[-1] and len(report) == 1


def test_wrong_arguments() -> None:
    model, batches = case()
    with pytest.raises(ValueError, match="sequential"):
        prune_(model, "2:4", AdaPrune(), batches, order="parallel", reconstruction=HOW)
    with pytest.raises(ValueError, match="batches"):
        prune_(model, "2:4", Magnitude(), reconstruction=HOW)
    with pytest.raises(ValueError, match="epochs"):
        BlockReconstruction(epochs=0)
    with pytest.raises(ValueError, match="learning_rate"):
        BlockReconstruction(learning_rate=float("nan"))
