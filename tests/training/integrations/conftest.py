"""Trainers without the search for garbage that each of their runs begins with."""

from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def _no_search_for_garbage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer of transformers lets accelerate look through all objects there are, which takes longer than its steps."""
    if request.node.get_closest_marker("transformers"):
        pytest.importorskip("accelerate")
        monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
