"""Sparse training in the transformers Trainer (4.57 and 5.x): one callback."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bisparse.atomic_file import atomic_file
from bisparse.errors import CheckpointError
from bisparse.training.distill import Distillation
from bisparse.training.finalize import plain_state_dict
from bisparse.training.integrations.states import joined_state, load_joined, set_run_length
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
        _write(held | {name: value.cpu() for name, value in plain.items()}, weights, metadata)
        return
    own = "model-plain.safetensors"
    _write({name: value.cpu() for name, value in plain.items()}, folder / own, {"format": "pt"})
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] |= dict.fromkeys(plain, own)
    with atomic_file(index) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise CheckpointError(path, f"could not be written ({error})", "check the path and the disk; it is as it was") from error


def _with_distances(distill: Distillation, module: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
    """The output of a training forward pass with the distances to the teacher added to its loss; others as they are."""
    if not module.training or not torch.is_grad_enabled():
        return None
    named = isinstance(output, Mapping)
    task = output.get("loss") if named else output[0] if isinstance(output, tuple) and output else None
    if not isinstance(task, Tensor) or task.ndim != 0:
        raise ValueError(
            "distill= is added to the loss that the model returns, and its output has none: pass labels, and leave out "
            "label_smoothing_factor and compute_loss_func (or call Distillation.loss in a compute_loss of your own)"
        )
    distances = distill.loss() * _share(module, kwargs)
    distill.terms["task"] = task.detach()
    total = distill.weights["task"] * task + distances
    if named:
        output["loss"] = total
        return output
    return (total, *output[1:])


def _share(module: Any, kwargs: dict[str, Any]) -> Tensor | float:
    """The fraction of the labels of all accumulated batches that is in this one; 1 where the Trainer averages the batches."""
    count, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels", kwargs.get("labels"))
    if count is None or not isinstance(labels, Tensor):
        return 1.0
    if "shift_labels" not in kwargs and str(getattr(module, "loss_type", "")).startswith("ForCausalLM"):
        labels = labels[..., 1:]  # as the Trainer counts them
    share: Tensor = labels.ne(-100).sum() / count
    return share


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

    Args:
        distill: a teacher, whose distances are added to the loss that the model returns. Its student is the model, or the part
            of it that returns the loss.
    """

    def __init__(self, sparsity: Sparsity, *, distill: Distillation | None = None) -> None:
        self.sparsity, self.distill = sparsity, distill
        self._logged = -1.0
        self._taught: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Load the state from the checkpoint that the Trainer resumes from, if any, and attach to its optimizer."""
        if state.global_step > 0:
            path = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}" / STATE
            if not path.exists():
                raise FileNotFoundError(
                    f"the Trainer resumes at step {state.global_step}, but there is no {path}: resume from a checkpoint in "
                    "output_dir that was saved with SparsityCallback"
                )
            load_joined(torch.load(path, map_location="cpu", weights_only=True), self.sparsity, self.distill)
        if self.distill is not None:
            self._teach(loop["model"], self.distill)
        self.sparsity.detach()
        set_run_length(self.sparsity, state.max_steps, state.global_step)
        self.sparsity.attach(loop["optimizer"])

    def _teach(self, model: nn.Module, distill: Distillation) -> None:
        if not any(module is distill.student for module in model.modules()):
            raise ValueError("the student of distill= is no part of the model that the Trainer trains")
        self._stop_teaching()

        @torch.compiler.disable
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return _with_distances(distill, module, kwargs, output)

        self._taught = distill.student.register_forward_hook(add, with_kwargs=True)

    def _stop_teaching(self) -> None:
        if self._taught is not None:
            self._taught.remove()
            self._taught = None

    def on_save(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Write the state into the checkpoint's folder, and plain weights of a dynamic run into its model.safetensors.

        With the plain weights next to those in training, `from_pretrained` loads the sparse model, and the Trainer can resume.
        """
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}"
            with atomic_file(folder / STATE) as temporary:
                state_file = io.BytesIO()  # writing to a full disk, torch.save may end the process
                torch.save(joined_state(self.sparsity, self.distill), state_file)
                temporary.write_bytes(state_file.getbuffer())
            if self.sparsity.mode == "dynamic" and (model := loop.get("model")) is not None:
                _add_plain_weights(unwrapped_model(model), folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **loop: Any) -> None:
        """Add the model-wide figures (flip rate, retained score, ...) to the Trainer's log and its history, once per measurement.

        Callbacks that report elsewhere see them if they come after this one.
        """
        if self.distill is not None and (logs is None or "loss" in logs):
            self._add(logs, state, self.distill.metrics())
        figures = {name: number for name, number in self.sparsity.metrics().items() if name.count("/") == 1}
        if not figures or figures["sparsity/step"] == self._logged:
            return
        self._logged = figures["sparsity/step"]
        self._add(logs, state, figures)

    @staticmethod
    def _add(logs: dict[str, float] | None, state: Any, figures: dict[str, float]) -> None:
        if logs is not None:
            logs |= figures
        if state.log_history:
            state.log_history[-1] |= figures

    def on_train_end(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Stop following the optimizer."""
        self.sparsity.detach()
        self._stop_teaching()
