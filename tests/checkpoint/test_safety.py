"""Bad input and sudden death: a clear error that names the file, and an output that is absent or whole."""

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import State, snapshot, write_folder, write_shards
from safetensors.torch import load_file, save_file

import bisparse
from bisparse.apart import check_apart
from bisparse.checkpoint import (
    CheckpointError,
    load_masks,
    prune_checkpoint,
    read_sidecar,
    record_evaluation,
    to_dense,
    verify_checkpoint,
)
from bisparse.checkpoint import atomic_folder as output
from bisparse.report import write_report
from forked import in_child

posix = pytest.mark.skipif(sys.platform == "win32", reason="fork and signals")


def only(folder: Path, *names: str) -> None:
    """Nothing but these stands in a folder: no target, no temporary folder."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


# ---- bad input


def damaged(folder: Path, how: str) -> None:
    """Damage a folder's weights."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    match how:
        case "truncated":
            path.write_bytes(data[:-5])
        case "only a header":
            path.write_bytes(data[: 8 + header])
        case "too long":
            path.write_bytes(data + b"12345")
        case "empty":
            path.write_bytes(b"")
        case "noise":
            path.write_bytes(bytes(range(256)) * 9)
        case "a huge header":
            path.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
        case "wrong shape":
            path.write_bytes(data.replace(b'"shape":[40,16]', b'"shape":[41,16]'))
        case "no such dtype":
            path.write_bytes(data.replace(b'"BF16"', b'"BF17"'))
        case "an error page":
            path.write_text("<html>404 Not Found</html>")
        case "a pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 90868376\n")
        case "missing":
            path.unlink()


@pytest.mark.parametrize(
    "how",
    ["truncated", "only a header", "too long", "empty", "noise", "a huge header", "wrong shape", "no such dtype", "an error page",
     "a pointer", "missing"],
)  # fmt: skip
def test_damaged_safetensors(folder: Path, tmp_path: Path, how: str) -> None:
    damaged(folder, how)
    for job in (lambda: prune_checkpoint(folder, tmp_path / "out", "2:4"), lambda: verify_checkpoint(folder, "2:4")):
        with pytest.raises(CheckpointError) as caught:
            job()
        assert str(folder) in str(caught.value) and "; " in str(caught.value), "file and remedy"
        assert "\n" not in str(caught.value)
    only(tmp_path, "model")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "50%"])
def test_weights_that_are_no_numbers(
    folder: Path, state: State, tmp_path: Path, small_bands: Callable[[], None], bad: float, pattern: str
) -> None:
    small_bands()
    state["layers.0.up.weight"][33, 7] = bad
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor layers\.0\.up\.weight .*\(33, 7\), is -?(nan|inf).*--exclude"
    ):
        prune_checkpoint(folder, tmp_path / "out", pattern)
    only(tmp_path, "model")
    prune_checkpoint(folder, tmp_path / "out", pattern, exclude="*.up")  # the remedy works


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "50%", "4:8-seq"])
@pytest.mark.parametrize("number", [1e308, 1e305])
def test_weights_whose_sum_is_beyond_float64(
    tmp_path: Path, small_bands: Callable[[], None], number: float, pattern: str
) -> None:
    """In one band, and in the sum over bands alone."""
    small_bands()
    (tmp_path / "model").mkdir()
    save_file({"up.weight": torch.full((64, 64), number, dtype=torch.float64)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor up\.weight holds weights whose sum exceeds float64.*--exclude"):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", pattern)
    only(tmp_path, "model")


@pytest.mark.parametrize("number", [1e50, float("nan"), float("inf")])
def test_weights_that_cannot_be_drawn_leave_a_sidecar_that_can_be_read(number: float, tmp_path: Path) -> None:
    weight = torch.full((32, 32), number, dtype=torch.float64)
    weight[:, ::2] = 0
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(32, 32, dtype=torch.float64)})
    model.load_state_dict({"up.weight": weight, "up.bias": torch.zeros(32)})
    bisparse.save(model, tmp_path / "model", "2:4", include=["up"])
    if number == 1e50:
        prune_checkpoint(tmp_path / "model", tmp_path / "out", "1:4")
    for folder in tmp_path.iterdir():
        assert verify_checkpoint(folder)
        sidecar = read_sidecar(folder)
        assert sidecar is not None and sidecar.samples == ()


