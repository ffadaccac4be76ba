"""The picture of how masks evolved over a run, from training to the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bisparse
from bisparse.checkpoint import SIDECAR, read_sidecar, save
from bisparse.cli import app
from bisparse.report import read_figures, write_report
from bisparse.report.lines import LineChart, lines_of_history
from bisparse.results import MaskPoint

TITLE = "How the masks settled"


def train(**how) -> tuple[nn.Module, bisparse.Sparsity]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsity = bisparse.sparsify_(model, **({"pattern": "4:8-T", "refresh": 2, "measure_every": 2} | how))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    for _ in range(11):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 16)), torch.randint(0, 8, (16,))).backward()
        optimizer.step()
    bisparse.finalize_(model)
    return model, sparsity


def axis(chart: LineChart, y: float) -> float:
    """A height as the fraction that the labels of the axis give it."""
    (y0, low), (y1, high) = chart.ticks[0], chart.ticks[-1]
    return (float(low[:-2]) + (y - y0) / (y1 - y0) * (float(high[:-2]) - float(low[:-2]))) / 100


def step(chart: LineChart, x: float) -> float:
    (x0, first), (x1, last) = chart.marks[0], chart.marks[-1]
    low, high = (float(text.replace(",", "")) for text in (first, last))
    return low + (x - x0) / (x1 - x0) * (high - low)


def test_a_run_is_trained_saved_and_shown(tmp_path: Path) -> None:
    model, sparsity = train()
    save(model, tmp_path / "saved", report=sparsity.report())
    history = sparsity.history
    assert [point.step for point in history] == [2, 4, 6, 8, 10] and history[0].flip_rate > 0
    sidecar = read_sidecar(tmp_path / "saved")
    assert sidecar is not None and sidecar.report.history == tuple(history)
    assert json.loads((tmp_path / "saved" / SIDECAR).read_text())["history"] == [dataclasses.asdict(one) for one in history]

    result = CliRunner().invoke(app, ["report", str(tmp_path / "saved"), "-o", str(tmp_path / "page.html"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["history"] == [dataclasses.asdict(one) for one in history]
    page = (tmp_path / "page.html").read_text()
    section = page.split(TITLE, 1)[1].split("</section>")[0]
    label = f"{100 * history[0].flip_rate:.3g} % at optimizer step 2 to {100 * history[-1].flip_rate:.3g} % at optimizer step 10"
    assert section.count(f'aria-label="Flip rate of the masks: from {label}"') == 2  # wide and narrow
    for point in history:
        assert section.count(f"<title>{100 * point.flip_rate:.3g} % at optimizer step {point.step}</title>") >= 2
        assert section.count(f"<title>{100 * point.retained:.3g} % at optimizer step {point.step}</title>") >= 2
    assert section.count('role="img"') == section.count("optimizer steps</text>") == 4
    assert "near zero at the end; if it stays high, raise <code>decay</code>" in section
    assert "At 5 refreshes of the masks" in section


@pytest.mark.parametrize("narrow", [False, True])
def test_lines_are_at_their_values(narrow: bool) -> None:
    points = [MaskPoint(40 * (place + 1), 0.31 / (place + 1), 0.7 + 0.013 * place, 0.5) for place in range(20)]
    for chart, values in zip(
        lines_of_history(points, narrow=narrow),
        ([one.flip_rate for one in points], [one.retained for one in points]),
        strict=True,
    ):
        line = [tuple(map(float, place.split())) for place in chart.path[1:].split("L")]
        assert chart.path[0] == "M" and len(line) == len(chart.dots) == 20
        for (x, y), dot, point, value in zip(line, chart.dots, points, values, strict=True):
            assert (x, y) == (pytest.approx(dot[0], abs=0.06), pytest.approx(dot[1], abs=0.06))
            assert axis(chart, dot[1]) == pytest.approx(value) and step(chart, dot[0]) == pytest.approx(point.step)
            assert chart.frame.left <= x <= chart.frame.right and chart.frame.top <= y <= chart.frame.bottom
    assert axis(lines_of_history(points)[0], lines_of_history(points)[0].frame.bottom) == 0


SHARES = [[0.0], [1.0], [0.5], [0.0, 0.0], [1.0, 1.0], [0.3, 0.3], [0.0, 1.0], [1e-9, 0.0], [0.9999, 1.0], [0.2, 0.7, 0.1]]


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("apart", [1, 40, 10**9])
def test_any_history_has_axes_with_a_few_labels_that_contain_it(shares: list[float], apart: int) -> None:
    points = [MaskPoint(place * apart, share, share, share) for place, share in enumerate(shares)]
    for chart in (*lines_of_history(points), *lines_of_history(points, narrow=True)):
        frame = chart.frame
        assert all(frame.left <= x <= frame.right and frame.top - 0.1 <= y <= frame.bottom + 0.1 for x, y, _ in chart.dots)
        for labels in (chart.ticks, chart.marks):
            assert 1 <= len(labels) <= 9 and len({text for _, text in labels}) == len(labels)
            assert all(len(text) <= 9 for _, text in labels)
        assert all(0 <= float(text[:-2]) <= 100 for _, text in chart.ticks)


def test_a_long_history_has_a_dot_at_each_end_only() -> None:
    chart, _ = lines_of_history([MaskPoint(place, 0.1, 0.5, 0.1) for place in range(1000)])
    assert [text for *_, text in chart.dots] == ["10 % at optimizer step 0", "10 % at optimizer step 999"]
    assert chart.path.count("L") == 999


@pytest.mark.parametrize("how", ["pruned", "static", "not measured"])
def test_without_refreshes_there_is_no_section(how: str, tmp_path: Path) -> None:
    if how == "pruned":
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        report = bisparse.prune_(model, "4:8-T")
    else:
        model, sparsity = train(**({"mode": "static"} if how == "static" else {"measure_every": 0}))
        report = sparsity.report()
    save(model, tmp_path / "saved", report=report)
    page = write_report(tmp_path / "saved", tmp_path / "page.html").read_text()
    assert TITLE not in page and not re.search(r'class="line"', page)


def test_a_single_refresh_is_a_dot(tmp_path: Path) -> None:
    model, sparsity = train(measure_every=40)
    save(model, tmp_path / "saved", report=sparsity.report())
    (point,) = read_figures(tmp_path / "saved").report.history
    section = write_report(tmp_path / "saved", tmp_path / "page.html").read_text().split(TITLE, 1)[1]
    assert f'aria-label="Flip rate of the masks: {100 * point.flip_rate:.3g} % at optimizer step 2"' in section
