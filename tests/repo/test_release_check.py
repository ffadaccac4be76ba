"""What is released: the wheel is built from the sdist, holds every module, and passes twine's strict check."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_sdist_and_wheel_are_built_and_whole(tmp_path: Path) -> None:
    pytest.importorskip("twine")
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tools")!r})
import check_release
sdist, wheel = check_release.build(Path({str(tmp_path / "dist")!r}))
check_release.check_contents(sdist, wheel)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr
