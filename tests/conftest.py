"""Every test runs on one thread, offline, from a fixed seed."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("explore", max_examples=1000, deadline=None)  # pytest --hypothesis-profile=explore
settings.load_profile("fast")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    if "torch._dynamo.convert_frame" in sys.modules:  # what an earlier test compiled must not count against this one's limit
        torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the GPU are skipped, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device; on a machine with one, `make test-gpu` runs this")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
