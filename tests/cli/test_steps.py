"""`prune --quantize --eval --export` in steps: a killed job continues after the last complete output, and only after its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bisparse.checkpoint import load_masks, read_sidecar, verify_checkpoint
from bisparse.cli import app

pytest.importorskip("compressed_tensors")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("operators_listed_once")]
OUTPUTS = ("out/model.safetensors", "out/bisparse-masks.safetensors", "out-int8/model.safetensors")


def arguments(folder: Path, out: Path, *more: object) -> list[str]:
    text = folder.parent / "text.txt"
    method = ("--method", "alps", "--calibration", text, "--sequences", 8, "--length", 32, "--threads", 1)
    later = ("--quantize", "int8", "--eval", text, "--eval-tokens", 1100, "--export", "onnx")
    return [str(one) for one in ("prune", folder, out, "-p", "2:4", *method, *later, *more)]


def run(*given: str) -> Any:
    return CliRunner().invoke(app, list(given), catch_exceptions=False)


def stats(out: Path) -> dict[str, tuple[int, int]]:
    return {
        name: ((one := (out.parent / name).stat()).st_ino, one.st_mtime_ns) for name in OUTPUTS if (out.parent / name).exists()
    }


def check_complete(out: Path) -> None:
    quantised, file = out.with_name("out-int8"), out.with_name("out.onnx")
    assert verify_checkpoint(out) and verify_checkpoint(quantised) and verify_checkpoint(file, "2:4", include="model.layers.*")
    pruned, kept = load_masks(out), load_masks(quantised)
    assert not any(bool((kept[name] & ~mask).any()) for name, mask in pruned.items())
    for folder in (out, quantised):
        figures = read_sidecar(folder).evaluation
        assert [one["when"] for one in figures] == ["before", "after"]
        card = (folder / "README.md").read_text()
        assert "text.txt, 8 sequences" in card and all(f"{one['perplexity']:.4g}" in card for one in figures)
    assert "stored dense" in (out / "README.md").read_text() and "stored dense" not in (quantised / "README.md").read_text()
    hidden = [one.name for one in out.parent.iterdir() if one.name.startswith(".")]
    assert not hidden


@pytest.mark.slow
def test_a_job_that_is_killed_between_two_steps_continues_after_the_first(folder: Path) -> None:
    whole, out = folder.parent / "whole" / "out", folder.parent / "killed" / "out"
    whole.parent.mkdir()
    assert run(*arguments(folder, whole)).exit_code == 0
    process = subprocess.Popen([sys.executable, "-m", "bisparse", *arguments(folder, out, "--resume", folder.parent / "journal")])
    while not out.exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.with_name("out.onnx").exists()
    before = stats(out)
    done = run(*arguments(folder, out, "--resume", folder.parent / "journal"))
    assert done.exit_code == 0, done.output
    assert "is complete: continuing after the pruning" in done.output
    assert before.items() <= stats(out).items()
    check_complete(out)
    for name in OUTPUTS:
        assert (out.parent / name).read_bytes() == (whole.parent / name).read_bytes(), name
    again = run(*arguments(folder, out, "--resume", folder.parent / "journal"))
    assert again.exit_code == 0 and again.output.count("is complete") == 3 and "Quantised:" in again.output


def test_an_interrupted_step_says_what_is_complete_and_is_the_first_to_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = folder.parent / "out"
    resume = ("--resume", folder.parent / "journal")
    before: dict[str, tuple[int, int]] = {}
    for step, complete, more in (
        ("quantize_folder", f"{out} is complete", ()),
        ("export_folder", f"{out}, {out}-int8 are complete", resume),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"bisparse.cli.steps.{step}", interrupted)
            stopped = run(*arguments(folder, out, *more))
        assert stopped.exit_code == 130 and "nothing was left behind" not in stopped.output
        assert complete in " ".join(stopped.output.split())
        assert before.items() <= stats(out).items() and len(before) < len(stats(out))
        before = stats(out)
        refused = run(*arguments(folder, out))
        assert refused.exit_code == 1 and "exists already" in refused.output
    assert run(*arguments(folder, out, *resume)).exit_code == 0
    assert before.items() <= stats(out).items()
    check_complete(out)


def test_outputs_of_another_job_are_not_taken_for_this_one(folder: Path) -> None:
    out, text = folder.parent / "out", folder.parent / "text.txt"
    magnitude = ["prune", str(folder), str(out), "-p", "2:4", "--quantize", "int8", "--resume", str(folder.parent / "journal")]
    assert run(*magnitude).exit_code == 0
    before = stats(out)
    assert read_sidecar(out).provenance["command"].startswith("bisparse prune")
    for changed in (["1:4" if one == "2:4" else one for one in magnitude], [*magnitude, "--exclude", "*.q_proj"]):
        refused = run(*changed)
        assert refused.exit_code == 1 and "another job wrote it" in " ".join(refused.output.split())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    refused = run(*magnitude)
    assert refused.exit_code == 1 and "another job wrote it" in " ".join(refused.output.split())
    assert stats(out) == before
    assert run(*magnitude, "--overwrite").exit_code == 0 and stats(out) != before
    later = run(*magnitude, "--eval", str(text), "--eval-tokens", "1100")
    assert later.exit_code == 0 and len(read_sidecar(out).evaluation) == 2  # a step that was not asked for at first


def test_magnitude_without_a_later_step_has_nothing_to_resume(folder: Path) -> None:
    refused = run("prune", str(folder), str(folder.parent / "out"), "--resume", str(folder.parent / "journal"))
    assert refused.exit_code == 2 and not (folder.parent / "out").exists()
