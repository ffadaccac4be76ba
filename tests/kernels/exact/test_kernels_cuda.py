"""The Triton kernels without a GPU: their tests in Triton's interpreter, and every kernel compiled for sm_90 and sm_80."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bisparse import solve
from bisparse.kernels.exact import ops
from bisparse.kernels.sparse24 import pack
from bisparse.solvers import Exact

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = ROOT / "benchmarks" / "gpu"


def interpreted(*marks: str) -> None:
    """Run tests/kernels/interpreted in a process of its own: Triton chooses between GPU and interpreter when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels" / "interpreted"), *marks]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow  # `make test-interpreter` runs those that are not slow
def test_kernels_in_the_interpreter() -> None:
    interpreted("-m", "slow or not slow")


@pytest.mark.parametrize(
    "name", ["exact_mask", "exact_solve", "exact_solve_integers", "keep_largest", "pack_2to4", "pack_2to4_transposable"]
)
def test_operators_have_a_kernel_of_their_own_on_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bisparse::{name}", "CUDA")
    module = "sparse24.cuda_pack" if name.startswith("pack") else "exact.cuda.solve"
    assert callable(getattr(importlib.import_module(f"bisparse.kernels.{module}"), name))


# ---- compiled without a GPU ------------------------------------------------------------------------------------------

KERNELS = {
    "2:4": {"largest_of_groups"},
    "2:4-T": {"middle_masks"},
    "2:4-T of magnitudes": {"middle_masks"},
    "2:4-T laid out": {"positions_kernel", "metadata_kernel"},
    "2:4-T prices": {"swept_prices", "balanced_masks"},
    "2:4-T packed": {"packed_tiles", "metadata_kernel"},
    "2:4 packed under a mask": {"packed_tiles", "metadata_kernel"},
    "4:8-T": {"swept_prices", "balanced_masks"},
    "8:16-T": {"swept_prices", "balanced_masks"},
    "16:32-T": {"swept_prices", "balanced_masks"},
    "32:64-T": {"bisected_prices", "balanced_masks"},
    "integers": {"bisected_prices", "balanced_masks"},
    "MVUE packed": {"pack_kernel", "metadata_kernel"},
}
WITHOUT_SCORES = ("2:4", "2:4-T laid out", "2:4 packed under a mask", "integers", "MVUE packed")
HELD_TO_A_TIME = ("2:4-T", "2:4-T of magnitudes", "2:4-T laid out", "MVUE packed", "4:8-T", "8:16-T", "16:32-T")


def resources_of(only: str, arch: int, folder: Path) -> list[dict[str, Any]]:
    rows = folder / "rows.jsonl"
    arguments = ["--arch", str(arch), "--only", only, "--results", str(rows)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in rows.read_text().splitlines()]


def check_resources(only: str, arch: int, folder: Path) -> None:
    rows = resources_of(only, arch, folder)
    assert {row["kernel"] for row in rows} == KERNELS[only]
    for row in rows:
        assert row["device"] == f"none: compiled for sm_{arch}"
        assert row["instructions"] > 20
        # What the interpreter cannot show: scores are scaled without flushing or fusing, and rounded half to even.
        assert set(row["float_arithmetic"]) <= {"mul.rn.f32", "mul.f32", "add.rn.f32", "add.f32", "cvt.rni.ftz.s32.f32"}
        if only not in WITHOUT_SCORES and row["kernel"] != "metadata_kernel":
            assert "cvt.rni.ftz.s32.f32" in row["float_arithmetic"]
        if only in HELD_TO_A_TIME:
            assert row["spill_instructions"] == 0, row
            # Half of the lanes of a multiprocessor for memory, and a quarter for the price sweeps, must fit its 65536 registers.
            assert row["registers"] <= 128, row


