"""Network reconstruction: masks stay, held-out divergence falls or nothing changes, and an interrupted job ends the same."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bisparse import verify
from bisparse.pruning import AdaPrune, BlockReconstruction, Magnitude, NetworkReconstruction, Wanda, convert_, prune_
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.pruning.journal import JournalError

TOKENS = 50


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(torch.relu(self.up(self.norm(x)))))


class Language(nn.Module):
    """Returns an object with logits, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(16, TOKENS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(hidden=x, logits=self.lm_head(x))


def case(dtype: torch.dtype = torch.float32, batches: int = 15) -> tuple[Language, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = Language().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that there is something to tell from the logits
    return model, [{"input_ids": torch.randint(TOKENS, (8, 12))} for _ in range(batches)]


def divergence(model: nn.Module, dense: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """KL of the probabilities in nats per position, an independent computation in float64."""
    total = 0.0
    positions = 0
    with torch.no_grad():
        for batch in data:
            own, given = (net.eval()(**batch).logits.double().log_softmax(-1) for net in (model, dense))
            each = (given.exp() * (given - own)).sum(-1)
            keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            total, positions = total + float(each[keep].sum()), positions + int(keep.sum())
    return total / positions


HOW = NetworkReconstruction(epochs=4, learning_rate=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [None, BlockReconstruction(epochs=2)])
def test_masks_stay_and_the_probabilities_are_closer_to_dense_on_other_data(
    dtype: torch.dtype, blocks: BlockReconstruction | None
) -> None:
    dense, batches = case(dtype)
    plain, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(plain, "4:8-T", AdaPrune(), batches, reconstruction=blocks)
    report = prune_(fitted, "4:8-T", AdaPrune(), batches, reconstruction=NetworkReconstruction(epochs=4, blocks=blocks))
    other = [{"input_ids": torch.randint(TOKENS, (8, 12))} for _ in range(6)]
    assert divergence(fitted, dense, other) < 0.9 * divergence(plain, dense, other)
    for layer in report:
        assert verify(fitted.get_parameter(layer.parameter), "4:8-T")
        before, after = (model.get_parameter(layer.parameter) != 0 for model in (plain, fitted))
        assert not bool((after & ~before).any())
    for name in ("embed.weight", "lm_head.weight", "blocks.1.norm.weight"):
        assert torch.equal(fitted.get_parameter(name), dense.get_parameter(name))
    assert "fitted the whole network" in report.notes[-1]
    assert any("reconstructed" in note for note in report.notes) == (blocks is not None)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in fitted.parameters())


def test_the_note_has_the_divergence_on_the_held_out_batches() -> None:
    dense, batches = case()
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[:, 9:] = 0
    batches = [{**batch, "attention_mask": mask} for batch in batches]
    plain, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(plain, "2:4-T", Wanda(), batches)
    note = prune_(fitted, "2:4-T", Wanda(), batches, reconstruction=HOW).notes[-1]
    held_out = batches[4::5]
    expected = [divergence(model, dense, held_out) for model in (plain, fitted)]
    assert expected[1] < expected[0]
    ending = f"on 12 batches: nats per position on 3 held-out batches {expected[0]:.4g} before, {expected[1]:.4g} after"
    assert note.endswith(ending)


def test_without_a_terminal_progress_names_each_part_of_the_fit(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = case()
    prune_(model, "2:4", Wanda(), batches, reconstruction=NetworkReconstruction(epochs=1), progress=True)
    said = [line.split("  ", 1)[1].split() for line in capsys.readouterr().err.splitlines()]
    parts = [" ".join(words) for words in said if words[-1] == "done"]
    judged = "100 % judging the whole network done"
    assert parts == ["100 % calibrating done", judged, "100 % fitting the whole network done", judged]


def test_more_data_than_the_layers_have_brings_the_network_closer() -> None:
    dense, batches = case()
    own = [{"input_ids": torch.randint(TOKENS, (8, 12))} for _ in range(170)]
    other = [{"input_ids": torch.randint(TOKENS, (8, 12))} for _ in range(6)]
    few, more = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(few, "4:8-T", Wanda(), batches, reconstruction=NetworkReconstruction(epochs=1))
    how = NetworkReconstruction(epochs=1, batches=(batch for batch in own))
    note = prune_(more, "4:8-T", Wanda(), batches, reconstruction=how).notes[-1]
    assert divergence(more, dense, other) < 0.9 * divergence(few, dense, other)
    held_out = own[5::6]  # every fifth would be more than 32
    assert note.endswith(f"{divergence(more, dense, held_out):.4g} after")
    with pytest.raises(ValueError, match="at least one"):
        NetworkReconstruction(batches=[])
    for wrong in (3, "text", {"input_ids": own[0]}, torch.tensor(3.0)):
        with pytest.raises(ValueError, match="batches="):
            NetworkReconstruction(batches=wrong)  # type: ignore[arg-type]


def test_a_fit_without_positions_is_refused() -> None:
    model, batches = case()
    before = copy.deepcopy(model.state_dict())
    empty = [{**batch, "attention_mask": torch.zeros(8, 12, dtype=torch.long)} for batch in batches]
    with pytest.raises(CalibrationError, match="no position of the held-out batches counts"):
        prune_(model, "2:4", Wanda(), batches, reconstruction=NetworkReconstruction(batches=empty))
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_a_model_without_logits_is_fitted_to_its_output() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    batches = [torch.randn(64, 16) for _ in range(15)]
    plain, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(plain, "2:4", AdaPrune(), batches, include="*")
    report = prune_(fitted, "2:4", AdaPrune(), batches, include="*", reconstruction=HOW)
    x = torch.randn(512, 16)
    with torch.no_grad():
        errors = [float((model(x) - dense(x)).square().sum()) for model in (plain, fitted)]
    assert errors[1] < 0.95 * errors[0]
    assert "relative error" in report.notes[-1]


def test_it_is_deterministic_in_training_mode_too() -> None:
    one, batches = case()
    other = copy.deepcopy(one).train()
    for model, seed in ((one.eval(), 1), (other, 2)):
        torch.manual_seed(seed)
        prune_(model, "2:4-T", Magnitude(), batches, reconstruction=HOW)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert other.training and other.blocks[0].dropout.training and not one.training


def test_steps_that_lead_nowhere_are_taken_back() -> None:
    model, batches = case()
    plain = copy.deepcopy(model)
    prune_(plain, "2:4", AdaPrune(), batches)
    report = prune_(model, "2:4", AdaPrune(), batches, reconstruction=NetworkReconstruction(learning_rate=1e4))
    assert "nothing was changed" in report.notes[-1]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("when", ["during the fit", "after it"])
def test_an_interrupted_job_changes_nothing_and_ends_the_same_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    dense, batches = case()
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    how = NetworkReconstruction(epochs=2, blocks=BlockReconstruction(epochs=1))
    expected = prune_(whole, "4:8-T", AdaPrune(), batches, reconstruction=how)

    class Stopping(Language):
        calls = 0

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            Stopping.calls += torch.is_grad_enabled()
            if Stopping.calls == 5:
                raise KeyboardInterrupt
            return super().forward(input_ids, attention_mask)

    with monkeypatch.context() as patched:
        if when == "during the fit":
            model.__class__ = Stopping
        else:

            def stop(_: object) -> None:
                raise KeyboardInterrupt

            patched.setattr("bisparse.pruning.job.Job.commit", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_(model, "4:8-T", AdaPrune(), batches, reconstruction=how, resume=tmp_path / "journal")
    model.__class__ = Language
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    report = prune_(model, "4:8-T", AdaPrune(), batches, reconstruction=how, resume=tmp_path / "journal")
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert report.notes[-1] == expected.notes[-1]
    assert not (tmp_path / "journal").exists()


def test_a_journal_belongs_to_the_data_of_the_layers_and_of_the_network_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = case()

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("bisparse.pruning.job.Job.commit", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_(model, "2:4", Wanda(), batches, reconstruction=NetworkReconstruction(epochs=1), resume=tmp_path / "journal")
    split = NetworkReconstruction(epochs=1, batches=batches[10:])
    with pytest.raises(JournalError, match="network data"):
        prune_(model, "2:4", Wanda(), batches[:10], reconstruction=split, resume=tmp_path / "journal")


def test_an_hour_of_short_epochs_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only epochs that are longer than the time between two copies."""
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr("bisparse.pruning.kept_fit.time.monotonic", lambda: next(clock))
    stored = []
    monkeypatch.setattr("bisparse.pruning.journal.JournaledFit.store", lambda _, tensors, numbers: stored.append(numbers))
    model, batches = case()
    how = NetworkReconstruction(epochs=10, worthwhile=0.0)
    prune_(model, "2:4", Wanda(), batches, reconstruction=how, resume=tmp_path / "journal")
    assert len({numbers["epoch"] for numbers in stored}) >= 3  # 120 steps of 20 s are four times ten minutes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_fit_that_is_interrupted_continues_from_its_last_copy_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Stopped in the second of three epochs, it ends bit for bit as without the stop, and repeats no step."""
    monkeypatch.setattr("bisparse.pruning.kept_fit.STORE_EVERY", 0.0)
    dense, batches = case(dtype)
    how = NetworkReconstruction(epochs=3, worthwhile=1e-9)
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    expected = prune_(whole, "2:4", Wanda(), batches, reconstruction=how)

    class Stopping(Language):
        calls, last = 0, 20

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            Stopping.calls += torch.is_grad_enabled()
            if Stopping.calls == self.last:
                raise KeyboardInterrupt
            return super().forward(input_ids, attention_mask)

    model.__class__ = Stopping
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Wanda(), batches, reconstruction=how, resume=tmp_path / "journal")
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    Stopping.last, Stopping.calls = 1000, 0
    report = prune_(model, "2:4", Wanda(), batches, reconstruction=how, resume=tmp_path / "journal")
    assert Stopping.calls == 3 * 12 - 19  # 12 of 15 batches are fitted to
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert report.notes[-1] == expected.notes[-1] and not (tmp_path / "journal").exists()


def test_layers_that_a_batch_does_not_reach_are_fitted_by_the_others() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) if float(x[0, 0]) > 0 else self.two(x)

    torch.manual_seed(0)
    model = Routed()
    batches = [torch.randn(32, 16).index_fill_(1, torch.tensor([0]), sign) for sign in (1.0, -1.0) * 6]
    report = prune_(model, "2:4", Magnitude(), batches, include="*", reconstruction=HOW)
    assert len(report) == 2 and verify(model, "2:4", include="*")


def test_a_conversion_keeps_what_was_pruned() -> None:
    model, batches = case()
    prune_(model, "4:8")
    before = {name: weight == 0 for name, weight in model.state_dict().items() if "up.weight" in name or "down.weight" in name}
    convert_(model, "2:4", batches=batches, reconstruction=HOW)
    assert all(bool((model.state_dict()[name] == 0)[zeros].all()) for name, zeros in before.items())


def test_wrong_arguments_change_nothing() -> None:
    model, batches = case()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="sequential"):
        prune_(model, "2:4", AdaPrune(), batches, order="parallel", reconstruction=HOW)
    with pytest.raises(ValueError, match="batches"):
        prune_(model, "2:4", Magnitude(), reconstruction=HOW)
    with pytest.raises(ValueError, match="reconstruction="):
        prune_(model, "2:4", AdaPrune(), batches, reconstruction="network")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks"):
        NetworkReconstruction(blocks=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epochs"):
        NetworkReconstruction(epochs=0)
    with pytest.raises(ValueError, match="learning_rate"):
        NetworkReconstruction(learning_rate=float("nan"))
    model.blocks[0].norm.weight.requires_grad_(False)
    with pytest.raises(CalibrationError, match="no gradient with respect to the pruned weights"):
        prune_(model, "2:4", Wanda(), batches, forward=torch.no_grad()(lambda net, batch: net(**batch)), reconstruction=HOW)
    assert [one.requires_grad for one in model.blocks[0].parameters()].count(False) == 1
    with pytest.raises(CalibrationError, match="no floating-point tensor"):
        prune_(model, "2:4", Wanda(), batches, forward=lambda net, batch: int(net(**batch).logits.argmax()), reconstruction=HOW)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