@pytest.mark.parametrize("bad", [Path("text.txt"), float("nan"), {1, 2}])
def test_a_provenance_that_cannot_be_written_is_refused_before_the_work(
    bad: object, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bisparse.prune_(model := torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)), "2:4", include="*")
    bisparse.save(model, tmp_path / "saved", "2:4", include="*")
    for module in ("prune", "save_load"):
        monkeypatch.setattr(f"bisparse.checkpoint.{module}.output_folder", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match="provenance: expected JSON values"):
        prune_checkpoint(folder, tmp_path / "out", "2:4", provenance={"data": bad})
    with pytest.raises(ValueError, match="provenance: expected JSON values"):
        bisparse.save(model, tmp_path / "out", "2:4", include="*", provenance={"data": bad})
    with pytest.raises(ValueError, match="figures: expected JSON values"):
        record_evaluation(tmp_path / "saved", [{"kind": "perplexity", "perplexity": bad}])


@pytest.mark.parametrize("names", [("pytorch_model-1.bin", "model-1.pt"), ("bisparse-masks.bin", "model-2.bin")])
def test_weights_that_would_be_written_over_another_file_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for number, name in enumerate(names):
        torch.save({f"layers.{number}.weight": torch.randn(16, 16)}, tmp_path / "model" / name)
    index = {"weight_map": {f"layers.{number}.weight": name for number, name in enumerate(names)}}
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"would be written as (model-1|bisparse-masks)\.safetensors.*rename"):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", "2:4")
    only(tmp_path, "model")


def test_nan_where_nothing_is_pruned_is_no_business_of_ours(folder: Path, state: State, tmp_path: Path) -> None:
    state["embed_tokens.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors")
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    written = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"]
    assert written[3].isnan().all()


