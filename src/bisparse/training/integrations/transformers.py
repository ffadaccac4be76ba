"""Sparse training in the transformers Trainer (4.57 and 5.x): one callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bisparse.atomic_file import atomic_file
from bisparse.training.sparsity import Sparsity

__all__ = ["SparsityCallback"]

STATE = "sparsity.pt"
CHECKPOINT = "checkpoint"


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Follows the Trainer's optimizer, logs the masks' figures, and keeps the state beside the Trainer's checkpoints.

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
        """Take up the state of the checkpoint that the Trainer resumes from, if any, and attach to its optimizer."""
        if state.global_step > 0:
            path = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}" / STATE
            if not path.exists():
                raise FileNotFoundError(
                    f"the Trainer resumes at step {state.global_step}, but there is no {path}: resume from a checkpoint in "
                    "output_dir that was saved with SparsityCallback"
                )
            self.sparsity.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.sparsity.detach()
        self.sparsity.attach(loop["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Write the state into the checkpoint's folder."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}"
            with atomic_file(folder / STATE) as temporary:
                torch.save(self.sparsity.state_dict(), temporary)

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
