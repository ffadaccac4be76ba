"""Sparse training in Lightning: one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bisparse.training.distill import Distillation
from bisparse.training.integrations.states import joined_state, load_joined, set_run_length
from bisparse.training.sparsity import Sparsity

__all__ = ["SparsityCallback"]


class SparsityCallback(Callback):  # type: ignore[misc]
    """Attaches to the Trainer's optimizers, logs the masks' metrics, and saves the state in Lightning's checkpoints.

    ::

        sparsity = bisparse.sparsify_(module, "4:8-T")
        trainer = lightning.Trainer(..., callbacks=[SparsityCallback(sparsity)])
        trainer.fit(module, data)
        bisparse.finalize_(module)

    Args:
        distill: a teacher, whose distances are added to the loss that ``training_step`` returns. Its student is the module, or
            the submodule of it, that ``training_step`` calls once.
    """

    def __init__(self, sparsity: Sparsity, *, distill: Distillation | None = None) -> None:
        self.sparsity, self.distill = sparsity, distill
        self._logged = -1.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers, once Lightning has built them and restored a checkpoint."""
        if self.distill is not None:
            self._check_teachable(pl_module)
        self.sparsity.detach()
        total = trainer.estimated_stepping_batches
        set_run_length(self.sparsity, int(total) if 0 < total < float("inf") else None, trainer.global_step)
        self.sparsity.attach(*trainer.optimizers)
        if self.distill is not None:
            self._teach(pl_module, self.distill)

    def _check_teachable(self, pl_module: Any) -> None:
        assert self.distill is not None
        if not pl_module.automatic_optimization:
            raise ValueError("distill= needs automatic optimization: in a training_step of your own call Distillation.loss there")
        if not any(module is self.distill.student for module in pl_module.modules()):
            raise ValueError("the student of distill= is no part of the LightningModule that is trained")

    @staticmethod
    def _teach(pl_module: Any, distill: Distillation) -> None:
        """Add the distances to the teacher to what `training_step` returns."""
        given = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            distill.reset()
            result = given(*args, **kwargs)
            if isinstance(result, Tensor):
                return distill.loss(result)
            if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
                return {**result, "loss": distill.loss(result["loss"])}
            return result  # None: Lightning skips this batch

        pl_module.training_step = training_step

    def _stop(self, pl_module: Any) -> None:
        self.sparsity.detach()
        if self.distill is not None:
            vars(pl_module).pop("training_step", None)
            self.distill.reset()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what a measured refresh did, once."""
        if self.distill is not None:
            pl_module.log_dict({f"distill/{name}": part for name, part in self.distill.terms.items()})
        figures = self.sparsity.metrics()
        if figures and self._logged != figures["sparsity/step"]:
            self._logged = figures["sparsity/step"]
            pl_module.log_dict({name: number for name, number in figures.items() if name.count("/") == 1})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop following the optimizers."""
        self._stop(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop following the optimizers of a run that failed."""
        self._stop(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return joined_state(self.sparsity, self.distill)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        load_joined(state_dict, self.sparsity, self.distill)
