"""CPU time of a training step: dense, with static masks, with dynamic masks; interleaved, one thread.

    python benchmarks/training/step_cost.py [--steps 60] [--models resnet20 gpt wide] [--pattern 4:8-T]

ResNet-20 (width 16, 128 images of 14 x 14, channels last, SGD), a small GPT (width 128, 4 layers, 4 x 128 tokens, AdamW), and
four layers of a language model's width (2048 x 2048, ReLU, 256 rows, fused AdamW).
Each round takes a step of every variant, in rotating order; the figure is the median over rounds of the step's CPU time, and of
its ratio to the dense step of the same round. A refresh takes place every 40 steps; its search is reported apart, as the mean
over all steps. Rows go to results/training-step.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.models import build_model
from recipes.recipe import ModelRecipe

from bisparse import sparsify_
from bisparse.training import FixedDecay
from record import RESULTS, Record

VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "static": {"mode": "static"},
    "dynamic": {"decay": FixedDecay(2e-4)},
    "dynamic, ste": {"method": "ste"},
}


def resnet20(seed: int) -> tuple[nn.Module, Callable[[nn.Module], torch.optim.Optimizer], torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = build_model(ModelRecipe("resnet20", width=16), context=0)
    inputs, labels = torch.randn(128, 1, 14, 14), torch.randint(0, 10, (128,))
    with torch.no_grad():
        model(inputs[:2])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, lambda one: torch.optim.SGD(one.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4), inputs, labels


def gpt(seed: int) -> tuple[nn.Module, Callable[[nn.Module], torch.optim.Optimizer], torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = build_model(ModelRecipe("gpt", width=128, layers=4, heads=4), context=128)
    ids = torch.randint(0, 256, (4, 129))
    return model, lambda one: torch.optim.AdamW(one.parameters(), lr=1e-4), ids[:, :-1], ids[:, 1:]


def wide(seed: int) -> tuple[nn.Module, Callable[[nn.Module], torch.optim.Optimizer], torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(one for _ in range(4) for one in (nn.Linear(2048, 2048), nn.ReLU())))
    inputs, labels = torch.randn(256, 2048), torch.randint(0, 2048, (256,))
    return model, lambda one: torch.optim.AdamW(one.parameters(), lr=1e-4, fused=True), inputs, labels


def gpt_fused(seed: int) -> tuple[nn.Module, Callable[[nn.Module], torch.optim.Optimizer], torch.Tensor, torch.Tensor]:
    model, _, inputs, labels = gpt(seed)
    return model, lambda one: torch.optim.AdamW(one.parameters(), lr=1e-4, fused=True), inputs, labels


MODELS = {"resnet20": resnet20, "gpt": gpt, "gpt, fused AdamW": gpt_fused, "wide": wide}


def stepper(kind: str, pattern: str, how: dict[str, Any] | None) -> tuple[Callable[[], None], Any]:
    model, optimizer_of, inputs, labels = MODELS[kind](0)
    sparsity = None if how is None else sparsify_(model, pattern, measure_every=0, **how)
    optimizer = optimizer_of(model)
    if sparsity is not None:
        sparsity.attach(optimizer)
    model.train()

    def step() -> None:
        output = model(inputs)
        loss = nn.functional.cross_entropy(output, labels)  # classes second, also for text
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, sparsity


def measure(kind: str, pattern: str, variants: list[str], rounds: int) -> dict[str, dict[str, float]]:
    steppers = {name: stepper(kind, pattern, VARIANTS[name]) for name in variants}
    for step, _ in steppers.values():
        for _ in range(3):
            step()
    searched = {name: 0.0 if sparsity is None else sparsity.search_seconds for name, (_, sparsity) in steppers.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        turn = number % len(variants)
        for name in variants[turn:] + variants[:turn]:
            start = time.process_time()
            steppers[name][0]()
            times[name].append(time.process_time() - start)
    figures = {}
    for name in variants:
        sparsity = steppers[name][1]
        ratios = [own / dense for own, dense in zip(times[name], times["dense"], strict=True)]
        search = 0.0 if sparsity is None else sparsity.search_seconds - searched[name]
        figures[name] = {
            "step_ms": round(1e3 * statistics.median(times[name]), 3),
            "over_dense": round(statistics.median(ratios) - 1, 4),
            "mean_step_ms": round(1e3 * statistics.mean(times[name]), 3),
            "search_ms_per_step": round(1e3 * search / rounds, 4),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--pattern", default="4:8-T")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--note", default="", help="kept in the rows, such as what changed")
    parser.add_argument("--results", type=Path, default=RESULTS / "training-step.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.results)
    for kind in options.models:
        variants = ["dense", *(name for name in options.variants if name != "dense")]
        for name, figures in measure(kind, options.pattern, variants, options.steps).items():
            key = {"study": "step", "model": kind, "pattern": options.pattern, "variant": name, "note": options.note}
            record.add(key, {"rounds": options.steps, **figures})
            print(kind, name, figures, flush=True)


if __name__ == "__main__":
    main()
