"""Run a recipe: train, evaluate, checkpoint, and go on after a kill as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bisparse.apart import check_apart
from bisparse.checkpoint import SIDECAR
from bisparse.checkpoint.save_load import sidecar_of
from bisparse.solvers import Exact, Greedy, MinCostFlow, Sinkhorn, Solver, TwoApproximation
from bisparse.training.decay import FixedDecay
from bisparse.training.finalize import finalize_, plain_state_dict
from bisparse.training.parameter_groups import parameter_groups
from bisparse.training.parametrizations import masked_parameters
from bisparse.training.rng_state import random_state, restore_random_state
from bisparse.training.schedule import Schedule
from bisparse.training.sparsify import sparsify_
from bisparse.training.sparsity import Sparsity
from recipes.data import Data, load_data
from recipes.models import build_model
from recipes.recipe import Recipe, RecipeError

__all__ = ["Outcome", "RunError", "run_recipe"]

CHECKPOINT, METRICS, OUTCOME, RECIPE, WEIGHTS = "checkpoint.pt", "metrics.jsonl", "outcome.json", "recipe.json", "weights.pt"
SOLVERS: dict[str, Callable[[], Solver]] = {
    "exact": Exact, "greedy": Greedy, "sinkhorn": Sinkhorn, "two-approximation": TwoApproximation, "flow": MinCostFlow,
}  # fmt: skip
TEST_BATCH = 500


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    name: str
    steps: int
    test_loss: float
    test_accuracy: float
    """Share of labels right; of bytes right, for text."""
    density: float
    """Share of the sparse layers' weights that are not zero; 1 for a dense run."""
    flip_rate: float
    """Of the last measured refresh; 0 without one."""
    train_seconds: float
    """In forward, backward and optimizer, masks included."""
    search_seconds: float
    """Of those, in finding masks."""
    refreshes: int
    data: str
    curve: list[dict[str, float]] = field(default_factory=list)
    """step, train loss, and at evaluations test loss and accuracy, at refreshes the flip rate."""


def run_recipe(recipe: Recipe, folder: str | Path, *, progress: bool = True, stop_after: int | None = None) -> Outcome | None:
    """Train as the recipe says. A folder that holds a checkpoint of the same recipe is gone on with; a finished one is read.

    Writes to the folder: recipe.json, metrics.jsonl while it runs, checkpoint.pt, and at the end outcome.json, weights.pt (the
    plain state_dict), bisparse.json if they are sparse.

    Args:
        progress: show a bar with the live loss and flip rate.
        stop_after: stop after this many optimizer steps in this call, as a kill would, and return None.

    Raises:
        CheckpointError: the folder is, contains or is inside the run to start from or the data.
        RecipeError: the folder holds the run of another recipe, or other things and no run, or the data are not there.
        RunError: the loss, a gradient or a weight is no finite number any more, or the checkpoint or the outcome is damaged.
    """
    folder = Path(folder)
    data = Path(recipe.data.folder).expanduser() if recipe.data.folder else None
    check_apart(folder, {"run to start from": recipe.model.start or None, "data": data})
    own = json.dumps(recipe.as_dict(), indent=2, sort_keys=True)
    if folder.exists() and not (folder.is_dir() and ((folder / RECIPE).exists() or not any(folder.iterdir()))):
        raise RecipeError(
            f"{folder} exists already and holds no run (no {RECIPE}): choose a folder that is new, empty, or a run's"
        )
    if (folder / RECIPE).exists() and (folder / RECIPE).read_text(encoding="utf-8") != own:
        raise RecipeError(f"{folder} holds the run of another recipe: choose another folder, or delete this one")
    if (folder / OUTCOME).exists():
        return _outcome(folder / OUTCOME)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.training.threads)
    try:
        run = _Run(recipe, folder)
        # Only now: a recipe that cannot be run leaves no folder that the corrected one would be refused for.
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RECIPE, own.encode())
        run.load()
        return run.go(progress, stop_after)
    finally:
        torch.set_num_threads(threads)


def _outcome(path: Path) -> Outcome:
    """What a finished run has written."""
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path} is damaged ({error}): delete it, and the same command goes on from the last checkpoint"
        ) from error