class Evil:
    """Running it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(os.environ["EVIL"])),)


def torch_file(path: Path, how: str) -> None:
    """A file that ends in .pt and is no state dict."""
    match how:
        case "a pickle that runs code":
            path.write_bytes(pickle.dumps({"a.weight": Evil()}))
        case "a torch file that runs code":
            torch.save({"a.weight": Evil()}, path)
        case "a list":
            torch.save([torch.zeros(3)], path)
        case "no tensors":
            torch.save({"epoch": 3}, path)
        case "text":
            path.write_text("hello")
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            torch.save({"a.weight": torch.randn(64, 64)}, path)
            path.write_bytes(path.read_bytes()[:-3000])
        case "legacy, truncated":
            torch.save({"a.weight": torch.randn(64, 64)}, path, _use_new_zipfile_serialization=False)
            path.write_bytes(path.read_bytes()[:-3000])
        case "sparse":
            torch.save({"a.weight": torch.eye(8).to_sparse_csr()}, path)
        case "complex":
            torch.save({"a.weight": torch.zeros(8, 8, dtype=torch.complex128)}, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "how",
    ["a pickle that runs code", "a torch file that runs code", "a list", "no tensors", "text", "empty",
     "truncated", "legacy, truncated", "sparse", "complex"],
)  # fmt: skip
def test_torch_files_that_are_no_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    torch_file(tmp_path / "weights.pt", how)
    with pytest.raises(CheckpointError) as caught:
        prune_checkpoint(tmp_path / "weights.pt", tmp_path / "out", "2:4")
    assert "weights.pt" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    only(tmp_path, "weights.pt")


def test_every_damaged_byte_of_a_torch_file_is_an_error_or_harmless(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"a.weight": weight}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    for place in range(0, len(data), 41):
        (tmp_path / "weights.pt").write_bytes(data[:place] + bytes(8) + data[place + 8 :])
        try:
            prune_checkpoint(tmp_path / "weights.pt", tmp_path / "out", "2:4", overwrite=True)
        except (CheckpointError, ValueError) as error:
            assert isinstance(error, CheckpointError), error


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    states: list[State] = [{"a.weight": torch.randn(8, 8)}, {"b.weight": torch.randn(8, 8)}]
    source = write_shards(tmp_path / "model", states)
    index, second = source / "model.safetensors.index.json", source / "model-00002-of-00002.safetensors"
    content = json.loads(index.read_text())

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            prune_checkpoint(source, tmp_path / "out", "2:4")
        only(tmp_path, "model")

    save_file({"c.weight": torch.randn(8, 8)}, second)
    refused(r"00002-of-00002\.safetensors lacks b\.weight.*index\.json places there")
    save_file({"b.weight": torch.randn(8, 8), "c.weight": torch.randn(8, 8)}, second)
    refused(r"holds c\.weight.*does not place there")
    second.unlink()
    refused(r"lacks 1 of 2 shards: model-00002")
    index.write_text(json.dumps({**content, "weight_map": {"a.weight": "../elsewhere.safetensors"}}))
    refused("outside its folder")
    for impossible in ("x" * 5000, "a\0b", "", ".."):
        index.write_text(json.dumps({**content, "weight_map": {"a.weight": impossible}}))
        refused("lacks 1 of 1 shards")
    index.write_text("{")
    refused(r"index\.json cannot be read as JSON")
    index.write_text("{}")
    refused("weight_map")
    index.unlink()
    (source / "extra.safetensors").write_bytes((source / "model-00001-of-00002.safetensors").read_bytes())
    refused("several weight files and no index")


def test_a_folder_without_weights_and_a_path_without_anything(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        prune_checkpoint(tmp_path / "empty", tmp_path / "out", "2:4")
    with pytest.raises(CheckpointError, match="does not exist"):
        prune_checkpoint(tmp_path / "nothing", tmp_path / "out", "2:4")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is JSON, not weights; name the folder"):
        prune_checkpoint(tmp_path / "empty" / "config.json", tmp_path / "out", "2:4")
    only(tmp_path, "empty")


def test_nothing_to_prune_is_an_error_that_says_why(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {"lm_head.weight": torch.randn(8, 8), "norm.weight": torch.randn(8)})
    with pytest.raises(CheckpointError, match=r"no layer to prune \(lm_head: output head.*--include"):
        prune_checkpoint(source, tmp_path / "out", "2:4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a bisparse sidecar"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "pattern"),
    ],
)
def test_sidecars_that_are_not_ours(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    (tmp_path / "out" / "bisparse.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(tmp_path / "out")


def test_masks_that_are_not_ours(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a masks file"):
        load_masks(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="bisparse-masks"):
        load_masks(folder)


# ---- targets


def test_an_existing_target_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"exists already.*--overwrite"):
        prune_checkpoint(folder, tmp_path / "out", "2:4")
    with pytest.raises(CheckpointError, match="not written by bisparse"):
        prune_checkpoint(folder, tmp_path / "out", "2:4", overwrite=True)
    assert snapshot(tmp_path / "out") == {"thesis.txt": b"years of work"}
    only(tmp_path, "model", "out")


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_what_bisparse_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    (tmp_path / "out" / "old").write_text("old")
    prune_checkpoint(folder, tmp_path / "out", "4:8-T", overwrite=True)
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and sidecar.report.pattern == "4:8-T"
    assert not (tmp_path / "out" / "old").exists()
    only(tmp_path, "model", "out")


@pytest.mark.parametrize("target", ["model", "model/inside", "."])
def test_source_and_target_stand_apart(folder: Path, tmp_path: Path, target: str) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="source"):
        prune_checkpoint(folder, tmp_path / target, "2:4", overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.fixture
def named_twice(tmp_path: Path) -> Path:
    """A place with an input folder, further names of it, and an input whose files are links, as in a cache."""
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "weights").write_text("weights")
    (source / "sub" / "text").write_text("text")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "sub_link").symlink_to(source / "sub")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a1").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "weights").symlink_to("../blobs/a1")
    (tmp_path / "copies").mkdir()
    os.link(source / "sub" / "text", tmp_path / "copies" / "text")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "text").write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "target", "how"),
    [
        ("in", "in", "is the source"),
        ("in", "in/../in/.", "is the source"),
        ("in", "link", "is the source"),
        ("link", "in", "is the source"),
        ("up/in", "in", "is the source"),
        ("in", "in/new", "is inside the source"),
        ("in", "link/new/deeper", "is inside the source"),
        ("link", "in/new", "is inside the source"),
        ("in", "sub_link/new", "is inside the source"),
        ("in/sub", "link", "contains the source"),
        ("sub_link", "in", "contains the source"),
        ("in/weights", "link", "contains the source"),
        ("in", ".", "contains the source"),
        ("in", "up", "contains the source"),
        ("snapshot", "blobs", "share a file"),
        ("snapshot/weights", "blobs", "contains the source"),
        ("in", "copies", "share a file"),
        ("in", "copies/text", "share a file"),
        ("in/sub/text", "copies/text", "is the source"),
        ("in/sub/text", "copies", "share a file"),
    ],
)
def test_an_output_never_overlaps_an_input_whatever_their_names(named_twice: Path, source: str, target: str, how: str) -> None:
    before = snapshot(named_twice)
    with pytest.raises(CheckpointError, match=how):
        check_apart(f"{named_twice}/{target}", {"source": f"{named_twice}/{source}"})
    assert snapshot(named_twice) == before


@pytest.mark.parametrize(
    ("source", "target"),
    [("in", "in2"), ("in", "apart"), ("in", "new/in"), ("in/sub", "in/new"), ("in/weights", "in/new"), ("snapshot", "blobs/new")],
)
def test_an_output_beside_its_input_is_fine(named_twice: Path, source: str, target: str) -> None:
    check_apart(named_twice / target, {"source": named_twice / source, "other": None})


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(CheckpointError, match="file"):
        prune_checkpoint(folder, tmp_path / "file" / "out", "2:4")
    only(tmp_path, "file", "model")


def test_an_output_that_cannot_be_written_goes_by_the_name_that_its_user_gave(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(path: Path, **_: object) -> None:
        if path != tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.mkdtemp", lambda **where: refused(where["dir"] / where["prefix"]))
        for job in (output.check_writable, lambda target: prune_checkpoint(folder, target, "2:4")):
            with pytest.raises(CheckpointError, match=r"^out could not be written: permission denied"):
                job(Path("out"))
    with monkeypatch.context() as patched:
        patched.setattr(output, "_fsync", refused)
        with pytest.raises(CheckpointError, match=r"^out/\S+ could not be written: permission denied"):
            prune_checkpoint(folder, Path("out"), "2:4")
    with monkeypatch.context() as patched:
        patched.setattr("zlib.crc32", lambda *_: random.random())
        with pytest.raises(CheckpointError, match=r"^out/model\.safetensors: tensor \S+ was not read back"):
            prune_checkpoint(folder, Path("out"), "2:4")


def test_folders_of_the_users_are_never_taken_for_leftovers(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    prune_checkpoint(folder, target, "1:4")
    # Names that earlier versions, and this one, give to what is hidden; one holds a mark for another target.
    names = (".out.previous", ".out.bisparse-backup", ".out.bisparse-0a1b2c3d", ".out.bisparse-", ".out.bisparse-x.bisparse-7")
    for name in names:
        (tmp_path / name / "output").mkdir(parents=True)
        (tmp_path / name / "previous").mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / names[-1] / output.MARK).write_text(output._mark(tmp_path / "out.bisparse-x"))
    (tmp_path / ".out.bisparse-link").symlink_to(names[-1])
    (tmp_path / ".out.bisparse-file").write_text("no folder")
    own = {name: snapshot(tmp_path / name) for name in names}
    with pytest.raises(CheckpointError, match="exists already"):
        prune_checkpoint(folder, target, "2:4")
    prune_checkpoint(folder, target, "2:4", overwrite=True)
    prune_checkpoint(folder, tmp_path / "new", "2:4")
    assert {name: snapshot(tmp_path / name) for name in names} == own
    only(tmp_path, "model", "out", "new", ".out.bisparse-link", ".out.bisparse-file", *names)


@posix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_refused_run_deletes_nothing_and_the_next_one_clears_up(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert in_child(lambda: prune_checkpoint(folder, target, "2:4", progress=lambda *_: die())) == -signal.SIGKILL
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    assert any(output.MARK in name for name in before)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError):
            prune_checkpoint(folder, target, "2:4", overwrite=overwrite)
        assert snapshot(tmp_path) == before
    (target / "thesis.txt").unlink()
    prune_checkpoint(folder, target, "2:4", overwrite=True)
    only(tmp_path, "model", "out")


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"schema_version": 1}', '{"editor": {"theme": "dark"}}', "[" * 100_000])
def test_a_folder_is_not_ours_because_of_a_files_name(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bisparse.json").write_text(content)
    with pytest.raises(CheckpointError, match="not written by bisparse"):
        prune_checkpoint(folder, tmp_path / "out", "2:4", overwrite=True)
    assert snapshot(tmp_path / "out") == {"bisparse.json": content.encode()}
    only(tmp_path, "model", "out")


# ---- permissions


def modes(folder: Path) -> dict[str, int]:
    """The permissions of every file and folder below a folder."""
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}


@posix
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_nothing_is_written_with_wider_permissions_than_its_source(tmp_path: Path, kind: str) -> None:
    states: list[State] = [{"a.weight": torch.randn(8, 8)}, {"b.weight": torch.randn(8, 8)}]
    source = write_shards(tmp_path / "model", states, kind=kind)
    first, second = sorted(path.name for path in source.glob(f"*.{kind}"))
    (source / "config.json").write_text('{"sparsity_config": {}}')  # is written, not copied
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    (source / "token").symlink_to(tmp_path / "token")
    (source / "private").mkdir(mode=0o700)
    (source / "private" / "run.sh").write_text("true")
    given = {first: 0o600, second: 0o640, "config.json": 0o600, "private/run.sh": 0o755, ".": 0o750}
    for name, mode in given.items():
        (source / name).chmod(mode)
    prune_checkpoint(source, tmp_path / "out", "2:4")
    found = modes(tmp_path / "out")
    written = [name for name in sorted(found) if name.startswith("model-")]
    assert [found.pop(name) for name in written] == [0o600, 0o640]
    assert found == {
        ".": 0o750, "config.json": 0o600, "token": 0o600, "private": 0o700, "private/run.sh": 0o755,
        "bisparse.json": 0o600, "bisparse-masks.safetensors": 0o600, "model.safetensors.index.json": 0o600,
            "README.md": 0o600,
    }  # fmt: skip


@posix
def test_a_single_files_permissions_are_kept_too(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(8, 8)}, tmp_path / "weights.pt")
    (tmp_path / "weights.pt").chmod(0o440)
    prune_checkpoint(tmp_path / "weights.pt", tmp_path / "out", "2:4")
    found = modes(tmp_path / "out")
    assert found.pop(".") == 0o777 & ~umask() and set(found.values()) == {0o440}


def umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


# ---- a full disk


def test_too_little_room_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"/out needs .* MB, the disk has 0\.0 MB free"):
        prune_checkpoint(folder, tmp_path / "out", "2:4")
    only(tmp_path, "model")


@posix
@pytest.mark.parametrize("limit", [100, 3000, 6000, 8500])
def test_a_disk_that_fills_up_on_the_way(folder: Path, tmp_path: Path, limit: int) -> None:
    # A limit on the size of files is what a full disk is to `write`: it fails half-way. Only a child may limit itself.
    def job() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match=r"disk is full.*nothing was left half written"):
            prune_checkpoint(folder, tmp_path / "out", "2:4")

    assert in_child(job) == 0
    only(tmp_path, "model")


def test_no_space_left_on_device(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "_flush", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        prune_checkpoint(folder, tmp_path / "out", "2:4")
    only(tmp_path, "model")


# ---- sudden death


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@posix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_the_output_is_absent_or_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target = tmp_path / "out"
    if overwrite:
        prune_checkpoint(folder, target, "1:4")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    prune_checkpoint(folder, tmp_path / "trial", "4:8-T", progress=count)
    steps = calls
    for last in range(steps % 2, steps + 1, 2):
        done = 0

        def killed(*_: object, last: int = last) -> None:
            nonlocal done
            done += 1
            if done > last:
                die()

        def job(killed: Callable[..., None] = killed) -> None:
            prune_checkpoint(folder, target, "4:8-T", overwrite=overwrite, progress=killed)

        code = in_child(job)
        assert code == (0 if last == steps else -signal.SIGKILL)
        found = read_sidecar(target) if target.exists() else None
        expected = "4:8-T" if last == steps else ("1:4" if overwrite else None)
        assert (found.report.pattern if found else None) == expected
        assert target.exists() == (expected is not None)
        if expected:
            assert verify_checkpoint(target) and load_file(target / "model.safetensors")
    only(tmp_path, "model", "out", "trial")


@posix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("function", "call", "exchange"),
    [("_flush", 1, True), ("_publish", 1, True), ("_exchange", 1, True), ("os.rename", 1, False), ("os.rename", 2, False)],
)
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_the_name_is_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, after: bool, exchange: bool
) -> None:
    target = tmp_path / "out"
    prune_checkpoint(folder, target, "1:4")
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    owner, name = (os, "rename") if function == "os.rename" else (output, function)
    original = getattr(owner, name)
    calls = 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return original(*arguments)
        result = original(*arguments) if after else None
        die()
        return result

    def job() -> None:
        setattr(owner, name, killed)
        prune_checkpoint(folder, target, "4:8-T", overwrite=True)

    assert in_child(job) == -signal.SIGKILL
    # The next run finds the old output or the new one, whole, and clears away the rest.
    prune_checkpoint(folder, tmp_path / "other", "2:4")
    with pytest.raises(CheckpointError, match="exists already"):
        prune_checkpoint(folder, target, "2:4")
    found = read_sidecar(target)
    assert found is not None and found.report.pattern in ("1:4", "4:8-T") and verify_checkpoint(target)
    prune_checkpoint(folder, target, "2:4", overwrite=True)
    only(tmp_path, "model", "other", "out")


@posix
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", {f"l{i}.weight": torch.randn(256, 256) for i in range(40)})
    target = tmp_path / "out"
    start = time.perf_counter()
    prune_checkpoint(source, target, "1:4")
    duration = time.perf_counter() - start
    moments = random.Random(0)
    patterns = ["2:4", "1:4"]
    for number in range(60):
        child = os.fork()
        if child == 0:
            prune_checkpoint(source, target, patterns[number % 2], overwrite=True)
            os._exit(0)
        time.sleep(moments.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sidecar = read_sidecar(target)
        assert sidecar is not None and sidecar.report.pattern in patterns and verify_checkpoint(target)
    prune_checkpoint(source, target, "2:4", overwrite=True)
    only(tmp_path, "model", "out")


@posix
def test_every_file_and_folder_is_on_disk_before_it_gets_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(output, "_fsync", lambda path: steps.append(path.name))
    original = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (steps.append("renamed"), original(*names)))
    prune_checkpoint(folder, tmp_path / "out", "2:4")
    written = {path.name for path in (tmp_path / "out").rglob("*")}
    assert written <= set(steps[: steps.index("renamed")]), "a file that is named but not on disk is lost with the power"
    assert steps[-1] == tmp_path.name, "the name itself is on disk too"


def test_interrupted_by_the_user_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(folder, tmp_path / "out", "2:4", progress=interrupt)
    only(tmp_path, "model")


@posix
def test_two_runs_with_one_target_do_not_mix(folder: Path, tmp_path: Path) -> None:
    def second(what: str, done: int, total: int) -> None:
        if done == 0:
            with pytest.raises(CheckpointError, match="being written by another process"):
                prune_checkpoint(folder, tmp_path / "out", "4:8-T")

    prune_checkpoint(folder, tmp_path / "out", "2:4", progress=second)
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and sidecar.report.pattern == "2:4"
    only(tmp_path, "model", "out")


def test_names_with_odd_characters(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out [4:8] *ü"
    prune_checkpoint(folder, target, "2:4")
    prune_checkpoint(folder, target, "4:8-T", overwrite=True)
    assert verify_checkpoint(target)
    only(tmp_path, "model", target.name)


@posix
def test_bytes_that_change_on_disk_are_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bisparse.checkpoint import prune as module

    original = module.read_back

    def corrupted(path: Path, *arguments: Any) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        original(path, *arguments)

    monkeypatch.setattr(module, "read_back", corrupted)
    with pytest.raises(CheckpointError, match="not read back as it was written"):
        prune_checkpoint(folder, tmp_path / "out", "2:4")
    only(tmp_path, "model")


# ---- memory

SCRIPT = """
import resource, sys
import torch
from bisparse.checkpoint import prune_checkpoint, verify_checkpoint
torch.set_num_threads(1)
source, small, target, pattern = sys.argv[1:]
prune_checkpoint(small, target + "-small", pattern)  # imports and compiled kernels do not count
verify_checkpoint(target + "-small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prune_checkpoint(source, target, pattern)
verify_checkpoint(target)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
CONSTANT = 200 << 20
"""Bytes that a job may take whatever the checkpoint's size: the bands at work."""


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "kind"), [("2:4", "safetensors"), ("4:8-T", "pt"), ("50%", "safetensors")])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, pattern: str, kind: str) -> None:
    # 1.4 GB in all; the largest tensor has 128 MB.
    state = {f"layers.{i}.weight": torch.randn(8192, 8192 if i == 0 else 4096).bfloat16() for i in range(20)}
    largest = max(tensor.numel() * tensor.itemsize for tensor in state.values())
    whole = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    if kind == "pt":
        torch.save(state, tmp_path / "model.pt")
        source = tmp_path / "model.pt"
    else:
        source = write_folder(tmp_path / "model", state)
    del state
    small = write_folder(tmp_path / "small", {"a.weight": torch.randn(1024, 1024)})
    command = [sys.executable, "-c", SCRIPT, str(source), str(small), str(tmp_path / "out"), pattern]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    assert peak < 3 * largest + CONSTANT < whole / 2
    assert bisparse.verify_checkpoint(tmp_path / "out")