def test_kernels_of_2to4_compile_for_sm_90_without_spills(tmp_path: Path) -> None:
    check_resources("2:4-T", 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("only", KERNELS)
def test_every_kernel_compiles(only: str, arch: int, tmp_path: Path) -> None:
    check_resources(only, arch, tmp_path)


OFFSETS = """
import re, sys
import torch
sys.argv = ["kernels.py"]
import kernels
kernels.driver.set_active(kernels.NoDevice(90))
start = torch.zeros(2, 32, 8, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
calls = [
    lambda: kernels.cuda.exact_solve(torch.rand(16, 128), 4, 8, False, *start),
    lambda: kernels.cuda.exact_solve_integers(*[torch.zeros(4, 8, 8, dtype=torch.int64), 4, True], *start[0][:, :4].long()),
]
for call in calls:
    for name, _, code in kernels.compiled(call):
        text = code.asm["ttir"]
        for pointer in ("%prices", "%start"):
            splats = re.findall(rf"(%\\w+) = tt.splat {pointer} ", text)
            for one in (pointer, *splats):
                for offset in re.findall(rf"tt.addptr {one}, .*, (?:tensor<[\\dx]*)?(i\\d+)", text):
                    print(name, pointer, offset)
"""


@pytest.mark.slow
def test_prices_are_found_beyond_two_to_the_31() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", OFFSETS], capture_output=True, text=True, env=environment, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = {tuple(line.split()) for line in done.stdout.splitlines()}
    kernels = {("swept_prices", "%prices"), ("swept_prices", "%start"), ("bisected_prices", "%prices")}
    kernels |= {("bisected_prices", "%start"), ("balanced_masks", "%prices")}
    assert seen == {(*one, "i64") for one in kernels}


# ---- on a GPU --------------------------------------------------------------------------------------------------------

PATTERNS = ["2:4-T", "4:8-T", "8:16-T", "16:32-T", "32:64-T"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_solutions_on_the_device_are_proved_and_worth_those_of_the_cpu(pattern: str, dtype: torch.dtype) -> None:
    scores = torch.randn(1024, 512).abs().to(dtype)
    scores[:64, :64] = 1
    scores[64:128, :64] = 0
    scores[200, 200] = 1e4
    for exactly in (False, True):
        solution = solve(scores.cuda(), pattern, Exact(exactly=exactly))
        assert solution.mask.is_cuda
        solution.check()
        assert solution.value == pytest.approx(solve(scores, pattern, Exact(exactly=exactly)).value, rel=1e-12)
        again = solve((scores.float() * (1 + 0.01 * torch.rand(scores.shape))).cuda(), pattern, warm_start=solution)
        again.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_the_largest_of_each_group_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    for m, n in ((2, 1), (4, 2), (6, 5), (16, 8), (40, 3)):
        groups = torch.randint(0, 9, (5000, m)).to(dtype)
        assert torch.equal(ops.keep_largest(groups.cuda(), n).cpu(), ops.keep_largest(groups, n))


@pytest.mark.gpu
def test_masks_at_2to4_are_those_of_the_cpu_ties_included() -> None:
    for scores in (torch.randn(512, 2048).abs(), torch.randint(0, 4, (512, 2052)).float(), torch.zeros(4, 4)):
        for exactly in (False, True):
            expected, none = ops.exact_mask(scores, 2, 4, exactly)
            found, coarse = ops.exact_mask(scores.cuda(), 2, 4, exactly)
            assert torch.equal(found.cpu(), expected)
            assert none is None and coarse is not None and not coarse.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packed_operands_on_the_device_are_those_of_the_specification(dtype: torch.dtype) -> None:
    for shape in ((32, 32), (256, 2080), (4096, 1024)):
        weight = torch.randn(shape).to(dtype)
        packed = pack.pack_2to4_transposable(weight.cuda())
        again = pack.pack_2to4(weight.cuda(), packed[0])
        expected = pack.pack_2to4_transposable(weight)
        for one, other in [*zip(packed, expected, strict=True), *zip(again, expected[1:], strict=True)]:
            assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
def test_operators_never_wait_for_the_device() -> None:
    scores, weight = torch.rand(256, 256).cuda(), torch.randn(256, 256).cuda().half()
    calls = [
        lambda: ops.exact_solve(scores, 4, 8, False),
        lambda: ops.exact_mask(scores, 2, 4, False),
        lambda: pack.pack_2to4_transposable(weight),
    ]
    for call in calls:
        call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_operators_are_captured_in_a_graph() -> None:
    scores, weight = torch.rand(256, 256).cuda(), torch.randn(256, 256).cuda().half()

    def run() -> tuple[torch.Tensor, ...]:
        return (*ops.exact_solve(scores, 8, 16, False), *pack.pack_2to4_transposable(weight))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    scores.copy_(torch.rand(256, 256))
    weight.copy_(torch.randn(256, 256))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, run(), strict=True))


