"""Sparse training in the transformers Trainer (4.57 and 5.x): one callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bisparse.atomic_file import atomic_file
from bisparse.training.finalize import plain_state_dict
from bisparse.training.parametrizations import masked_parameters, trained_parameter
from bisparse.training.sparsity import Sparsity
from bisparse.wrappers import unwrapped_model

__all__ = ["SparsityCallback"]

STATE = "sparsity.pt"
CHECKPOINT = "checkpoint"


def _add_plain_weights(model: nn.Module, folder: Path) -> None:
    """Add the weights as the forward pass sees them, under the plain model's names, to the files that the Trainer wrote."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    sharded = [name for name, _, parameter, _ in masked_parameters(model) if _is_sharded(model, name, parameter)]
    if sharded or not (weights.exists() or index.exists()):
        return  # another format, or weights that no rank holds whole
    trained = model.state_dict().keys()
    plain = {name: value.contiguous() for name, value in plain_state_dict(model).items() if name not in trained}
    if weights.exists():
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
        held = load_file(weights)
        with atomic_file(weights) as temporary:
            save_file(held | {name: value.cpu() for name, value in plain.items()}, temporary, metadata)
        return
    own = "model-plain.safetensors"
    with atomic_file(folder / own) as temporary:
        save_file({name: value.cpu() for name, value in plain.items()}, temporary, {"format": "pt"})
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] |= dict.fromkeys(plain, own)
    with atomic_file(index) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_sharded(model: nn.Module, name: str, parameter: str) -> bool:
    module = model.get_submodule(name.removesuffix(parameter).removesuffix("."))
    return isinstance(trained_parameter(module, parameter), DTensor)


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches to the Trainer's optimizer, logs the masks' metrics, and saves the state in the Trainer's checkpoint folders.

    ::

        sparsity = bisparse.sparsify_(model, "4:8-T", mode="static")
        trainer = Trainer(model=model, ..., callbacks=[SparsityCallback(sparsity)])
        trainer.train()
        bisparse.finalize_(model)
        model.save_pretrained(folder)
    """

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity
        self._logged = -1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Load the state from the checkpoint that the Trainer resumes from, if any, and attach to its optimizer."""
        if state.global_step > 0:
            path = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}" / STATE
            if not path.exists():
                raise FileNotFoundError(
                    f"the Trainer resumes at step {state.global_step}, but there is no {path}: resume from a checkpoint in "
                    "output_dir that was saved with SparsityCallback"
                )
            self.sparsity.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.sparsity.detach()
        self.sparsity.steps = self.sparsity.steps or state.max_steps
        self.sparsity.attach(loop["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Write the state into the checkpoint's folder, and plain weights of a dynamic run into its model.safetensors.

        With the plain weights next to those in training, `from_pretrained` loads the sparse model, and the Trainer can resume.
        """
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}"
            with atomic_file(folder / STATE) as temporary:
                torch.save(self.sparsity.state_dict(), temporary)
            if self.sparsity.mode == "dynamic" and (model := loop.get("model")) is not None:
                _add_plain_weights(unwrapped_model(model), folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **loop: Any) -> None:
        """Add the model-wide figures (flip rate, retained score, ...) to the Trainer's log and its history, once per measurement.

        Callbacks that report elsewhere see them if they come after this one.
        """
        figures = {name: number for name, number in self.sparsity.metrics().items() if name.count("/") == 1}
        if not figures or figures["sparsity/step"] == self._logged:
            return
        self._logged = figures["sparsity/step"]
        if logs is not None:
            logs |= figures
        if state.log_history:
            state.log_history[-1] |= figures

    def on_train_end(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Stop following the optimizer."""
        self.sparsity.detach()
