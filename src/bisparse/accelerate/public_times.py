"""Predicts the products of a model's layers at 2:4, 4:6 and 6:8 on other GPUs, from public measurements.

The data are described in `public_gemm/SOURCE.md`: forward products only. Between measured numbers of tokens, the logarithm of a
time is interpolated linearly. A layer whose shape was not measured gets the times of the nearest measured shape, by the distance
of the logarithms, scaled by the number of weights. A note names everything that was not measured.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from bisparse.accelerate.advice import LayerShape, check_tokens

__all__ = ["PUBLIC_DEVICES", "SPARSE", "DevicePrediction", "LayerPrediction", "predict_products"]

PUBLIC_DEVICES = ("A100", "H100", "B200", "RTX4090", "RTX5080", "GB10")
SPARSE = ("2:4", "4:6", "6:8")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "int8": "int8", "fp8": "fp8", "fp4": "fp4"}
FAR = 2.0
"""Factor between the sides of a layer and of the nearest measured shape above which the note says that it is far."""

MIN_COUNTS = 4
"""Minimum number of token counts at which a shape must have been measured to predict others; square shapes have only one."""

Shape = tuple[int, int]
Times = tuple[float, ...]


@dataclass(frozen=True)
class LayerPrediction:
    """Predicted time of one layer's product in microseconds, dense and sparse."""

    name: str
    shape: Shape
    """(out_features, in_features)."""
    measured_shape: Shape
    """The shape whose times were used."""
    dense_us: float
    sparse_us: dict[str, float]
    """Sparse times by pattern."""
    note: str = ""
    """What was extrapolated; empty if nothing was."""


