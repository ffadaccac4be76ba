"""Number formats for weights: symmetric, one scale per output channel or per group of inputs, so that 0 is exactly 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["SCHEMES", "Scheme", "parse_scheme"]

SHRINKS = (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66, 0.62)
"""Fractions of the largest weight tried as the range of a 4-bit scale, since clipping a few weights may help the others."""


@dataclass(frozen=True)
class Scheme:
    """A number format for weights: a number of `bits` bits times a scale."""

    name: str
    bits: int
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output channel."""
    floating: bool = False
    """Whether the stored number is a float8 e4m3 rather than an integer."""

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest stored number."""
        if self.floating:
            return -448.0, 448.0
        most = 2 ** (self.bits - 1)
        return (-float(most), most - 1.0) if self.bits < 8 else (1.0 - most, most - 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of stored numbers in memory, where 4-bit ones take one byte each."""
        return torch.float8_e4m3fn if self.floating else torch.int8

    def refusal(self, inputs: int, positions: int = 1) -> str | None:
        """Why rows of `positions` times `inputs` weights cannot be stored in this scheme; None if they can."""
        if self.group is None:
            return None
        if positions > 1:
            return f"{self.name} has groups of inputs, which do not work for a convolution's kernel positions; use int8 or fp8"
        if inputs % self.group:
            return f"{self.group} does not divide its {inputs} inputs, as {self.name} needs"
        return None

    def scales(self, rows: Float[Tensor, "... O K"], dtype: torch.dtype) -> Float[Tensor, "... O S"]:
        """The scales of rows of weights, in float32 but representable in `dtype`; 1 for weights that are all 0."""
        parts = rows.unflatten(-1, (-1, self.group or rows.shape[-1]))
        most = parts.abs().amax(-1)
        best = self._scale(most, dtype)
        if self.bits >= 8:
            return best
        least = self._rounding(parts, best)
        for shrink in SHRINKS[1:]:
            tried = self._scale(most * shrink, dtype)
            error = self._rounding(parts, tried)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    def round(self, weights: Float[Tensor, "..."], scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The stored numbers of weights, as float32; `scale` broadcasts to the weights."""
        low, high = self.range
        scaled = (weights / scale).clamp(low, high)
        rounded = scaled.to(torch.float8_e4m3fn).float() if self.floating else scaled.round()
        # 0 * -1 is -0.0, which integers do not have.
        return rounded + 0.0

    def spread(self, scale: Float[Tensor, "... S"], columns: int) -> Float[Tensor, "... K"]:
        """The scales, repeated to one per column."""
        return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)

    def _scale(self, most: Tensor, dtype: torch.dtype) -> Tensor:
        scale = (most / self.range[1]).to(dtype).float()
        # A scale that rounds to 0 would lose the weights, so it is at least the smallest number of the dtype.
        smallest = torch.finfo(dtype).smallest_normal if dtype != torch.float64 else torch.finfo(torch.float32).smallest_normal
        return torch.where(most > 0, scale.clamp(min=smallest), 1.0)

    def _rounding(self, parts: Tensor, scale: Tensor) -> Tensor:
        wide = scale.unsqueeze(-1)
        result: Tensor = (self.round(parts, wide) * wide - parts).square().sum(-1)
        return result


SCHEMES = {
    one.name: one
    for one in (
        Scheme("int8", 8),
        Scheme("int4-g32", 4, 32),
        Scheme("int4-g64", 4, 64),
        Scheme("int4-g128", 4, 128),
        Scheme("fp8", 8, floating=True),
    )
}
"""Schemes by name."""


def parse_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of this name in `SCHEMES`.

    >>> parse_scheme("int4-g64").group
    64
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r:.60}: expected one of {', '.join(map(repr, SCHEMES))}")
    return SCHEMES[scheme]
