"""A line per measured refresh, with the means of what was added, and a picture."""

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from bisparse import sparsify_
from bisparse.training import LiveTable


def run(table: LiveTable, steps: int = 12, refresh: int = 2) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = sparsify_(model, "2:4-T", refresh=refresh, measure_every=refresh, steps=steps).attach(optimizer)
    sparsity.on_refresh.append(table)
    losses = []
    for _ in range(steps):
        loss = (model(torch.randn(8, 16)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        table.add(loss=loss.detach())
    return losses


def test_lines_have_the_means_since_the_last_line() -> None:
    file = io.StringIO()
    table = LiveTable(file)
    losses = run(table)
    assert [row["step"] for row in table.rows] == [
        2,
        4,
        6,
        8,
        10,
    ]
    # A refresh takes place in the forward pass after the step, before that step's loss is added.
    means = [sum(losses[first : first + 2]) / 2 for first in (0, 2, 4, 6, 8)]
    assert [row["loss"] for row in table.rows] == pytest.approx(means)
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["of", "12", "flip", "rate", "kept", "tiles", "loss"] and len(lines) == 6
    assert len({len(line) for line in lines}) == 1 and "\x1b" not in file.getvalue()


def test_the_head_comes_again_and_when_a_column_does() -> None:
    file = io.StringIO()
    table = LiveTable(file)
    run(table, steps=45, refresh=1)
    heads = [place for place, line in enumerate(file.getvalue().splitlines()) if "flip rate" in line]
    assert heads == [0, 21, 42] and len(table.rows) == 44


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture(tmp_path: Path, suffix: str) -> None:
    table = LiveTable(io.StringIO())
    with pytest.raises(ValueError, match="no refresh has been measured"):
        table.plot(tmp_path / "masks.svg")
    run(table)
    assert table.plot(tmp_path / f"masks{suffix}").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.pdf"):
        table.plot(tmp_path / "masks.txt")
    (tmp_path / "masks.pdf").write_bytes(b"weights")
    with pytest.raises(ValueError, match="not a picture"):
        table.plot(tmp_path / "masks.pdf")
