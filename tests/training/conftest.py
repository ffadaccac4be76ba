"""Small models and a plain training loop."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Conv, attention and Linear layers in one small model: input (B, 3, 8, 8), 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.conv(torch.relu(self.stem(images)))).flatten(2).transpose(1, 2)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return self.head(hidden.mean(1))


@pytest.fixture(autouse=True)
def _no_search_for_garbage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer of transformers lets accelerate look through all objects there are, which takes longer than its steps."""
    if request.node.get_closest_marker("transformers"):
        pytest.importorskip("accelerate")
        monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Residual()


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture
def step() -> Callable[..., float]:
    """One training step on the batch of a given number; returns the loss."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, clip: float | None = None) -> float:
        generator = torch.Generator().manual_seed(number)
        first = next(iter(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)))
        shape = (16, 3, 8, 8) if isinstance(first, nn.Conv2d) else (16, 16)
        inputs = torch.randn(shape, generator=generator)
        labels = torch.randint(0, 8, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(loss.detach())

    return run
