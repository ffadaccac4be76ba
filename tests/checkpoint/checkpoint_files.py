"""Checkpoints on disk, written by the safetensors library or by torch, never by bisparse."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


def write_folder(folder: Path, state: State, config: dict[str, object] | None = None) -> Path:
    """A checkpoint folder, as transformers saves one."""
    (folder / "sub").mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt", "author": "someone"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "architectures": ["LlamaModel"]}))
    (folder / "tokenizer.json").write_text('{"words": ["a", "ä"]}')
    (folder / "sub" / "pooling.json").write_text("{}")
    return folder


def write_shards(folder: Path, states: list[State], *, kind: str = "safetensors") -> Path:
    """A sharded checkpoint with its index."""
    folder.mkdir()
    weight_map = {}
    for number, state in enumerate(states, start=1):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        name = f"{stem}-{number:05}-of-{len(states):05}.{kind}"
        save_file(state, folder / name, metadata={"format": "pt"}) if kind == "safetensors" else torch.save(state, folder / name)
        weight_map |= dict.fromkeys(state, name)
    total = sum(tensor.numel() * tensor.itemsize for state in states for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps(index))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
