"""Runs tasks of EleutherAI's lm-evaluation-harness, if installed (``pip install lm-eval``). It may download its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bisparse.wrappers import check_module

__all__ = ["TaskResults", "run_tasks"]


@dataclass(frozen=True)
class TaskResults:
    """The results of lm-eval: metrics per task, by lm-eval's names, such as ``"acc,none"``."""

    tasks: Mapping[str, Mapping[str, float]]
    version: str
    """Version of lm-eval."""
    limit: int | None = None
    """Maximum samples per task, if limited; figures of a limited run are not comparable with published ones."""
    shots: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The results as JSON values."""
        return {
            "kind": "lm-eval",
            "version": self.version,
            "limit": self.limit,
            "shots": dict(self.shots),
            "tasks": {name: dict(metrics) for name, metrics in self.tasks.items()},
        }

    @property
    def protocol(self) -> str:
        """The harness and the limit of samples, as text."""
        return f"lm-eval {self.version}{f', at most {self.limit} samples per task' if self.limit else ''}"

    def __str__(self) -> str:
        metrics = [f"{task}: {name} {value:.4f}" for task, own in self.tasks.items() for name, value in own.items()]
        return f"{'; '.join(metrics)} ({self.protocol})"


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 1
) -> TaskResults:
    """Run tasks of lm-eval on a transformers model.

    Args:
        tasks: lm-eval's task names, such as ``"arc_easy"``.
        limit: samples per task; by default all.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no tasks, or lm-eval returned no figures for them.
    """
    check_module(model)
    if not tasks:
        raise ValueError("name at least one task of lm-eval, such as arc_easy")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("tasks need lm-evaluation-harness; install it with: pip install lm-eval") from error
    held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: Mapping[str, Any] = lm_eval.simple_evaluate(model=held, tasks=list(tasks), limit=limit) or {}
    results = {
        task: {name: float(value) for name, value in metrics.items() if _is_figure(value)}
        for task, metrics in found.get("results", {}).items()
    }
    if not any(results.values()):
        raise ValueError(f"lm-eval returned no figures for {', '.join(tasks)}")
    shots = {task: shots for task, shots in found.get("n-shot", {}).items() if isinstance(shots, int)}
    return TaskResults(results, str(getattr(lm_eval, "__version__", "unknown")), limit, shots)


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
