"""Advice: what wins is converted, what does not has a reason; measured on a device, predicted where there is a grid."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from bisparse import accelerate_, prune_, sparsify_, verify
from bisparse.accelerate import (
    Grid,
    GridPoint,
    Pass,
    Timing,
    advise,
    advise_shapes,
    advisor,
    layer_shapes,
    measure_linear,
    stored_grids,
)
from bisparse.accelerate.timing import random_mask

CPU = torch.device("cpu")
SIZES, TOKENS = (512, 1024, 4096), (64, 1024, 16384)


@pytest.fixture(autouse=True)
def _without_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # The advice of these tests is that of a machine without one, also where there is one, and where grids were measured.
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(advisor, "stored_grids", dict)


def law(rows: int, columns: int, tokens: int, factor: float) -> float:
    """A time that is a product of powers, which interpolation in logarithms must hit exactly."""
    return factor * rows**0.9 * columns**1.1 * tokens**0.8 * 1e-9


def synthetic(slower_below: int = 0, missing: tuple[int, int, int] | None = None) -> Grid:
    points = []
    for rows in SIZES:
        for columns in SIZES:
            for tokens in TOKENS:
                for training, both_ways in ((True, True), (True, False), (False, False)):
                    if (rows, columns, tokens) == missing:
                        continue
                    dense = Pass(law(rows, columns, tokens, 1.0), law(rows, columns, tokens, 2.0) * training, 8 * rows)
                    share = 1.5 if tokens < slower_below else 0.6
                    backward = dense.backward_ms * (share if both_ways else 1.0)
                    sparse = Pass(dense.forward_ms * share, backward, 6 * rows)
                    points.append(GridPoint(rows, columns, tokens, "cusparselt", training, both_ways, Timing(dense, sparse)))
    return Grid("NVIDIA Test", "bfloat16", tuple(points), {"commit": "none"})


def mlp(pattern: str | None = "2:4-T") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    if pattern is not None:
        prune_(model, pattern)
    return model


# ---- the grid


@pytest.mark.parametrize("shape", [(512, 512), (700, 4000), (1024, 513), (4096, 4096)])
@pytest.mark.parametrize("tokens", [64, 100, 16384])
def test_interpolation_is_exact_for_products_of_powers(shape: tuple[int, int], tokens: int) -> None:
    found = synthetic().predict(shape, tokens, "cusparselt", training=True, both_ways=True)
    assert found is not None
    assert found.dense.forward_ms == pytest.approx(law(*shape, tokens, 1.0), rel=1e-9)
    assert found.sparse.backward_ms == pytest.approx(law(*shape, tokens, 1.2), rel=1e-9)
    assert found.speedup == pytest.approx(1 / 0.6, rel=1e-9) and found.dense.peak_bytes == pytest.approx(8 * shape[0], abs=1)
    forward = synthetic().predict(shape, tokens, "cusparselt", training=False, both_ways=False)
    assert forward is not None and forward.dense.backward_ms == forward.sparse.backward_ms == 0.0


def test_nothing_is_predicted_outside_of_what_was_measured() -> None:
    grid = synthetic(missing=(1024, 1024, 1024))
    for shape, tokens in (((511, 512), 64), ((512, 4097), 64), ((512, 512), 63), ((512, 512), 16385), ((800, 800), 500)):
        assert grid.predict(shape, tokens, "cusparselt", training=True, both_ways=True) is None
    assert grid.predict((512, 512), 64, "cutlass", training=True, both_ways=True) is None
    assert grid.predict((2000, 2000), 5000, "cusparselt", training=True, both_ways=True) is None, "a corner is missing"
    assert grid.predict((512, 2000), 5000, "cusparselt", training=True, both_ways=True) is not None


def test_a_grid_survives_its_file(tmp_path: Path) -> None:
    synthetic().write(tmp_path / "deep" / "grid.json")
    assert Grid.read(tmp_path / "deep" / "grid.json") == synthetic()


def test_files_that_are_no_grid_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    synthetic().write(path)
    content = json.loads(path.read_text())
    zero = json.loads(json.dumps(content))
    zero["points"][0]["timing"]["dense"]["forward_ms"] = 0.0
    for broken in ({**content, "format": 2}, [], {"format": 1}, {**content, "points": [{"tokens": 1}]}, zero):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="not a grid of measured times"):
            Grid.read(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="not a grid of measured times"):
        Grid.read(path)


def test_grids_that_come_with_the_package_are_grids() -> None:
    assert all(isinstance(grid, Grid) and name == grid.device for name, grid in stored_grids().items())


# ---- advice


def test_advice_from_a_grid_and_what_accelerate_makes_of_it() -> None:
    model = mlp().to(torch.bfloat16).eval()
    advice = advise(model, 2000, grid=synthetic())
    assert advice.source == "predicted" and advice.device == "NVIDIA Test"
    assert [(one.name, one.convert, one.backend) for one in advice.layers] == [
        ("0", True, "cusparselt"),
        ("2", True, "cusparselt"),
    ]
    assert advice["0"].reason == "1.67x faster" and advice.speedup == pytest.approx(1 / 0.6)
    slow = advise(model, 100, grid=synthetic(slower_below=1024))
    assert (
        slow["0"].convert is False
        and slow["0"].reason.startswith("slower by ")
        and "at 100 tokens with cusparselt" in slow["0"].reason
    )
    assert slow.speedup == 1.0, "what does not win stays dense"
    report = accelerate_(model, "reference", advice=slow)
    assert len(report) == 0 and report["0"].reason == slow["0"].reason and type(model[0]) is nn.Linear
    assert len(accelerate_(model, "reference", advice=advice)) == 2


def test_without_device_and_grid_only_what_is_exact_is_said() -> None:
    model = mlp().eval()
    advice = advise(model.to(torch.bfloat16), 1 << 20)
    assert advice.source == "exact" and advice.speedup is None
    for one in advice.layers:
        assert one.convert is None and one.timing is None and "no grid of measured times is stored" in one.reason
        assert one.forward_flops == 2 * 2**20 * 512 * 1024
        assert (one.dense_bytes, one.sparse_bytes) == (2 * 512 * 1024, 2 * 512 * 1024 * 9 // 16)
    assert "without times" in str(advice)
    assert len(accelerate_(model, "reference", advice=advice)) == 2, "not known is no reason against"


def test_bytes_are_those_that_accelerated_layers_take() -> None:
    for training in (False, True):
        model = mlp().train(training)
        if not training:
            model.to(torch.bfloat16)
        said = advise(model, 16, backend="reference")["0"]
        layer = model[0]
        accelerate_(model, "reference")
        held = [layer.weight, *layer.derived_tensors] if training else layer.packed_weight.tensors
        assert sum(one.nbytes for one in held) == said.sparse_bytes, training


def test_a_stored_grid_is_taken_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisor, "stored_grids", lambda: {"NVIDIA Test": synthetic()})
    assert advise(mlp(), 1024).source == "predicted"
    assert advise(mlp(), 16, backend="reference", dtype=torch.float32).source == "measured"
    half = advise(mlp(), 1024, dtype=torch.float16)
    assert half.source == "exact" and "there are no stored times for float16" in half.note
    with pytest.raises(ValueError, match="measured in bfloat16, not in float16"):
        advise(mlp(), 1024, dtype=torch.float16, grid=synthetic())


def test_layers_outside_of_the_grid_are_not_known() -> None:
    advice = advise(mlp(), 10, grid=synthetic())
    assert advice["0"].convert is None and "1024 x 512 at 10 tokens is outside of the sizes measured" in advice["0"].reason


def test_the_fastest_backend_wins_and_equal_shapes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fake(shape, tokens, dtype, device, backend, *, training, both_ways):  # type: ignore[no-untyped-def]
        measured.append((shape, backend, both_ways))
        factor = {"cusparselt": 0.8, "cutlass": 0.7 if shape[0] > 600 else 1.2}[backend]
        return Timing(Pass(1.0, 2.0, 5), Pass(factor, 2 * factor, 4))

    monkeypatch.setattr(advisor, "measure_linear", fake)
    monkeypatch.setattr(advisor, "_candidates", lambda *_: ["cusparselt", "cutlass"])
    model = nn.Sequential(mlp(), mlp(), mlp("2:4"))
    advice = advise(model, 256, device="cpu")
    assert [advice[name].backend for name in ("0.0", "0.2", "1.0", "2.0")] == ["cutlass", "cusparselt", "cutlass", "cutlass"]
    assert len(measured) == 8, "two shapes, with and without a sparse gradient, by two backends"
    assert advice["0.2"].reason == "1.25x faster"


def test_failures_while_measuring_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(shape, *_, **__):  # type: ignore[no-untyped-def]
        raise (
            torch.OutOfMemoryError("CUDA out of memory.\nmore") if shape[0] == 1024 else RuntimeError("CUDA error: not supported")
        )

    monkeypatch.setattr(advisor, "measure_linear", full)
    monkeypatch.setattr(advisor, "_candidates", lambda *_: ["cusparselt"])
    advice = advise(mlp(), 256)
    assert advice["0"].convert is False and advice["0"].reason == "out of memory while measuring: CUDA out of memory."
    assert advice["2"].reason == "cusparselt fails on 512 x 1024 at 256 tokens: CUDA error: not supported"


def test_reasons_against_a_layer_whatever_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisor, "_candidates", lambda *_: ["cutlass"])
    monkeypatch.setattr(advisor, "measure_linear", lambda *_, **__: Timing(Pass(1.0, 1.0), Pass(0.5, 0.5)))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 64))
    prune_(model, "2:4-T", exclude="4")
    advice = advise(model, 64)
    assert advice["0"].convert is True
    assert "cutlass packs matrices whose rows are a multiple of 32" in advice["1"].reason
    assert "dense: prune it to 2:4-T first" in advice["4"].reason and advice["4"].sparse_bytes == advice["4"].dense_bytes
    assert {one.name for one in advice.left_dense} == {"2", "3"}
    wide = advise(model, 64, pattern="8:16-T")
    assert all("8:16-T does not run on sparse tensor cores" in one.reason for one in wide.layers)
    assert all(one.convert for one in advise(model, 64, pattern="2:4", include=["0", "4"]).layers)


def test_wrong_arguments() -> None:
    for tokens in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="expected the number of rows"):
            advise_shapes([], tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no CUDA device here"):
        advise_shapes([], 8, device="cuda")


def test_a_model_in_sparse_training_is_judged_by_its_masks() -> None:
    model = mlp(None)
    sparsify_(model, "2:4-T", patterns={"2": "2:4"})
    shapes, left = layer_shapes(model)
    assert [(one.name, one.both_ways, one.reason) for one in shapes] == [("0", True, ""), ("2", False, "")] and not left
    static = mlp(None)
    sparsify_(static, "2:4-T", mode="static")
    assert all(one.both_ways and not one.reason for one in layer_shapes(static)[0])


# ---- measuring


@pytest.mark.parametrize("training", [True, False])
def test_measuring_runs_what_it_says(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from bisparse.accelerate import timing as measure

    runs = []
    honest = measure._timed

    def seen(forward, upstream, device):  # type: ignore[no-untyped-def]
        times = honest(forward, upstream, device)
        runs.append((times, upstream is not None))
        return times

    monkeypatch.setattr(measure, "_timed", seen)
    timing = measure_linear((64, 96), 32, torch.bfloat16, CPU, "reference", training=training, rounds=5)
    assert len(runs) == 2 * (3 + 5) and all(backward == training for _, backward in runs)
    assert timing.dense.forward_ms > 0 and (timing.sparse.backward_ms > 0) == training and math.isfinite(timing.speedup)
    assert timing.dense.peak_bytes is None
    dense, sparse = ([times[0] for times, _ in runs[6 + side : 16 : 2]] for side in (0, 1))
    assert timing.dense.forward_ms == sorted(dense)[2] and timing.sparse.forward_ms == sorted(sparse)[2], "medians, taking turns"


def test_clocks_and_memory_are_those_of_the_device_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from bisparse.accelerate import timing as measure

    current, recorded = [0], []

    @contextmanager
    def chosen(device):  # type: ignore[no-untyped-def]
        current.append(device.index)
        yield
        current.pop()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            recorded.append(current[-1])

        def elapsed_time(self, other: object) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: device.index)
    monkeypatch.setattr(measure, "_contender", lambda *how: lambda: measure._timed(lambda: torch.ones(1), None, how[3]))
    timing = measure_linear((64, 64), 8, torch.bfloat16, torch.device("cuda", 1), "cusparselt", training=False)
    assert timing.dense.forward_ms == 1.0 and set(recorded) == {1} and current == [0]


def test_the_mask_that_is_measured_with_is_full() -> None:
    mask = random_mask(64, 96, CPU)
    assert verify(mask, "2:4-T") and float(mask.float().mean()) == 0.5
    tiles = mask.view(16, 4, 24, 4).transpose(1, 2).flatten(0, 1)
    assert len({tuple(tile.flatten().tolist()) for tile in tiles}) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make test-gpu` on a machine that has one")
def test_on_a_gpu_layers_are_measured_and_the_winners_converted() -> None:
    model = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 64)).to("cuda", torch.bfloat16)
    prune_(model, "2:4-T")
    advice = advise(model, 16384)
    assert advice.source == "measured" and all(one.timing is not None for one in advice.layers)
    assert all(one.timing.dense.peak_bytes for one in advice.layers)
    report = accelerate_(model, advice=advice)
    assert {one.name for one in report.layers} == {one.name for one in advice.layers if one.convert}


def test_layouts_make_layers_of_parameters_whose_class_does_not_tell() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight * 0.5, self.bias)

    model = nn.Sequential(nn.Linear(64, 64), Scaled(64, 64))
    assert [one.name for one in layer_shapes(model, "2:4")[0]] == ["0"]
    shapes, left = layer_shapes(model, "2:4", layouts={"1": "linear"})
    assert {one.name for one in shapes} | {one.name for one in left} == {"0", "1"}
    assert not any("does not compute" in one.reason for one in left)
    with pytest.raises(ValueError, match="no layer"):
        layer_shapes(model, layouts={"7": "linear"})
    with pytest.raises(ValueError, match="expected a mapping"):
        advise(model, 8, layouts="linear")