NOBODY = 65534


@posix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ["new", "deeper", "overwrite", "dense", "save"])
def test_a_folder_that_may_not_be_written_is_refused_and_nothing_is_left(state: State, what: str) -> None:
    """By the rights of the system; of the superuser, who may write anywhere, in a process of another user."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_folder(place / "model", state)
        prune_checkpoint(place / "model", place / "locked" / "old", "2:4")
        layer = torch.nn.Sequential(torch.nn.Linear(16, 16))
        report = bisparse.prune_(layer, "2:4")
        bisparse.save(layer, place / "saved", report=report)  # imports what another user may not read
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        jobs: dict[str, Callable[[], object]] = {
            "new": lambda: prune_checkpoint(place / "model", place / "locked" / "out", "1:4"),
            "deeper": lambda: prune_checkpoint(place / "model", place / "locked" / "a" / "out", "1:4"),
            "overwrite": lambda: prune_checkpoint(place / "model", place / "locked" / "old", "1:4", overwrite=True),
            "dense": lambda: to_dense(place / "model", place / "locked" / "out"),
            "save": lambda: bisparse.save(layer, place / "locked" / "out", report=report),
        }

        def refused() -> None:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            with pytest.raises(
                CheckpointError, match=r"could not be written: permission denied; choose a folder that you may write"
            ):
                jobs[what]()
            only(place / "locked", "old")

        before = snapshot(place / "locked")
        assert in_child(refused) == 0 and snapshot(place / "locked") == before
        for path in (place, *place.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("name", ["x" * 300, "\u00e4" * 200])
def test_a_name_that_is_too_long_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    prune_checkpoint(folder, tmp_path / "pruned", "2:4")
    with pytest.raises(CheckpointError, match="too long"):
        prune_checkpoint(folder, tmp_path / name, "2:4")
    with pytest.raises(CheckpointError, match="too long"):
        write_report(tmp_path / "pruned", tmp_path / name)


def test_progress_that_is_no_function_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="progress must be a function"):
        bisparse.prune_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", "2:4", progress=torch.ones(2))  # type: ignore[arg-type]
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]


@posix
def test_what_a_kill_leaves_before_the_mark_or_while_it_is_removed_is_cleared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.bisparse-0a1b2c3d").mkdir()  # killed before the mark was written
    prune_checkpoint(folder, tmp_path / "out", "1:4")
    only(tmp_path, "model", "out")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # killed while the folder of a run is removed
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(folder, tmp_path / "out", "2:4", overwrite=True)
    assert len(list(tmp_path.glob(".out.bisparse-*"))) == 1
    prune_checkpoint(folder, tmp_path / "out", "2:4", overwrite=True)
    only(tmp_path, "model", "out")


@posix
def test_a_new_folder_that_another_run_took_for_a_leftover_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made = tempfile.mkdtemp, []

    def taken(*args: object, **kwargs: object) -> str:
        made.append(original(*args, **kwargs))  # type: ignore[call-overload]
        if len(made) < 3:
            os.rmdir(made[-1])
        return made[-1]

    monkeypatch.setattr("tempfile.mkdtemp", taken)
    prune_checkpoint(folder, tmp_path / "out", "1:4")
    assert len(made) >= 3
    only(tmp_path, "model", "out")
