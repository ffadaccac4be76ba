"""Sparse training in Lightning: one callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from bisparse.training.sparsity import Sparsity

__all__ = ["SparsityCallback"]


class SparsityCallback(Callback):  # type: ignore[misc]
    """Attaches to the Trainer's optimizers, logs the masks' metrics, and saves the state in Lightning's checkpoints.

    ::

        sparsity = bisparse.sparsify_(module, "4:8-T")
        trainer = lightning.Trainer(..., callbacks=[SparsityCallback(sparsity)])
        trainer.fit(module, data)
        bisparse.finalize_(module)
    """

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity
        self._logged = -1.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers, once Lightning has built them and restored a checkpoint."""
        self.sparsity.detach()
        total = trainer.estimated_stepping_batches
        if self.sparsity.steps is None and 0 < total < float("inf"):
            self.sparsity.steps = int(total)
        self.sparsity.attach(*trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what a measured refresh did, once."""
        figures = self.sparsity.metrics()
        if figures and self._logged != figures["sparsity/step"]:
            self._logged = figures["sparsity/step"]
            pl_module.log_dict({name: number for name, number in figures.items() if name.count("/") == 1})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop following the optimizers."""
        self.sparsity.detach()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return self.sparsity.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self.sparsity.load_state_dict(state_dict)
