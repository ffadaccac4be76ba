"""Files are what their content says, whatever they are called; what is not read is refused by its right name."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_folder
from safetensors.torch import load_file, save, save_file

import bisparse
from bisparse.checkpoint import CheckpointError, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source

STATE = {"a.weight": torch.arange(64.0).view(8, 8)}


def zipped(*names: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return target.getvalue()


def npz() -> bytes:
    target = io.BytesIO()
    np.savez(target, a=np.zeros((4, 4)))
    return target.getvalue()


def npy() -> bytes:
    target = io.BytesIO()
    np.save(target, np.zeros((4, 4)))
    return target.getvalue()


def tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"), io.BytesIO(b""))
    return target.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "LFS pointer": (lambda: POINTER, r"is a Git LFS pointer.*git lfs pull"),
    "empty": (lambda: b"", "is empty; fetch"),
    "web page": (lambda: b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a web page, not weights"),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file.*gguf_file"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "npz": (npz, r"is a NumPy archive \(\.npz\)"),
    "npy": (npy, r"is a NumPy array \(\.npy\)"),
    "raw pickle": (lambda: pickle.dumps({"a": [1.0]}), "is a Python pickle that torch.save did not write"),
    "pickle of protocol 2": (lambda: pickle.dumps({"a": [1.0]}, 2), "is a Python pickle"),
    "Keras": (lambda: zipped("metadata.json", "config.json", "model.weights.h5"), r"is a Keras archive"),
    "torch.export": (lambda: zipped("m/archive_format", "m/version", "m/models/model.json"), r"is a torch\.export archive"),
    "another zip": (lambda: zipped("readme.txt", "weights/a.bin"), "is a zip archive that torch.save did not write"),
    "tar": (tar, "is a tar archive"),
    "gzip": (lambda: gzip.compress(b"weights"), "is a compressed file"),
    "TFLite": (lambda: b"\x1c\x00\x00\x00TFL3" + bytes(100), "is a TensorFlow Lite model"),
    "SavedModel": (lambda: b"\x08\x01\x12\x20" + bytes(32), "is a TensorFlow SavedModel"),
    "Core ML": (lambda: b"\x08\x07\x12\x02ab\xa2\x1f\x10" + bytes(16), "is a Core ML model"),
    "another protobuf": (lambda: b"\x08\x07\x12\x02ab\x4a\x10" + bytes(16), "is in an unknown format"),
    "msgpack": (lambda: b"\x82\xa7encoder\x81" + bytes(100), r"is a msgpack file \(Flax\)"),
    "JSON": (lambda: b'  {"a": 1}', "is JSON, not weights"),
    "noise": (lambda: bytes(range(255, 128, -1)), "is in an unknown format"),
}


@pytest.mark.parametrize("name", ["weights.bin", "model.pt", "weights", "w.pth.tar"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_format_that_is_not_read_is_refused_by_its_name_whatever_the_file_is_called(
    tmp_path: Path, kind: str, name: str
) -> None:
    content, message = REFUSED[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(CheckpointError, match=message) as caught:
        verify_checkpoint(tmp_path / name, "2:4")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["LFS pointer", "GGUF", "HDF5", "npz", "raw pickle", "msgpack", "torch.export"])
def test_a_folder_with_weights_that_are_not_read_says_what_they_are(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED[kind]
    (tmp_path / "weights.data").write_bytes(content())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("a b c")
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(tmp_path, "2:4")
    (tmp_path / "weights.data").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(tmp_path, "2:4")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin", "w.ckpt", "w.pkl", "w.pth.tar", "w", "w.onnx", "w.v2"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy"])
def test_a_format_that_is_read_is_read_whatever_the_file_is_called(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        path.write_bytes(save(STATE))
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "torch")
    assert torch.equal(open_source(path).tensors["a.weight"].read().view(8, 8), STATE["a.weight"])
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / name)
    assert open_source(tmp_path / "folder").tensors.keys() == STATE.keys()


def test_safetensors_are_recognised_at_every_length_of_their_header(tmp_path: Path) -> None:
    path, seen = tmp_path / "w", set()
    for length in range(0, 70_000, 8 * 37):
        path.write_bytes(save(STATE, {"a": "x" * length}))
        seen |= {path.read_bytes()[0]}
        assert open_source(path).tensors.keys() == STATE.keys(), length
    assert seen == set(range(0, 256, 8)), "every first byte that a header can have"


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"), ("pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"), ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("best.pth.tar", "best.safetensors"), ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("model_v1.5", "model_v1.5.safetensors"),
    ],
)  # fmt: skip
def test_written_names_follow_the_source(tmp_path: Path, source: str, written: str) -> None:
    path = tmp_path / "model" / source
    path.parent.mkdir()
    save_file(STATE, path) if source.endswith(".safetensors") else torch.save(STATE, path)
    for number, given in enumerate((path, path.parent)):
        prune_checkpoint(given, tmp_path / f"out{number}", "2:4")
        assert load_file(tmp_path / f"out{number}" / written).keys() == STATE.keys()


@pytest.mark.parametrize("stem", ["pytorch_model", "diffusion_pytorch_model"])
def test_written_names_of_shards_and_their_index_follow_the_source(tmp_path: Path, stem: str) -> None:
    source = tmp_path / "model"
    source.mkdir()
    weight_map = {}
    for number, name in enumerate(("a.weight", "b.weight"), start=1):
        weight_map[name] = f"{stem}-{number:05}-of-00002.bin"
        torch.save({name: torch.randn(8, 8)}, source / weight_map[name])
    (source / f"{stem}.bin.index.json").write_text(f'{{"weight_map": {str(weight_map).replace(chr(39), chr(34))}}}')
    prune_checkpoint(source, tmp_path / "out", "2:4")
    new = stem.removeprefix("pytorch_") if stem == "pytorch_model" else stem
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {f"{new}-00001-of-00002.safetensors", f"{new}-00002-of-00002.safetensors", f"{new}.safetensors.index.json"}
    assert expected < names
    assert bisparse.verify_checkpoint(tmp_path / "out")


def test_what_training_leaves_beside_the_weights_is_not_taken_for_them(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / "weights.pt")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"state": torch.ones(4, 4)}, tmp_path / name)
    assert open_source(tmp_path).tensors.keys() == STATE.keys()


def test_a_key_is_for_torch_files(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", STATE)
    with pytest.raises(ValueError, match=r"key='model' \(--key\).*safetensors"):
        open_source(source, "model")
