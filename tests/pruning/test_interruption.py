"""All or nothing, and going on where it stopped: errors, interrupts and kills in the middle of a job."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from failing import Failing
from torch import Tensor, nn

from bisparse.pruning import AdaPrune, SparseGPT, Wanda, prune_
from bisparse.pruning.journal import Journal, JournalError, remove_journal
from bisparse.rollback import same_bits
from forked import in_child


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Convolutional(nn.Sequential):
    """A chain whose biases live in batch norms of later blocks."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        for _ in range(3):
            layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        super().__init__(*layers)


class Unchained(nn.Module):
    """The same, where every stage runs from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.others = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleDict()
        for i in range(3):
            self.others[f"conv{i}"] = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.others[f"norm{i}"] = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in range(3):
            x = torch.relu_(self.others[f"norm{i}"](self.others[f"conv{i}"](x)))
        return x


KINDS = ["chain", "chain with norms", "no chain"]


def case(kind: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    if kind == "chain":
        return Network(), [torch.randn(8, 16) for _ in range(6)]
    model = Convolutional() if kind == "chain with norms" else Unchained()
    model.eval()
    return model, [torch.randn(4, 3, 6, 6) for _ in range(6)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_model_is_unchanged_after_a_failure_at_any_layer(kind: str, order: str, error: type[BaseException]) -> None:
    model, batches = case(kind)
    before = copy.deepcopy(model.state_dict())
    for at in (1, 2, 3):
        with pytest.raises(error):
            prune_(model, "2:4", Failing(at, error), batches, order=order)
        assert same(before, model.state_dict())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_job_goes_on_where_it_stopped_and_ends_the_same(kind: str, order: str, tmp_path: Path) -> None:
    model, batches = case(kind)
    whole = copy.deepcopy(model)
    expected = prune_(whole, "4:8-T", AdaPrune(), batches, order=order)
    journal = tmp_path / "journal"
    done = 0
    for at in (2, 2):
        failing = Failing(at, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            prune_(model, "4:8-T", failing, batches, order=order, resume=journal)
        done += failing.count - 1
    last = Failing(-1, KeyboardInterrupt)
    report = prune_(model, "4:8-T", last, batches, order=order, resume=journal)
    assert last.count == len(expected) - done, "layers finished before must not be done again"
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.state_dict()[key] != 0, value != 0)
    assert [layer.name for layer in report] == [layer.name for layer in expected]
    for one, other in zip(report, expected, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert (one.layout, one.shape, one.density) == (other.layout, other.shape, other.density)
    assert not journal.exists()


def test_a_killed_process_leaves_a_journal_to_resume_from(tmp_path: Path) -> None:
    class Dies(Exception):
        def __init__(self) -> None:
            os._exit(9)

    journal = tmp_path / "journal"

    def job() -> None:
        model, batches = case("chain")
        prune_(model, "2:4", Failing(4, Dies), batches, resume=journal)

    assert in_child(job) == 9
    assert sorted(journal.glob("done-*")) and not list(journal.glob("*.part"))
    model, batches = case("chain")
    whole = copy.deepcopy(model)
    prune_(whole, "2:4", AdaPrune(), batches)
    last = Failing(-1, ValueError)
    prune_(model, "2:4", last, batches, resume=journal)
    assert last.count == 3
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["pattern", "method", "data", "weights", "order"])
def test_a_journal_of_another_job_is_refused(change: str, tmp_path: Path) -> None:
    model, batches = case("chain")
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Failing(3, KeyboardInterrupt), batches, resume=tmp_path / "journal")
    pattern, method, order = "2:4", AdaPrune(), "sequential"
    if change == "pattern":
        pattern = "4:8"
    elif change == "method":
        method = AdaPrune(damping=0.5)
    elif change == "data":
        batches = [one + 1 for one in batches]
    elif change == "weights":
        with torch.no_grad():
            model.blocks[1][0].weight.add_(1)
    else:
        order = "parallel"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(JournalError, match="another job"):
        prune_(model, pattern, method, batches, order=order, resume=tmp_path / "journal")
    assert same(before, model.state_dict())


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(JournalError, match="not empty"):
        prune_(Network(), "2:4", Wanda(), [torch.randn(8, 16)], resume=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_journal_keeps_comes_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"what": 1}) as journal:
        tensor = torch.randn(3, 4).bfloat16().t()
        journal.put("done", "a/b.c:d", {"x": tensor}, {"error": 0.5})
        assert journal.has("done", "a/b.c:d") and not journal.has("dense", "a/b.c:d")
        tensors, about = journal.get("done", "a/b.c:d")
        assert torch.equal(tensors["x"], tensor) and about == {"error": 0.5}
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another layer", "about is garbage", "about is a list"])
def test_a_damaged_journal_is_named_with_what_to_do(damage: str, tmp_path: Path) -> None:
    model, batches = case("chain")
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Failing(3, KeyboardInterrupt), batches, resume=tmp_path / "journal")
    before = copy.deepcopy(model.state_dict())
    damaged = next((tmp_path / "journal").glob("done-*"))
    if damage.startswith("about"):
        damaged = tmp_path / "journal" / "about.json"
        damaged.write_text("[]" if damage.endswith("list") else "{")
    elif damage == "of another layer":
        damaged.write_bytes(next(file for file in (tmp_path / "journal").glob("done-*") if file != damaged).read_bytes())
    else:
        damaged.write_bytes(damaged.read_bytes()[: 0 if damage == "empty" else 50])
    with pytest.raises(JournalError, match=re.escape(str(damaged)) + ".*delete .*journal.* start over"):
        prune_(model, "2:4", Failing(2, KeyboardInterrupt), batches, resume=tmp_path / "journal")
    assert same(before, model.state_dict())


def test_no_temporary_files_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, batches = case("chain")
    prune_(model, "2:4", SparseGPT(), batches)
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Failing(2, KeyboardInterrupt), batches)
    assert not list(tmp_path.iterdir())


def interrupted(journal: Path, order: str, at: int = 4) -> tuple[nn.Module, list[Tensor]]:
    model, batches = case("chain")
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Failing(at, KeyboardInterrupt), batches, order=order, resume=journal)
    return model, batches


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize("again", [False, True], ids=["to the end", "interrupted again"])
def test_damaged_originals_in_a_journal_do_no_harm(
    damage: Callable[[Path], None], again: bool, order: str, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    model, batches = interrupted(journal, order)
    before = copy.deepcopy(model.state_dict())
    for path in journal.glob("dense-*"):
        damage(path)
    if again:
        with pytest.raises(KeyboardInterrupt):
            prune_(model, "2:4", Failing(2, KeyboardInterrupt), batches, order=order, resume=journal)
        assert same(before, model.state_dict())
    whole = copy.deepcopy(model)
    prune_(whole, "2:4", AdaPrune(), batches, order=order)
    prune_(model, "2:4", Failing(-1, ValueError), batches, order=order, resume=journal)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_a_model_goes_back_although_its_journal_has_vanished(order: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    model, batches = case("chain")
    before = copy.deepcopy(model.state_dict())

    def vanish() -> BaseException:
        for path in journal.iterdir():
            path.unlink()
        return KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Failing(4, vanish), batches, order=order, resume=journal)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("damage", ["cut", "of another layer", "of another job"])
def test_results_that_are_not_the_layers_own_are_refused_before_anything_changes(damage: str, order: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    model, batches = interrupted(journal, order)
    before = copy.deepcopy(model.state_dict())
    first, last = sorted(journal.glob("done-*"))[::2]
    if damage == "cut":
        cut(last)
    elif damage == "of another layer":
        last.write_bytes(first.read_bytes())
    else:
        other, data = case("chain")
        with pytest.raises(KeyboardInterrupt):
            prune_(other, "1:4", Failing(4, KeyboardInterrupt), data, order=order, resume=tmp_path / "other")
        last.write_bytes((tmp_path / "other" / last.name).read_bytes())
    refusal = {"cut": "is missing or damaged", "of another layer": "but is of 'blocks", "of another job": "but is of another job"}
    with pytest.raises(JournalError, match=refusal[damage]):
        prune_(model, "2:4", AdaPrune(), batches, order=order, resume=journal)
    assert same(before, model.state_dict())
    last.unlink()
    whole = copy.deepcopy(model)
    prune_(whole, "2:4", AdaPrune(), batches, order=order)
    prune_(model, "2:4", AdaPrune(), batches, order=order, resume=journal)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_one_flipped_bit_anywhere_in_an_entry_is_found(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {"job": "x"}, keep=True) as journal:
        tensors = {"weight": torch.randn(6, 8).bfloat16(), "bias": torch.randn(6), "none": torch.empty(0, 3)}
        journal.put("done", "layer", tensors, {"error": 0.5, "note": "fitted"})
        path = next(journal.folder.glob("done-*"))
        content, refused = path.read_bytes(), 0
        for bit in range(0, 8 * len(content), 7):  # in every byte, and each of the eight
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(damaged)
            try:
                found, about = journal.get("done", "layer")
            except JournalError:
                refused += 1
            else:  # such as a space between two words of the header
                assert found.keys() == tensors.keys() and about == {"error": 0.5, "note": "fitted"}
                assert all(same_bits(found[key], value) for key, value in tensors.items())
        assert refused > 0.9 * len(content)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_one_flipped_bit_in_a_journal_never_gives_other_weights(order: str, tmp_path: Path) -> None:
    model, batches = interrupted(tmp_path / "journal", order)
    before = copy.deepcopy(model.state_dict())
    for name in [next((tmp_path / "journal").glob("done-*")).name, "about.json"]:
        content = (tmp_path / "journal" / name).read_bytes()
        for at in (20, len(content) // 2, len(content) - 1):
            journal = tmp_path / "damaged"
            shutil.copytree(tmp_path / "journal", journal)
            damaged = bytearray(content)
            damaged[at] ^= 128
            (journal / name).write_bytes(damaged)
            with pytest.raises(JournalError, match=r"damaged.*delete .* start over"):
                prune_(model, "2:4", AdaPrune(), batches, order=order, resume=journal)
            assert same(before, model.state_dict())
            shutil.rmtree(journal)


def test_originals_damaged_while_a_job_runs_are_not_put_back(tmp_path: Path) -> None:
    model, batches = case("chain")
    before = copy.deepcopy(model.state_dict())

    def damage() -> BaseException:
        # In place, as a disk does it; the file is mapped.
        path = Journal._path(Journal(None, {}), "dense", "blocks.0.0").name
        with (tmp_path / "journal" / path).open("r+b") as file:
            file.seek(-5, 2)
            file.write(b"\x7f")
        return KeyboardInterrupt()

    with pytest.raises(JournalError, match=r"blocks\.0\.0 were damaged on disk .* load the model again"):
        prune_(model, "2:4", Failing(4, damage), batches, resume=tmp_path / "journal")
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] in (["blocks.0.0.weight"], [
        "blocks.0.0.weight", "blocks.0.0.bias"])  # fmt: skip


@pytest.mark.parametrize("keep", [False, True], ids=["by the job", "by remove_journal"])
def test_only_files_of_ours_are_deleted_at_the_end(keep: bool, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    model, batches = interrupted(journal, "sequential")
    own = ["weights.safetensors", ".hidden.safetensors.swp.part", "done-mine.safetensors", "about.json.bak", "notes.txt"]
    for name in own:
        (journal / name).write_text("mine")
    (journal / "rank-0-of-2-mine").mkdir()
    (journal / "rank-of-plants-of-mine").mkdir()
    leftover = f"done-{24 * '0'}.safetensors"
    (journal / f".{leftover}.0123456789abcdef.part").write_text("ours, of a process that was killed")
    prune_(model, "2:4", AdaPrune(), batches, resume=journal, keep_journal=keep)
    if keep:
        remove_journal(journal)
    assert sorted(path.name for path in journal.iterdir()) == sorted([*own, "rank-0-of-2-mine", "rank-of-plants-of-mine"])


def test_a_folder_with_somebody_elses_record_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"name": "a web site"}')
    name = f"done-{24 * 'a'}.safetensors"
    (tmp_path / name).write_text("mine")
    remove_journal(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", name]
    with pytest.raises(JournalError, match="is damaged"):
        Journal(tmp_path, {"job": "x"})


def test_a_job_killed_before_its_first_line_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".about.json.0123456789abcdef.part").write_text("{")
    with Journal(tmp_path, {"job": "x"}) as journal:
        journal.put("done", "layer", {"x": torch.ones(2)})
    assert not tmp_path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_journal_is_held_by_one_job_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    code = (
        "import sys; from bisparse.pruning.journal import Journal\n"
        "journal = Journal(sys.argv[1], {'job': 'x'}, keep=True); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        model, batches = case("chain")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(JournalError, match=r"journal of a running job.*wait for it to end, or pass another folder"):
            prune_(model, "2:4", AdaPrune(), batches, resume=folder)
        assert same(before, model.state_dict())
        remove_journal(folder)
        assert (folder / "about.json").exists(), "a journal that is in use stays"
        holder.kill()
    with Journal(folder, {"job": "x"}), pytest.raises(JournalError, match="in this or another process"):
        Journal(folder, {"job": "x"})
    assert not folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files")
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("room", [100, 1000])
def test_a_full_disk_ends_a_job_with_a_message_and_the_model_unchanged(resume: bool, room: int, tmp_path: Path) -> None:
    folder = tmp_path / "journal" if resume else None

    def job() -> None:
        import resource as limits

        model, batches = case("chain")
        before = copy.deepcopy(model.state_dict())
        limits.setrlimit(limits.RLIMIT_FSIZE, (room, limits.RLIM_INFINITY))
        with pytest.raises(JournalError, match=r"(?s)the journal.*cannot be written \(.*The model is unchanged"):
            prune_(model, "2:4", AdaPrune(), batches, resume=folder)
        assert same(before, model.state_dict())

    assert in_child(job) == 0
    assert not list(tmp_path.rglob("*.part"))
    if resume:
        model, batches = case("chain")
        prune_(model, "2:4", AdaPrune(), batches, resume=folder)