@dataclass(frozen=True)
class DevicePrediction:
    """The products of a model's layers on one device."""

    device: str
    dtype: str
    tokens: int
    layers: tuple[LayerPrediction, ...]
    wins_from: dict[str, int | None]
    """By pattern: the smallest measured number of tokens from which the layers together are faster sparse; None if never."""
    note: str = ""

    @property
    def dense_us(self) -> float:
        """Dense time of all layers together."""
        return sum(one.dense_us for one in self.layers)

    @property
    def speedup(self) -> dict[str, float]:
        """By pattern: dense time divided by sparse time, with all layers sparse."""
        return {one: self.dense_us / sum(layer.sparse_us[one] for layer in self.layers) if self.layers else 1.0 for one in SPARSE}

    def as_dict(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        return {**asdict(self), "dense_us": self.dense_us, "speedup": self.speedup}


def predict_products(
    shapes: Iterable[LayerShape], tokens: int, *, dtype: str = "bfloat16", device: str | None = None
) -> tuple[DevicePrediction, ...]:
    """Predict the products of layers, as if pruned, on every device of `PUBLIC_DEVICES` or on one of them.

    Args:
        tokens: rows of a layer's input.
        dtype: "bfloat16", "float16", "int8", "fp8" or "fp4"; devices that were not measured with it are left out.
        device: one of `PUBLIC_DEVICES`, case-insensitive, with or without spaces.

    Raises:
        ValueError: an unknown device, one that was not measured with this dtype, or tokens below 1.

    >>> (found,) = predict_products([LayerShape("mlp", (4096, 4096))], 4096, device="A100")
    >>> print(f"{found.speedup['2:4']:.2f}")
    1.71
    """
    check_tokens(tokens)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    names = PUBLIC_DEVICES if device is None else (_device_named(device),)
    layers, found = list(shapes), []
    for name in names:
        times = _table().get((name, DTYPES[dtype]))
        if times is not None:
            found.append(_predict(name, times, layers, tokens, dtype))
        elif device is not None:
            known = [one for one, short in DTYPES.items() if (name, short) in _table()]
            raise ValueError(f"there are public times of {name} for {', '.join(known)}, not for {dtype}")
    return tuple(found)


def _device_named(text: str) -> str:
    plain = text.upper().replace(" ", "").replace("-", "").replace("_", "")
    if plain not in PUBLIC_DEVICES:
        raise ValueError(f"device {text!r}: there are public times for {', '.join(PUBLIC_DEVICES)}")
    return plain


@cache
def _table() -> dict[tuple[str, str], dict[Shape, dict[int, Times]]]:
    """By device and dtype, by shape, by tokens: microseconds, dense and as in `SPARSE`."""
    data = (resources.files("bisparse.accelerate") / "public_gemm" / "gemm.csv.gz").read_bytes()
    found: dict[tuple[str, str], dict[Shape, dict[int, Times]]] = {}
    for row in csv.reader(io.StringIO(gzip.decompress(data).decode("utf-8"))):
        if row[0] == "device" or "" in row:  # the header; a few int8, fp8 and fp4 products without a time
            continue
        device, _, dtype, tokens, out, in_, *times = row
        found.setdefault((device, dtype), {}).setdefault((int(out), int(in_)), {})[int(tokens)] = tuple(map(float, times))
    return found


def _predict(
    device: str, table: dict[Shape, dict[int, Times]], shapes: list[LayerShape], tokens: int, dtype: str
) -> DevicePrediction:
    layers, sources, notes = [], [], set()
    for one in shapes:
        known = [own for own, times in table.items() if len(times) >= MIN_COUNTS or (own == one.shape and tokens in times)]
        nearest = min(known or table, key=lambda shape: _distance(one.shape, shape))
        scale = math.prod(one.shape) / math.prod(nearest)
        times, note = _at(table[nearest], tokens)
        if nearest != one.shape:
            far = max(max(a / b, b / a) for a, b in zip(one.shape, nearest, strict=True)) > FAR
            own = f"{nearest[0]} x {nearest[1]}, {'far from it, but ' if far else ''}the nearest shape that was measured, scaled"
            note = f"{own}; {note}" if note else own
        notes |= {note} - {""}
        dense, *sparse = (scale * one for one in times)
        layers.append(LayerPrediction(one.name, one.shape, nearest, dense, dict(zip(SPARSE, sparse, strict=True)), note))
        sources.append((scale, table[nearest]))
    note = f"{sum(bool(one.note) for one in layers)} of {len(layers)} layers were not measured as they are" if notes else ""
    return DevicePrediction(device, dtype, tokens, tuple(layers), _wins_from(sources), note)


def _distance(one: Shape, other: Shape) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def _at(times: dict[int, Times], tokens: int) -> tuple[Times, str]:
    """Times at a number of tokens, and a note if that is outside of the measured range."""
    counts = sorted(times)
    if tokens in times:
        return times[tokens], ""
    if tokens < counts[0]:
        return times[counts[0]], f"at {counts[0]} tokens, the fewest that were measured"
    if tokens > counts[-1]:
        scaled = tuple(one * tokens / counts[-1] for one in times[counts[-1]])
        return scaled, f"at {counts[-1]} tokens, the most that were measured, scaled"
    high = next(place for place, count in enumerate(counts) if count > tokens)
    low_count, high_count = counts[high - 1], counts[high]
    weight = math.log(tokens / low_count) / math.log(high_count / low_count)
    pairs = zip(times[low_count], times[high_count], strict=True)
    return tuple(math.exp((1 - weight) * math.log(low) + weight * math.log(up)) for low, up in pairs), ""


def _wins_from(sources: list[tuple[float, dict[int, Times]]]) -> dict[str, int | None]:
    """By pattern, the smallest measured number of tokens from which all layers together are faster sparse."""
    found: dict[str, int | None] = dict.fromkeys(SPARSE)
    if not sources:
        return found
    common = sorted(set.intersection(*(set(times) for _, times in sources)))
    for place, pattern in enumerate(SPARSE, start=1):
        for count in reversed(common):
            if sum(scale * (times[count][0] - times[count][place]) for scale, times in sources) <= 0:
                break
            found[pattern] = count
    return found
