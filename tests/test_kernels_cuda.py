"""The Triton kernels without a GPU: their tests in Triton's interpreter, and every kernel compiled for sm_90 and sm_80."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks" / "gpu"


def interpreted(*marks: str) -> None:
    """Run tests/interpreted in a process of its own: Triton chooses between GPU and interpreter when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "interpreted"), *marks]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_kernels_in_the_interpreter() -> None:
    interpreted()


@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter() -> None:
    interpreted("-m", "slow")
