"""These tests run the Triton kernels on the CPU, as Triton decides when it is first imported; test_kernels_cuda.py starts them.

TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest tests/kernels/interpreted
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
