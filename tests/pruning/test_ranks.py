"""Pruning shared by two ranks (gloo): the same on both, and what one process would have made; a failure is everybody's."""

from __future__ import annotations

import copy
import importlib.util
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bisparse
from bisparse.checkpoint import verify_checkpoint
from bisparse.process_group import Ranks
from rank_processes import command_on_ranks, results_of_ranks

WORKER = Path(__file__).with_name("pruning_ranks.py")
SPEC = importlib.util.spec_from_file_location("pruning_ranks", WORKER)
assert SPEC is not None and SPEC.loader is not None
worker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(worker)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    return results_of_ranks(WORKER, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", list(worker.JOBS))
def test_ranks_agree_and_make_what_one_process_makes(name: str, results: list[dict]) -> None:
    alone = worker.pruned(name, None)
    for key, value in results[0][name].items():
        assert torch.equal(value, results[1][name][key]), key
        # Sums over ranks are taken in another order; on so few tokens that shows in the third digit.
        assert float((value - alone[key]).norm()) <= 5e-3 * float(alone[key].norm()), key


def test_the_failure_of_one_rank_reaches_the_other_and_changes_no_model(results: list[dict]) -> None:
    assert sorted(one["error"] for one in results) == [
        "CalibrationError: 2.gate: on purpose",
        "OtherRankError: rank 1 failed: CalibrationError: 2.gate: on purpose",
    ]
    assert all(one["unchanged"] for one in results)


@pytest.mark.parametrize("name", list(worker.DIFFERENCES))
def test_ranks_with_different_jobs_all_raise_the_same_error_before_they_start(name: str, results: list[dict]) -> None:
    (one, one_unchanged), (other, other_unchanged) = (result["differing"][name] for result in results)
    assert one_unchanged and other_unchanged
    for error in (one, other):
        assert re.search(worker.DIFFERENCES[name], error), error
    if name not in ("no data", "bad pattern"):
        # These are wrong on rank 1 alone, and rank 0 quotes it.
        assert one == other and "on rank 0 and" in one and "on rank 1" in one


def test_one_alone_shares_with_nobody() -> None:
    alone = Ranks()
    assert list(alone.share([1, 2, 3])) == [1, 2, 3] and alone.all("own") == ["own"]
    sums = {"a": torch.ones(2)}
    alone.sum_(sums)
    assert torch.equal(sums["a"], torch.ones(2))


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bisparse"]


def test_what_one_process_does_alone_the_first_rank_does(tmp_path: Path) -> None:
    save_file({f"l{i}.weight": torch.randn(64, 64) for i in range(4)}, tmp_path / "model.safetensors")
    ended = command_on_ranks(2, tmp_path, "prune", "model.safetensors", "out", "-p", "4:8-T")
    assert [code for code, _ in ended] == [0, 0], ended
    said = [log for _, log in ended]
    assert "Written to out" in said[0] and "Written to out" not in said[1]
    assert not any("another process" in log for log in said)
    assert verify_checkpoint(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["prune", "-p", "2:4"], ["convert", "--to-dense"]])
def test_when_the_first_rank_fails_alone_all_end_without_a_traceback(command: list[str], tmp_path: Path) -> None:
    save_file({"l.weight": torch.full((64, 64), torch.nan)}, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    command = [*LAUNCH, command[0], "model.safetensors", "out", *command[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1 and "exists already" in done.stderr
    ours = done.stderr.partition("ChildFailedError")[0].partition("failed (exitcode")[0]
    assert "bisparse/cli" not in ours
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("method", ["magnitude", "alps"])
def test_sigterm_ends_all_ranks_with_a_message_and_nothing_half_written(method: str, tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "import torch\n"
        "def both():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(40)]), 8 * [torch.randn(64, 512)]\n"
    )
    save_file({f"l{i}.weight": torch.randn(512, 512) for i in range(300)}, tmp_path / "large.safetensors")
    source = "large.safetensors" if method == "magnitude" else "large:both"
    begun = ".out.bisparse-*/output/*.safetensors" if method == "magnitude" else "journal/rank-*/done-*"
    options = ["--method", method, *([] if method == "magnitude" else ["--resume", "journal"])]
    command = [*LAUNCH, "prune", source, "out", "-p", "4:8-T", *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(begun)) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate()
    assert errors.count("bisparse: stopped by SIGTERM; ") == 2, errors
    assert "gloo::EnforceNotMet" not in errors
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_the_command_runs_over_ranks_by_torchrun(tmp_path: Path) -> None:
    (tmp_path / "mine_over_ranks.py").write_text(
        "import torch\n"
        "def both():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)), 6 * [torch.randn(8, 16)]\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["bisparse", "prune", "mine_over_ranks:both", "out", "-p", "4:8-T", "--method", "adaprune"]
    done = subprocess.run([*launch, *command], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Written to out") == 1
    assert verify_checkpoint(tmp_path / "out")


@pytest.mark.slow
def test_steps_after_the_pruning_run_under_torchrun(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    words = {f"w{i}": i for i in range(32)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 7}" for i in range(2000)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [
        "bisparse",
        "prune",
        "model",
        "out",
        "-p",
        "2:4",
        "--method",
        "wanda",
        "--calibration",
        "text.txt",
        "--sequences",
        "4",
    ]
    command += ["--length", "16", "--eval", "text.txt", "--resume", "journal"]
    done = subprocess.run([*launch, *command], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Before:") == 1 and done.stdout.count("After:") == 1


@pytest.mark.parametrize("group", [torch.ones(2), -100, "WORLD", [0, 1], object])
def test_what_is_no_process_group_is_refused_and_nothing_changes(group: object) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = bisparse.sparsify_(copy.deepcopy(model), "2:4", mode="static")
    for call in (
        lambda: bisparse.prune_(model, "2:4", group=group),  # type: ignore[arg-type]
        lambda: bisparse.convert_(model, "2:4", group=group),  # type: ignore[arg-type]
        lambda: sparsity.attach(optimizer, group=group),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="group="):
            call()
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
