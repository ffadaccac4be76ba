"""JSON from outside is validated before anything uses it: the sidecar and the masks' shapes."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bisparse.checkpoint import CheckpointError, load_masks, prune_checkpoint, read_sidecar, verify_checkpoint
from bisparse.report import write_report

Change = Callable[[dict[str, Any]], object]


def set_in_layer(key: str, value: object) -> Change:
    return lambda document: document["layers"][0].__setitem__(key, value)


def set_in_layout(key: str, value: object) -> Change:
    return lambda document: document["layers"][0]["layout"].__setitem__(key, value)


def set_in_sample(key: str, value: object) -> Change:
    return lambda document: document["samples"][0].__setitem__(key, value)


def set_history(*points: dict[str, object] | object) -> Change:
    return lambda document: document.update(history=list(points))


def point(**changed: object) -> dict[str, object]:
    return {"step": 4, "flip_rate": 0.5, "retained": 0.5, "changed_tiles": 0.5} | changed


CHANGES: dict[str, Change] = {
    **{f"parts {value!r}": set_in_layout("parts", value) for value in (0, -4, 3, 1.5, "1", None, 10**400)},
    **{f"groups {value!r}": set_in_layout("groups", value) for value in (0, -1, True, [])},
    **{f"kind {value!r}": set_in_layout("kind", value) for value in ("wood", 5, "packed3", None)},
    "a kind of more dimensions": set_in_layout("kind", "conv"),
    **{f"retained {value!r}": set_in_layer("retained", value) for value in (1e300, -0.5, 1.5, "1", [])},
    **{f"density {value!r}": set_in_layer("density", value) for value in (2, -1, None)},
    **{f"gap {value!r}": set_in_layer("gap", value) for value in (1e9, -1e-3)},
    **{f"time_s {value!r}": set_in_layer("time_s", value) for value in (-1, 1e300)},
    **{
        f"shape {value!r}": set_in_layer("shape", value)
        for value in ([], [-8, 8], [8, "8"], 8, [1 << 40, 1 << 40], [8] * 9, None)
    },
    **{f"pattern {value!r}": set_in_layer("pattern", value) for value in ("9:8", "", 24, "2:4\x1b[31m")},
    **{f"name {value!r}": set_in_layer("name", value) for value in (5, None, {})},
    **{
        f"sample weights {str(value)[:9]}": set_in_sample("weights", value)
        for value in (5, [[1.0]], [["x"]], [[1e300] * 16] * 16)
    },
    **{f"sample kept {str(value)[:9]}": set_in_sample("kept", value) for value in ([[2] * 16] * 16, [[1]], None)},
    **{f"sample row {value!r}": set_in_sample("row", value) for value in (-1, 0.5)},
    **{f"history step {value!r}": set_history(point(step=value)) for value in (-1, 1.5, "4", None, True, 1 << 53)},
    **{
        f"history {name} {value!r}": set_history(point(**{name: value}))
        for name in ("flip_rate", "retained", "changed_tiles")
        for value in (-1e-9, 1.1, 1e300, "0.5", None, [])
    },
    "history in another order": set_history(point(step=8), point(step=4)),
    "history of one step twice": set_history(point(), point()),
    "history without rates": set_history({"step": 4}),
    "history of numbers": set_history(0.5),
    "history a number": lambda document: document.update(history=5),
    "more points than a run records": set_history(*(point(step=step) for step in range(1001))),
    "very many points": lambda document: document.update(history=[{}] * 10**5),
    "a layer twice": lambda document: document["layers"].append(document["layers"][0]),
    "fewer parameters than none": lambda document: document.update(parameters=-1),
    "layers a number": lambda document: document.update(layers=5),
    "a layer a number": lambda document: document.update(layers=[5]),
    "notes a text": lambda document: document.update(notes="note"),
    "versions a list": lambda document: document.update(versions=[1]),
    "patterns of numbers": lambda document: document.update(patterns={"a": 5}),
    "no pattern": lambda document: document.pop("pattern"),
    "left_dense of texts": lambda document: document.update(left_dense=["a"]),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    save_file({"up.weight": torch.randn(16, 24), "norm.weight": torch.randn(16)}, folder / "model.safetensors")
    prune_checkpoint(folder / "model.safetensors", folder / "out", "2:4")
    return folder / "out"


@pytest.mark.parametrize("change", CHANGES)
def test_a_sidecar_of_other_types_or_values_is_an_error_at_once(pruned: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(pruned, tmp_path / "out")
    path = tmp_path / "out" / "bisparse.json"
    document = json.loads(path.read_text())
    CHANGES[change](document)
    path.write_text(json.dumps(document))
    start = time.perf_counter()
    for read in (read_sidecar, verify_checkpoint, lambda place: write_report(place, tmp_path / "page.html")):
        with pytest.raises(CheckpointError, match=r"bisparse\.json is not valid") as caught:
            read(tmp_path / "out")
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"schema_version": 1, "a": NaN}', '{"a": -Infinity}', '{"schema_version": 1, "a": 1e999}', "nothing", "",
     '{"a": ' * 5000 + "1" + "}" * 5000, '{"a": ' + "9" * 10_000 + "}"],
)  # fmt: skip
def test_json_that_python_reads_and_others_do_not_is_an_error(folder: Path, tmp_path: Path, text: str) -> None:
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    (tmp_path / "out" / "bisparse.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bisparse\.json (cannot be read as JSON|is not a bisparse sidecar)"):
        verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("depth", [150, 900, 5000])
def test_a_configuration_nested_too_deeply_is_an_error(folder: Path, tmp_path: Path, depth: int) -> None:
    (folder / "config.json").write_text('{"part": ' * depth + "{}" + "}" * depth, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json.*nested too deeply"):
        prune_checkpoint(folder, tmp_path / "out", "2:4")
    assert not (tmp_path / "out").exists()


def test_what_was_written_is_read_back_the_same(folder: Path, tmp_path: Path) -> None:
    prune_checkpoint(folder, tmp_path / "out", "4:8-T", remainder="pad")
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None
    assert json.loads(sidecar.to_json()) == json.loads((tmp_path / "out" / "bisparse.json").read_text())


def test_a_sidecar_without_a_history_as_earlier_ones_is_read(folder: Path, tmp_path: Path) -> None:
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    path = tmp_path / "out" / "bisparse.json"
    document = json.loads(path.read_text())
    assert document.pop("history") == []
    path.write_text(json.dumps(document))
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and sidecar.report.history == ()
    assert "How the masks settled" not in write_report(tmp_path / "out", tmp_path / "page.html").read_text()


@pytest.mark.parametrize("shapes", ["5", "[]", '{"layers.0.up.weight": 5}', '{"layers.0.up.weight": [40, "16"]}', "[" * 9999,
                                    '{"layers.0.up.weight": [-40, -16]}', '{"layers.0.up.weight": [NaN]}'])  # fmt: skip
def test_shapes_of_masks_of_other_types_are_an_error(folder: Path, tmp_path: Path, shapes: str) -> None:
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    path = tmp_path / "out" / "bisparse-masks.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, {**metadata, "shapes": shapes})
    with pytest.raises(CheckpointError, match=r"bisparse-masks\.safetensors"):
        load_masks(tmp_path / "out")
