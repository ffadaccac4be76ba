"""The result of `advise`, which `accelerate_` can follow: times, memory and FLOPs of a model's layers, dense and sparse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bisparse.accelerate.backends.base import token_count
from bisparse.accelerate.timing import Timing
from bisparse.arguments import entry_of
from bisparse.layers import Skipped

__all__ = ["Advice", "LayerAdvice", "LayerShape", "Source", "check_tokens"]

Source = Literal["measured", "predicted", "exact"]


def check_tokens(tokens: object) -> None:
    """Raise ValueError unless this is a number of input rows."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens < 1 << 63:
        raise ValueError(f"tokens={tokens!r:.40}: expected the number of rows of a layer's input, at least 1")


@dataclass(frozen=True)
class LayerShape:
    """The properties of a layer that advice depends on."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    both_ways: bool = True
    """Whether it is 2:4 on W^T too."""
    reason: str = ""
    """Why it cannot run sparse on tensor cores; empty if it can."""
    density: float = 0.5
    """Fraction of entries that are not zero; used on CPUs."""


@dataclass(frozen=True)
class LayerAdvice:
    """Times, memory and FLOPs of one layer, dense and sparse."""

    name: str
    shape: tuple[int, int]
    convert: bool | None
    """Whether to convert the layer; None if it was not measured."""
    reason: str
    """Why not to convert it, or how much faster it is."""
    backend: str | None = None
    timing: Timing | None = None
    forward_flops: int = 0
    """FLOPs of the dense products; a sparse one needs half."""
    dense_bytes: int = 0
    """Bytes of the dense weight."""
    sparse_bytes: int = 0
    """Bytes of the packed weight, or in training of the weight with positions and metadata."""


@dataclass(frozen=True)
class Advice:
    """Advice for a model. `accelerate_(model, advice=...)` follows it."""

    layers: tuple[LayerAdvice, ...] = field(repr=False)
    left_dense: tuple[Skipped, ...] = field(repr=False)
    source: Source
    """"measured" here, "predicted" from a grid, or only the exact figures: shapes, bytes, FLOPs."""
    device: str
    tokens: int
    dtype: str
    training: bool
    note: str = ""

    def __iter__(self) -> Iterator[LayerAdvice]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, key: str | int) -> LayerAdvice:
        """The advice for a layer, by its name or its number."""
        return entry_of(key, self.layers, {one.name: one for one in self.layers})

    @property
    def speedup(self) -> float | None:
        """Dense time divided by the time with the faster layers converted, over all layers with times; None if there are none."""
        known = [one for one in self.layers if one.timing is not None]
        if not known:
            return None
        dense = sum(one.timing.dense.total_ms for one in known if one.timing)
        best = sum((one.timing.sparse if one.convert else one.timing.dense).total_ms for one in known if one.timing)
        return dense / best

    def as_dict(self) -> dict[str, Any]:
        """The advice as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        wins = sum(one.convert is True for one in self.layers)
        if self.source == "exact":
            return f"{len(self.layers)} layers, without times: {self.note}"
        total = "" if self.speedup is None else f"; {self.speedup:.2f}x on all layers that were {self.source}"
        return f"{wins} of {len(self.layers)} layers win at {token_count(self.tokens)} on {self.device}, {self.source}{total}"