@pytest.mark.gpu
def test_operators_on_the_device_obey_the_rules_of_torch_library() -> None:
    matrix, weight = torch.rand(32, 64).cuda(), torch.randn(32, 64).cuda().half()
    mask = pack.pack_2to4_transposable(weight)[0]
    u, v, exponent = ops.exact_solve(matrix, 4, 8, False)[1:]
    torch.library.opcheck(torch.ops.bisparse.exact_mask.default, (matrix, 2, 4, False))
    torch.library.opcheck(torch.ops.bisparse.exact_solve.default, (matrix, 4, 8, False, None, None))
    torch.library.opcheck(torch.ops.bisparse.exact_solve.default, (matrix, 4, 8, False, torch.stack([u, v]), exponent))
    layouts = pack._flat(pack._cutlass_layouts(weight))
    torch.library.opcheck(torch.ops.bisparse.pack_2to4_transposable.default, (weight, *layouts))
    torch.library.opcheck(torch.ops.bisparse.pack_2to4.default, (weight, mask, *layouts))


@pytest.mark.gpu
def test_strict_scores_on_the_device_are_proved() -> None:
    for scores in (torch.rand(64, 64, dtype=torch.float64), torch.randint(0, 1 << 40, (64, 64)), torch.rand(64, 64)):
        solution = solve(scores.cuda(), "4:8-T", Exact(strict=True)).check()
        assert solution.value == pytest.approx(solve(scores, "4:8-T", Exact(strict=True)).value, rel=1e-12)


@pytest.mark.gpu
def test_the_same_call_twice_gives_the_same_bits() -> None:
    scores = torch.randint(0, 4, (512, 512)).float().cuda()
    for n, m in ((2, 4), (4, 8), (16, 32)):
        first, second = ops.exact_solve(scores, n, m, False), ops.exact_solve(scores, n, m, False)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bad_scores_on_the_device_raise_with_their_index(pattern: str) -> None:
    scores = torch.rand(128, 128).cuda()
    scores[70, 33] = torch.nan
    with pytest.raises(ops.BadScoreError, match=r"\(70, 33\)"):
        solve(scores, pattern)


# ---- the benchmark of these kernels ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_benchmark_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = BENCHMARKS / "solvers.py"
    monkeypatch.setattr(sys, "argv", [str(program), "--results", str(tmp_path / "rows.jsonl")])
    monkeypatch.syspath_prepend(str(program.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(program), run_name="__main__")
    for module in ("environment", "record"):
        sys.modules.pop(module, None)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert "torch sees no CUDA device here, so nothing was measured" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_benchmark_rehearses_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "solvers.py"), "--rehearse", "--results", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for contender in ("device copy", "mask and pack", "pack under a mask", "operator, warm, 1% drift"):
        assert contender in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("sections.gpu_solvers").gpu_solvers
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("record", "sections"):
            del sys.modules[name]


def timed(pattern: str, dtype: str, contender: str, time_ms: float, share: float | None = None) -> dict[str, Any]:
    place = {"pattern": pattern, "dtype": dtype, "contender": contender, "device": "A GPU", "commit": "abc", "date": "2026-01-02"}
    return {**place, "time_ms": time_ms, "share": share, "versions": {"torch": "2"}}


def test_the_page_says_what_was_not_measured(section: Callable[..., list[str]]) -> None:
    page = "\n".join(section([]))
    assert page.count("not measured: no GPU was at hand") == 6 and "met" not in page.replace("not measured", "")


def test_the_page_judges_what_was_measured(section: Callable[..., list[str]]) -> None:
    rows = [timed("4:8-T", "float32", "solve", 1.99), timed("8:16-T", "float32", "solve", 2.01)]
    half = {"device copy": (0.1, None), "operator": (0.149, 0.7), "mask and pack": (0.301, 0.7)}
    rows += [timed("2:4-T", "bfloat16", name, *figures) for name, figures in half.items()]
    rows += [timed("2:4-T", "bfloat16", "torch's tile pruning, packed", 0.302, 0.6895)]
    page = "\n".join(section(rows))
    for line in (
        "| exact mask, 4:8-T, float32, certified | under 2 ms | 1.99 ms | met |",
        "| exact mask, 8:16-T, float32, certified | under 2 ms | 2.01 ms | **missed** |",
        "| exact mask, 16:32-T, float32, certified | under 2 ms | not measured: no GPU was at hand |  |",
        "| exact mask, 2:4-T, bfloat16 | under 1.5 x a copy of the matrix | 1.49 x | met |",
        "| 2:4-T mask, W and W^T packed, bfloat16 | under 3 x a copy of the matrix | 3.01 x | **missed** |",
        "| no slower, 1.5 % more magnitude | 1 x as fast, 1.52 % more | met |",
    ):
        assert line in page
