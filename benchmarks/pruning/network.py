"""ResNet-20 on Fashion-MNIST: trained dense once and kept, and sparse ones trained from it a little, to convert."""

from __future__ import annotations

import copy
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from recipes.data import Data, load_data
from recipes.models import ResNet20
from recipes.recipe import DataRecipe
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from bisparse import prune_
from bisparse.pruning import reestimate_batch_norms_

EPOCHS, BATCH, RATE = 5, 128, 0.4


def fashion_mnist(folder: Path | None, train: int = 60_000, test: int = 10_000, side: int = 28) -> Data:
    return load_data(DataRecipe(kind="fashion-mnist", folder=str(folder or ""), train=train, test=test, side=side))


QUICK = (512, 512, 7)
"""Images and their side for runs that only show that the program works."""


def arguments(parser: ArgumentParser) -> None:
    """The arguments that choose data and training."""
    parser.add_argument("--cache", type=Path, required=True, help="where the trained networks are kept")
    parser.add_argument("--data", type=Path, help="Fashion-MNIST's idx.gz files")
    parser.add_argument("--side", type=int, default=28, help="of the images, in pixels; 14 takes a quarter of the time")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--tuning", type=int, default=60_000, help="images that a sparse network to convert is trained on")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of training and judging")
    parser.add_argument("--quick", action="store_true", help="512 small images, 1 epoch, 1 seed: does it run?")


def opened(options: Namespace) -> tuple[Data, Training, dict[str, int | str]]:
    """The data, how networks are trained on it, and the budget as columns of a row."""
    if options.quick:
        images, tests, side = QUICK
        budget = {"side": side, "test_images": tests, "epochs": 1, "tuning": images, "dtype": options.dtype}
        return fashion_mnist(options.data, *QUICK), Training(options.cache, 1, images, options.dtype), budget
    data = fashion_mnist(options.data, 60_000, options.test_images, options.side)
    budget = {
        "side": options.side, "test_images": options.test_images, "epochs": options.epochs, "tuning": options.tuning,
        "dtype": options.dtype,
    }  # fmt: skip
    return data, Training(options.cache, options.epochs, options.tuning, options.dtype), budget


def accuracy(model: nn.Module, data: Data, dtype: str, batch: int = 100) -> float:
    """Top-1 on the test images, in per cent, in the precision of training."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    right = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for images, labels in zip(data.test_inputs.split(batch), data.test_labels.split(batch), strict=True):
            right += int((model(images.contiguous(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    return 100 * right / len(data.test_labels)


@dataclass(frozen=True)
class Training:
    """How the networks to convert are trained."""

    cache: Path
    """Where they are kept: each is trained once."""
    epochs: int = EPOCHS
    tuning: int = 60_000
    """Images of the one epoch that a sparse network is trained after it was pruned from the dense one."""
    dtype: str = "bfloat16"


def trained(how: Training, data: Data, origin: str | None = None) -> nn.Module:
    """The dense network, or one pruned from it by magnitude and trained one epoch with its mask fixed; from the cache."""
    name = "dense" if origin is None else origin.replace(":", "of").replace("%", "percent")
    budget = f"{len(data.train_labels)}x{how.epochs}" + ("" if origin is None else f"+{how.tuning}")
    path = how.cache / f"resnet20-fashion{data.train_inputs.shape[-1]}-{name}-{budget}.pt"
    model = ResNet20()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    if origin is None:
        fit(model, data, how.epochs, RATE, how.dtype)
    else:
        model.load_state_dict(trained(how, data).state_dict())
        prune_(model, origin)
        reestimate_batch_norms_(model, list(data.train_inputs[:2000].split(200)))
        masks = {name: value != 0 for name, value in model.named_parameters() if value.ndim == 4}
        part = replace(data, train_inputs=data.train_inputs[: how.tuning], train_labels=data.train_labels[: how.tuning])
        fit(model, part, 1, RATE / 8, how.dtype, masks)
    how.cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def fit(model: nn.Module, data: Data, epochs: int, rate: float, dtype: str, masks: dict[str, Tensor] | None = None) -> None:
    """SGD with one cycle, random flips."""
    steps = len(data.train_labels) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    model.train()
    model.to(memory_format=torch.channels_last)
    parameters = dict(model.named_parameters())
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_labels))[: steps * BATCH].split(BATCH):
            images = data.train_inputs[index]
            flip = torch.rand(len(index)) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(3), images).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), data.train_labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for name, mask in (masks or {}).items():
                    parameters[name].mul_(mask)
    model.to(memory_format=torch.contiguous_format)


def held_out_errors(dense: nn.Module, model: nn.Module, layers: Iterable[str], images: Tensor) -> tuple[float, float]:
    """Mean over the layers of the relative error of their outputs on images, before batch norms are re-estimated.

    Returns:
        Given the dense network's inputs, and given those that the converted network has there itself.
    """
    wrong: dict[tuple[str, str], float] = {}
    energy: dict[str, float] = {}
    for batch in images.split(100):
        goals, outputs = _inside(dense, layers, batch), _inside(model, layers, batch)
        for name, (z, goal) in goals.items():
            # The layers have no bias; one that was fitted is part of the running mean of the batch norm behind.
            norm = re.sub(r"conv(\d)$", r"norm\1", name).replace("shortcut.0", "shortcut.1")
            shift = (dense.get_submodule(norm).running_mean - model.get_submodule(norm).running_mean).view(-1, 1, 1)
            with torch.inference_mode():
                found = {"dense": model.get_submodule(name)(z), "own": outputs[name][1]}
            for inputs, output in found.items():
                wrong[inputs, name] = wrong.get((inputs, name), 0.0) + float((output + shift - goal).double().square().sum())
            energy[name] = energy.get(name, 0.0) + float(goal.double().square().sum())
    first, second = (mean((wrong[inputs, name] / energy[name]) ** 0.5 for name in energy) for inputs in ("dense", "own"))
    return first, second


def _inside(model: nn.Module, layers: Iterable[str], batch: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of layers while the model runs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> RemovableHandle:
        hook = model.get_submodule(name).register_forward_hook
        return hook(lambda _, args, output: seen.__setitem__(name, (args[0], output)))

    handles = [note(name) for name in layers]
    try:
        with torch.inference_mode():
            model.eval()(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def calibration(data: Data, seed: int, count: int = 400, batch: int = 50) -> list[Tensor]:
    """Training images without labels."""
    index = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))[:count]
    return list(data.train_inputs[index].split(batch))
