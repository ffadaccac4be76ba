"""What is known of a model's layers, dense and sparse: the result of `advise`, which `accelerate_` can follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bisparse.accelerate.timing import Timing
from bisparse.layers import Skipped

__all__ = ["Advice", "LayerAdvice", "LayerShape", "Source"]

Source = Literal["measured", "predicted", "exact"]


@dataclass(frozen=True)
class LayerShape:
    """What advice depends on in a layer."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    both_ways: bool = True
    """2:4 on W^T too."""
    reason: str = ""
    """Why it cannot run sparse on tensor cores; empty if it can."""
    density: float = 0.5
    """Fraction of entries that are not zero, which matters on CPUs."""


@dataclass(frozen=True)
class LayerAdvice:
    """What is known of one layer, dense and sparse."""

    name: str
    shape: tuple[int, int]
    convert: bool | None
    """None if this was not measured: then it is not known."""
    reason: str
    """Why not; or by how much it wins."""
    backend: str | None = None
    timing: Timing | None = None
    forward_flops: int = 0
    """Of the dense product; a sparse one takes half."""
    dense_bytes: int = 0
    """Of the weight."""
    sparse_bytes: int = 0
    """The same packed, or in training with the positions and metadata that are kept next to it."""


@dataclass(frozen=True)
class Advice:
    """Advice for a model. `accelerate_(model, advice=...)` follows it."""

    layers: tuple[LayerAdvice, ...]
    left_dense: tuple[Skipped, ...]
    source: Source
    """Measured here, predicted from a grid, or only exact figures: shapes, bytes, FLOPs."""
    device: str
    tokens: int
    dtype: str
    training: bool
    note: str = ""

    def __getitem__(self, name: str) -> LayerAdvice:
        return {one.name: one for one in self.layers}[name]

    @property
    def speedup(self) -> float | None:
        """Dense time over time with the winning layers converted, of all layers with times; None if there are none."""
        known = [one for one in self.layers if one.timing is not None]
        if not known:
            return None
        dense = sum(one.timing.dense.total_ms for one in known if one.timing)
        best = sum((one.timing.sparse if one.convert else one.timing.dense).total_ms for one in known if one.timing)
        return dense / best

    def as_dict(self) -> dict[str, Any]:
        """All of it, in values that JSON knows."""
        return asdict(self)

    def __str__(self) -> str:
        wins = sum(one.convert is True for one in self.layers)
        if self.source == "exact":
            return f"{len(self.layers)} layers; their times are not known: {self.note}"
        total = "" if self.speedup is None else f"; {self.speedup:.2f}x on all layers that were {self.source}"
        return f"{wins} of {len(self.layers)} layers win at {self.tokens} tokens on {self.device}, {self.source}{total}"
