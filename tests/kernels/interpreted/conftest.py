"""These tests run the Triton kernels on the CPU, as Triton decides when it is first imported: `make test-interpreter`.

TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest tests/kernels/interpreted
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
for folder in ("kernels/exact", "kernels/sparse24", "kernels/mvue", "accelerate"):  # whose cases and oracles these tests use
    sys.path.append(str(TESTS / folder))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
