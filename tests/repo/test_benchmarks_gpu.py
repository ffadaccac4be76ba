"""The GPU benchmarks of accelerated layers: they run, they verify before they time, and without a GPU they say so."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("linear.py", "block.py")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_a_gpu_nothing_is_measured_and_that_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = ROOT / "benchmarks" / "gpu" / name
    monkeypatch.setattr(sys, "argv", [str(program), "--results", str(tmp_path / "rows.jsonl")])
    monkeypatch.syspath_prepend(str(program.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(program), run_name="__main__")
    for module in ("environment", "record"):
        sys.modules.pop(module, None)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith(f"benchmarks/gpu/{name}: torch sees no CUDA device here, so nothing was measured")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("linear.py", []), ("linear.py", ["--grid"]), ("block.py", [])])
def test_rehearsals_run_and_write_nothing(name: str, more: list[str], tmp_path: Path) -> None:
    done = run(name, "--rehearse", *more, "--results", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "24 points, 0 left out" in done.stdout if more else "sparse, MVUE by reference" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import linear

    yield linear
    for name in ("linear", "environment", "record"):
        sys.modules.pop(name, None)


def test_verification_sees_wrong_outputs_wrong_gradients_and_bias(linear, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    cpu = torch.device("cpu")
    layers = linear.build((64, 128), ["reference"], cpu)
    inputs, upstream = linear.numbers((64, 128), 512, cpu)
    assert set(layers) == {"dense", "sparse by reference", "sparse, MVUE by reference"}
    assert all(linear.verify(layer, inputs, upstream) < linear.TOLERANCE for layer in layers.values())
    from bisparse.accelerate import operators
    from bisparse.accelerate.backends import BACKENDS

    kind = type(BACKENDS["reference"])
    honest = kind.multiply

    def off(*arguments, **how):  # type: ignore[no-untyped-def]
        return honest(*arguments, **how) * 1.05

    with monkeypatch.context() as patched:
        patched.setattr(kind, "multiply", off)
        assert linear.verify(layers["sparse by reference"], inputs, upstream) > linear.TOLERANCE
    with monkeypatch.context() as patched:
        estimate = operators.pack_estimate
        patched.setattr(operators, "pack_estimate", lambda gradient, *how: estimate(gradient * 1.5, *how))
        assert linear.verify(layers["sparse, MVUE by reference"], inputs, upstream) > linear.TOLERANCE
        assert linear.verify(layers["sparse by reference"], inputs, upstream) < linear.TOLERANCE


def test_a_grid_is_on_disk_as_it_is_measured_and_goes_on(linear, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    measured = []

    def measure(shape, tokens, dtype, device, backend, **how):  # type: ignore[no-untyped-def]
        measured.append((*shape, tokens, how["training"], how["both_ways"]))
        if len(measured) == 8:
            raise KeyboardInterrupt
        if shape == (64, 128):
            raise RuntimeError("CUDA error: CUSPARSE_STATUS_NOT_SUPPORTED when calling `cusparseLtMatmul`\nmore")
        return linear.Timing(linear.Pass(1.0, 2.0, 3), linear.Pass(0.5, 1.5, 2))

    for name, value in {
        "measure_linear": measure, "GRID_SIZES": (64, 128), "GRID_TOKENS": (8,), "ROOT": tmp_path,
        "record_on": lambda device, path, fresh: sys.modules["record"].Record(path, fresh),
    }.items():  # fmt: skip
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    options = argparse.Namespace(rehearse=False, fresh=False, results=tmp_path / "gpu.jsonl")
    with pytest.raises(KeyboardInterrupt):
        linear.write_grid(torch.device("cpu"), ["cusparselt"], options)
    kept = len((tmp_path / "gpu_grid.jsonl").read_text().splitlines())
    assert kept == 6, "three of 128 x 128 and of 128 x 64, the largest first; the library refuses 64 x 128"
    linear.write_grid(torch.device("cpu"), ["cusparselt"], options)
    assert len(set(measured)) == 12 and len(measured) == 8 + 12 - kept, "what is on disk is not measured again"
    grid = linear.Grid.read(tmp_path / "src/bisparse/accelerate/grids/nvidia-test.json")
    assert len(grid.points) == 9 and grid.points[0].timing.dense.peak_bytes == 3


def test_windows_without_cusparselt_do_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import windows

    monkeypatch.setattr(windows, "need_gpu", lambda name: torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["windows.py"])
    windows.main()
    assert "windows.py is left out: cusparselt needs a CUDA device" in capsys.readouterr().out
    for name in ("windows", "environment", "record"):
        sys.modules.pop(name, None)


def test_turns_are_taken_and_medians_counted(linear) -> None:  # type: ignore[no-untyped-def]
    import environment

    order: list[str] = []

    def program(name: str, *times: float):  # type: ignore[no-untyped-def]
        left = list(times)
        return lambda: order.append(name) or (left.pop(0), 1.0)

    found = environment.take_turns({"a": program("a", 9, 1, 5, 2), "b": program("b", 9, 7, 8, 6)}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert found["a"][0] == [2, 1.0] and found["b"][0] == [7, 1.0] and found["a"][1][1] == 0.0


def test_the_page_judges_rows_by_their_targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from sections.gpu import gpu

    common = {"device": "A GPU", "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-02", "forward_ms": 3.0}
    layer = {"benchmark": "linear", "shape": [4096, 14336], "shape_text": "4096x14336", "tokens": 16384, **common}
    block = {"benchmark": "block", "width": 4096, "batch": 8, "length": 2048, "refresh_share_target": 0.03, **common}
    rows = [
        {**layer, "contender": "dense", "backward_ms": 6.0, "speedup": 1.0, "target": None},
        {**layer, "contender": "sparse by cusparselt", "backward_ms": 6.0, "speedup": 1.1, "target": 1.25},
        {**layer, "contender": "sparse by cusparselt", "backward_ms": 4.0, "speedup": 1.29, "target": 1.25},
        {
            **block, "contender": "sparse by cusparselt", "backward_ms": 6.0, "speedup": 1.1, "target": 1.15, "refresh_ms": 0.4,
            "refresh_share_every_step": 0.04,
        },
    ]  # fmt: skip
    page = "\n".join(gpu(json.loads(json.dumps(rows))))
    assert "| 4096 x 14336, 16,384 tokens | sparse by cusparselt | 3 + 4 | 1.29 | at least 1.25 | met |" in page
    assert "1.10 | at least 1.15 | **missed**" in page and "4.0 %, **missed**" in page
    assert "at least 1.25 | **missed**" not in page, "an older row of the same layer"
    assert "no GPU was at hand" in "\n".join(gpu([]))
    for name in [name for name in sys.modules if name.split(".")[0] in ("sections", "record")]:
        del sys.modules[name]