class _Run:
    """The state of one run; all of it is in its checkpoint."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.data: Data = load_data(recipe.data)
        how = recipe.training
        self.batches = len(self.data.train_inputs) // how.batch
        if self.batches == 0:
            raise RecipeError(f"[training] batch = {how.batch} is more than the {len(self.data.train_inputs)} training inputs")
        self.total = how.steps or max(1, math.ceil(how.epochs * self.batches / how.accumulate))
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model, context=recipe.data.context)
        with torch.no_grad():
            self.model(self.data.train_inputs[:2])  # lazy layers take their shape
        if recipe.model.start:
            self._start_from(Path(recipe.model.start) / WEIGHTS)
        if recipe.model.kind == "resnet20":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sparsity = self._sparsify()
        decayed = [one for one in self.model.parameters() if one.ndim > 1]
        others = [one for one in self.model.parameters() if one.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if self.sparsity is not None and recipe.sparsity is not None and recipe.sparsity.scale_lr:
            groups = parameter_groups(self.model, self.sparsity, how.lr, weight_decay=how.weight_decay)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=how.lr, momentum=how.momentum, nesterov=how.momentum > 0)
            if how.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.95))
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate)
        if self.sparsity is not None:
            self.sparsity.attach(self.optimizer)
        self.step, self.seconds, self.searched = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []

    def _start_from(self, path: Path) -> None:
        if not path.exists():
            raise RecipeError(f"[model] start: {path} is not there; a run writes it at its end")
        try:
            self.model.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            raise RecipeError(f"[model] start: {path} does not hold the weights of this model: {error}") from error

    def _sparsify(self) -> Sparsity | None:
        how = self.recipe.sparsity
        if how is None:
            return None
        static = how.mode == "static"
        schedule = Schedule.shares(
            self.total,
            dense_first=how.dense_first,
            frozen_from=how.frozen_from if how.frozen_from < 1 else None,
            dense_last=how.dense_last,
        )
        decay = how.total_decay or FixedDecay(how.decay or 0.0)
        return sparsify_(
            self.model,
            how.pattern,
            mode=how.mode,  # type: ignore[arg-type]
            **({"rule": how.rule} if how.rule else {"method": how.method, "decay": decay}),  # type: ignore[arg-type]
            solver=SOLVERS[how.solver](),
            refresh=how.refresh,
            steps=self.total,
            schedule=Schedule() if static else schedule,
            patterns=how.patterns,
            mvue=how.mvue,
            measure_every=max(1, how.refresh) if how.measure else 0,
        )

    def _learning_rate(self, step: int) -> float:
        warm = max(1, round(self.recipe.training.warmup * self.total))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.total - warm)))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def go(self, progress: bool, stop_after: int | None) -> Outcome | None:
        how = self.recipe.training
        pause = 0.1 if sys.stderr.isatty() else 10.0  # a log file takes a line each time
        bar = tqdm(
            total=self.total, initial=self.step, desc=self.recipe.name, disable=not progress, unit="step", mininterval=pause
        )
        shown: dict[str, str] = {}
        with bar, open(self.folder / METRICS, "a", encoding="utf-8") as metrics:
            started_at = self.step
            for inputs, labels in self._batches():
                row = self._train_step(inputs, labels)
                if how.evaluate_every and self.step % how.evaluate_every == 0 and self.step < self.total:
                    row |= self._evaluate()
                self.curve.append(row)
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                shown |= {name: f"{number:.4g}" for name, number in row.items() if name != "step"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if self.step % how.checkpoint_every == 0 and self.step < self.total:
                    self._save()
                if stop_after is not None and self.step - started_at >= stop_after and self.step < self.total:
                    return None
        return self._finish()

    def _batches(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """For each optimizer step left, its batches. The order depends on the seed, the epoch and the step alone."""
        how = self.recipe.training
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        while self.step < self.total:
            inputs, labels = [], []
            for one in range(self.step * how.accumulate, (self.step + 1) * how.accumulate):
                if one // self.batches != epoch:
                    epoch = one // self.batches
                    generator = torch.Generator().manual_seed(1000003 * self.recipe.seed + epoch)
                    order = torch.randperm(len(self.data.train_inputs), generator=generator)
                place = one % self.batches * how.batch
                chosen = order[place : place + how.batch]
                inputs.append(self.data.train_inputs[chosen])
                labels.append(self.data.train_labels[chosen])
            yield inputs, labels

    def _train_step(self, inputs: list[Tensor], labels: list[Tensor]) -> dict[str, float]:
        start = time.perf_counter()
        searched = self.sparsity.search_seconds if self.sparsity is not None else 0.0
        refreshes = self.sparsity.refreshes if self.sparsity is not None else 0
        self.model.train()
        total = 0.0
        for batch, right in zip(inputs, labels, strict=True):
            try:
                scores = self._predict(batch)
            except ValueError as error:  # of the sparsity: weights that are not finite
                raise RunError(f"{self.recipe.name}: {error}") from error
            loss = nn.functional.cross_entropy(scores, right) / len(inputs)
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise RunError(f"{self.recipe.name}: the loss is {total} at step {self.step + 1}: lower [training] lr, or set clip")
        if self.recipe.training.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.training.clip)
        try:
            self.optimizer.step()
        except ValueError as error:  # of the sparsity: gradients that are not finite
            raise RunError(f"{self.recipe.name}: {error}") from error
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - start
        row = {"step": float(self.step), "loss": total}
        if self.sparsity is not None:
            self.searched += self.sparsity.search_seconds - searched
            if self.sparsity.refreshes != refreshes and self.sparsity.changes:
                figures = self.sparsity.metrics()
                row |= {
                    name: figures[f"sparsity/{name}"] for name in ("flip_rate", "retained", "stale_distance", "changed_tiles")
                }
        return row

    def _predict(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.training.precision == "bfloat16"):
            scores: Tensor = self.model(inputs)
        return scores.float()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        loss, right, count = 0.0, 0, 0
        for start in range(0, len(self.data.test_inputs), TEST_BATCH):
            labels = self.data.test_labels[start : start + TEST_BATCH]
            scores = self._predict(self.data.test_inputs[start : start + TEST_BATCH])
            loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
            right += int((scores.argmax(1) == labels).sum())
            count += labels.numel()
        return {"test_loss": loss / count, "test_accuracy": right / count}

    # -- files ---------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sparsity": self.sparsity.state_dict() if self.sparsity is not None else None,
            "random": random_state(),
            "step": self.step,
            "seconds": self.seconds,
            "searched": self.searched,
            "curve": self.curve,
        }
        temporary = self.folder / f"{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / CHECKPOINT)

    def load(self) -> None:
        """Go on where a run of this folder was, if there was one."""
        path = self.folder / CHECKPOINT
        if path.exists():
            try:
                state = torch.load(path, weights_only=True)
            except Exception as error:
                raise RunError(f"{path} is damaged ({error!r}): delete it to begin this run anew") from error
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.sparsity is not None:
                self.sparsity.load_state_dict(state["sparsity"])
            restore_random_state(state["random"])
            self.step, self.seconds, self.searched = state["step"], state["seconds"], state["searched"]
            self.curve = state["curve"]
        # What a killed run logged after its checkpoint is trained, and logged, again.
        self._write_metrics()

    def _write_metrics(self) -> None:
        _write(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in self.curve).encode())

    def _finish(self) -> Outcome:
        last = self._evaluate()
        self.curve[-1] |= last
        self._write_metrics()
        flips = [row["flip_rate"] for row in self.curve if "flip_rate" in row]
        density, refreshes, dense_end = 1.0, 0, False
        if self.sparsity is not None:
            refreshes = self.sparsity.refreshes
            dense_end = any(own.dense for _, _, _, own in masked_parameters(self.model))
            finalize_(self.model)
            weights = [layer.weight for layer in self.sparsity.layers]
            density = sum(int((one != 0).sum()) for one in weights) / sum(one.numel() for one in weights)
            if not dense_end:
                assert density < 1 or all(layer.pattern.density == 1 for layer in self.sparsity.layers)
        state = plain_state_dict(self.model)
        torch.save(state, self.folder / f"{WEIGHTS}.tmp")
        os.replace(self.folder / f"{WEIGHTS}.tmp", self.folder / WEIGHTS)
        if self.sparsity is not None and not dense_end:
            _write(self.folder / SIDECAR, sidecar_of(self.sparsity.report(), state, self.recipe.name).to_json().encode())
        outcome = Outcome(
            name=self.recipe.name,
            steps=self.step,
            test_loss=last["test_loss"],
            test_accuracy=last["test_accuracy"],
            density=density,
            flip_rate=flips[-1] if flips else 0.0,
            train_seconds=self.seconds,
            search_seconds=self.searched,
            refreshes=refreshes,
            data=self.data.description,
            curve=self.curve,
        )
        _write(self.folder / OUTCOME, json.dumps(outcome.__dict__).encode())
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return outcome


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
