"""What is copied beside pruned weights: what belongs to the model, and never other copies of its weights."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_folder
from safetensors.torch import save

from bisparse.checkpoint import prune_checkpoint, read_sidecar

DENSE = {"a.weight": torch.randn(8, 8)}


def torch_bytes(**options: bool) -> bytes:
    target = io.BytesIO()
    torch.save(DENSE, target, **options)
    return target.getvalue()


def npz() -> bytes:
    target = io.BytesIO()
    np.savez(target, a=DENSE["a.weight"].numpy())
    return target.getvalue()


def torchscript() -> bytes:
    target = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(8, 8)), target)
    return target.getvalue()


def keras() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("model.weights.h5", b"x")
    return target.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_no_dense_weights_are_copied_whatever_they_are_called_and_wherever_they_are(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", DENSE)
    other = {
        "torch": torch_bytes(), "legacy": torch_bytes(_use_new_zipfile_serialization=False), "safetensors": save(DENSE),
        "jit": torchscript(), "npz": npz(), "keras": keras(), "pickle": pickle.dumps({"a": [1.0]}),
        "gguf": b"GGUF" + bytes(64), "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64), "raw": np.random.default_rng(0).bytes(4096),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
        "floats": DENSE["a.weight"].numpy().tobytes(),
    }  # fmt: skip
    for kind, content in other.items():
        for name in (f"{kind}.dat", f"{kind}.txt", f"consolidated.{kind}", kind):
            (source / name).write_bytes(content)
    for name in ("model.onnx", "model.onnx_data", "tf_model.h5", "x.msgpack", "x.jit", "x.ot", "x.mlmodel", "openvino.bin"):
        (source / name).write_bytes(b"text that could be weights")
    for folder in ("original", "checkpoint-500", "onnx", "nested/deep"):
        (source / folder).mkdir(parents=True)
        (source / folder / "notes.json").write_text("{}")
    (source / "original" / "consolidated.00.pth").write_bytes(other["torch"])
    (source / "checkpoint-500" / "optimizer.pt").write_bytes(other["torch"])
    (source / "onnx" / "decoder.onnx").write_bytes(b"x")
    (source / "nested" / "deep" / "weights").write_bytes(other["safetensors"])
    (source / "trainer_state.json").write_text("{}")
    report = prune_checkpoint(source, tmp_path / "out", "2:4")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ours = {"model.safetensors", "bisparse.json", "bisparse-masks.safetensors", "README.md"}
    assert written == ours | {"config.json", "tokenizer.json", "sub/pooling.json"}
    (listed,) = (note for note in report.notes if note.startswith("copied: "))
    assert set(listed.removeprefix("copied: ").split(", ")) == written - ours
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and listed in sidecar.report.notes
    assert any("not copied" in note and "original/" in note for note in report.notes)


def test_what_belongs_to_the_model_is_copied(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", DENSE)
    binary = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" + bytes(range(256))  # as sentencepiece writes it
    kept = {
        "tokenizer.model": binary, "spiece.model": binary, "README.md": "Ünïcödé".encode(), "LICENSE": b"MIT",
        "logo.png": b"\x89PNG\r\n\x1a\n\x00",
        "modeling_x.py": b"import torch\n", "merges.txt": ("é" * 5000).encode(), "chat_template.jinja": b"{{ x }}",
        "1_Pooling/config.json": b"{}",
    }  # fmt: skip
    for name, content in kept.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    prune_checkpoint(source, tmp_path / "out", "2:4")
    for name, content in kept.items():
        written = (tmp_path / "out" / name).read_bytes()
        assert content in written if name == "README.md" else written == content, name  # a section is added to that


def test_parts_that_modules_json_names_are_copied_dense_and_said_to_be(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", DENSE)
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "model.safetensors").write_bytes(save(DENSE))
    (source / "2_Dense" / "config.json").write_text("{}")
    (source / "other").mkdir()
    (source / "other" / "model.safetensors").write_bytes(save(DENSE))
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": 5}, "x"]))
    report = prune_checkpoint(source, tmp_path / "out", "2:4")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == save(DENSE)
    assert not (tmp_path / "out" / "other").exists()
    assert any("copied unchanged, with dense weights" in note and "2_Dense/model.safetensors" in note for note in report.notes)
