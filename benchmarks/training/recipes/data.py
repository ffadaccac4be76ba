"""The data that recipes train on: Fashion-MNIST, the Python documentation's text, and made-up blobs for smoke tests."""

from __future__ import annotations

import gzip
import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from recipes.recipe import DataRecipe, RecipeError

__all__ = ["Data", "load_data"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
BLOBS = 10


@dataclass(frozen=True)
class Data:
    """Inputs and labels in memory; for text, sequences and the same shifted by one byte."""

    train_inputs: Tensor
    train_labels: Int[Tensor, "N ..."]
    test_inputs: Tensor
    test_labels: Int[Tensor, "N ..."]
    description: str
    """What it is, in words, with its sizes and versions."""


def load_data(recipe: DataRecipe) -> Data:
    """The data of a recipe, the same at each call.

    Raises:
        RecipeError: the files are not there, or hold less than the recipe asks for.
    """
    if recipe.kind == "fashion-mnist":
        return _fashion_mnist(recipe)
    return _python_text(recipe) if recipe.kind == "python-text" else _blobs(recipe)


def _fashion_mnist(recipe: DataRecipe) -> Data:
    folder = Path(recipe.folder).expanduser() if recipe.folder else FASHION_MNIST
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        raise RecipeError(
            f"Fashion-MNIST is not in {folder}: install Debian's dataset-fashion-mnist, or set [data] folder to where its four "
            "idx.gz files lie"
        )

    def images(part: str, count: int) -> tuple[Float[Tensor, "N 1 H W"], Int[Tensor, " N"]]:
        pixels, labels = _idx(folder / f"{part}-images-idx3-ubyte.gz"), _idx(folder / f"{part}-labels-idx1-ubyte.gz")
        if count > len(pixels):
            raise RecipeError(f"[data]: {count} images asked for, {part} has {len(pixels)}")
        inputs = (pixels[:count].float().unsqueeze(1) / 255 - 0.286) / 0.353
        factor = 28 // recipe.side
        if factor > 1:
            inputs = torch.nn.functional.avg_pool2d(inputs, factor)
        return inputs, labels[:count].long()

    train, test = images("train", recipe.train), images("t10k", recipe.test)
    size = f"{recipe.side} x {recipe.side}"
    return Data(*train, *test, f"Fashion-MNIST, the first {recipe.train} training and {recipe.test} test images, {size}")


def _idx(path: Path) -> Int[Tensor, "..."]:
    """An array in the idx format: two zero bytes, the type (8: unsigned byte), the number of sides, the sides, the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise RecipeError(f"{path}: is no idx file of unsigned bytes")
    sides = [int.from_bytes(data[4 + 4 * one : 8 + 4 * one], "big") for one in range(data[3])]
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(sides)).reshape(sides).copy())


def _python_text(recipe: DataRecipe) -> Data:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        if len(text) >= recipe.train + recipe.test:
            break
        text += b"\n\n" + path.read_bytes()
    need = recipe.train + recipe.test
    if len(text) < need:
        raise RecipeError(f"[data]: {need} bytes of text asked for, the standard library has {len(text)}")
    # Every tenth stretch is for testing, so that both halves hold documentation and code alike.
    stretch = recipe.context * 16 + 1
    pieces = [text[start : start + stretch] for start in range(0, need, stretch)]
    test_every = max(2, need // recipe.test)
    parts = [
        b"".join(piece for number, piece in enumerate(pieces) if (number % test_every == 1) == test) for test in (False, True)
    ]

    def sequences(part: bytes) -> tuple[Tensor, Tensor]:
        tokens = torch.frombuffer(bytearray(part), dtype=torch.uint8).long()
        count = (len(tokens) - 1) // recipe.context
        if count == 0:
            raise RecipeError(f"[data]: {len(part)} bytes hold no sequence of context = {recipe.context}")
        length = count * recipe.context
        return tokens[:length].view(count, -1), tokens[1 : length + 1].view(count, -1)

    version = sysconfig.get_python_version()
    size = f"{len(parts[0])} bytes to train, {len(parts[1])} to test"
    what = f"Python {version}: pydoc_data.topics, then sources of the standard library; {size}"
    return Data(*sequences(parts[0]), *sequences(parts[1]), what)


def _blobs(recipe: DataRecipe) -> Data:
    generator = torch.Generator().manual_seed(0)
    side = recipe.side
    centres = torch.randn(BLOBS, 1, side, side, generator=generator)

    def points(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, BLOBS, (count,), generator=generator)
        return centres[labels] + torch.randn(count, 1, side, side, generator=generator), labels

    return Data(*points(recipe.train), *points(recipe.test), f"{BLOBS} Gaussian blobs, {recipe.train} and {recipe.test} points")
