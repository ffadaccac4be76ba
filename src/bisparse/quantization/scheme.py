"""Number formats for weights: symmetric, one scale per output channel or per group of inputs, so that 0 is exactly 0.

"fp4" is NVIDIA's NVFP4: e2m1 numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), and a float8 e4m3 scale per 16 inputs
times a factor per matrix. Here the factor is a power of two, so that products of the three are exact in bfloat16 and float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["SCHEMES", "Scheme", "parse_scheme"]

SHRINKS = (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66, 0.62)
"""Fractions of the largest weight tried as the range of a 4-bit scale, since clipping a few weights may help the others."""

COARSE = 16
"""Multiples of the smallest number below which scales are counted as coarse."""

E4M3_MAX, E4M3_SMALLEST, E2M1_MAX = 448.0, 2.0**-9, 6.0


@dataclass(frozen=True)
class Scheme:
    """A number format for weights: a number of `bits` bits times a scale."""

    name: str
    bits: int
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output channel."""
    floating: bool = False
    """Whether the stored number is a float rather than an integer: e4m3 of 8 bits, e2m1 of 4."""

    @property
    def scaled_scales(self) -> bool:
        """Whether scales are float8 numbers times a power of two per matrix, its `unit`."""
        return self.floating and self.bits == 4

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest stored number."""
        if self.floating:
            most = E4M3_MAX if self.bits == 8 else E2M1_MAX
            return -most, most
        most = 2 ** (self.bits - 1)
        return (-float(most), most - 1.0) if self.bits < 8 else (1.0 - most, most - 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of stored numbers in memory, where 4-bit ones take one byte each; float8 has every e2m1 number."""
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

    def unit(self, rows: Float[Tensor, "..."], dtype: torch.dtype) -> float | None:
        """The power of two of which the scales of a matrix are float8 multiples; None if scales are not stored as float8.

        The largest scale is at most half the largest float8, since error feedback may enlarge weights.
        """
        if not self.scaled_scales:
            return None
        most = float(rows.abs().max()) / E2M1_MAX if rows.numel() else 0.0
        # 0 for a matrix of zeros.
        return max(_smallest_unit(dtype), 2.0 ** math.ceil(math.log2(most / (E4M3_MAX / 2)))) if most else 1.0

    def scales(self, rows: Float[Tensor, "... O K"], dtype: torch.dtype, unit: float | None = None) -> Float[Tensor, "... O S"]:
        """The scales of rows of weights, in float32 but representable in `dtype`; 1 for weights that are all 0.

        Args:
            unit: that of the whole matrix, if the scheme has one.
        """
        parts = rows.unflatten(-1, (-1, self.group or rows.shape[-1]))
        most = parts.abs().amax(-1)
        best = self._scale(most, dtype, unit)
        others = [] if self.bits >= 8 else [self._scale(most * shrink, dtype, unit) for shrink in SHRINKS[1:]]
        if dtype == torch.float16 and unit is None:
            # Subnormal numbers are far apart: the next larger one may lose less than the nearest.
            low = (best < torch.finfo(dtype).smallest_normal) & (best * self.range[1] < most)
            others.append(best + low * _smallest_scale(dtype))
        if not others:
            return best
        least = self._rounding(parts, best)
        for tried in others:
            error = self._rounding(parts, tried)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    def coarse(self, scales: Float[Tensor, "..."], dtype: torch.dtype, unit: float | None) -> Bool[Tensor, "..."]:
        """Which scales are so small that `dtype` cannot hold them within 3 %, or that they had to be raised to its smallest."""
        if unit is not None:
            return (scales < COARSE * E4M3_SMALLEST * unit) & (unit <= _smallest_unit(dtype))
        smallest = _smallest_scale(dtype)
        return scales < COARSE * smallest if dtype == torch.float16 else scales <= smallest

    def round(self, weights: Float[Tensor, "..."], scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The stored numbers of weights, as float32; `scale` broadcasts to the weights."""
        low, high = self.range
        scaled = (weights / scale).clamp(low, high)
        if not self.floating:
            rounded = scaled.round()
        elif self.bits == 8:
            rounded = scaled.to(torch.float8_e4m3fn).float()
        else:
            # Numbers below 2 are 0.5 apart, below 4 they are 1 apart, then 2; ties go to the even one, as in hardware.
            size = scaled.abs()
            apart = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
            rounded = (scaled / apart).round() * apart
        # 0 * -1 is -0.0, which integers do not have.
        return rounded + 0.0

    def spread(self, scale: Float[Tensor, "... S"], columns: int) -> Float[Tensor, "... K"]:
        """The scales, repeated to one per column."""
        return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)

    def _scale(self, most: Tensor, dtype: torch.dtype, unit: float | None) -> Tensor:
        if unit is not None:
            steps = (most / (self.range[1] * unit)).clamp(E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn).float()
            return torch.where(most > 0, steps * unit, unit)
        scale = (most / self.range[1]).to(dtype).float()
        # A scale that rounds to 0 would lose the weights.
        return torch.where(most > 0, scale.clamp(min=_smallest_scale(dtype)), 1.0)

    def _rounding(self, parts: Tensor, scale: Tensor) -> Tensor:
        wide = scale.unsqueeze(-1)
        # In units of the largest weight's power of two, so that squares of tiny weights do not underflow.
        unit = torch.exp2(torch.frexp(parts.abs().amax(-1, keepdim=True)).exponent.clamp(-126, 126).float())
        result: Tensor = ((self.round(parts, wide) * wide - parts) / unit).square().sum(-1)
        return result


def _smallest_scale(dtype: torch.dtype) -> float:
    """The smallest scale in a dtype: for float16, whose weights may be near its smallest normal number, a subnormal one."""
    if dtype == torch.float16:
        return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.finfo(torch.float32).smallest_normal


def _smallest_unit(dtype: torch.dtype) -> float:
    """The smallest power of two of which all float8 multiples are numbers of `dtype`: in others than float16, normal ones."""
    return _smallest_scale(dtype) / E4M3_SMALLEST if dtype == torch.float16 else 2.0**-110


SCHEMES = {
    one.name: one
    for one in (
        Scheme("int8", 8),
        Scheme("int4-g32", 4, 32),
        Scheme("int4-g64", 4, 64),
        Scheme("int4-g128", 4, 128),
        Scheme("fp8", 8, floating=True),
        Scheme("fp4", 4, 16, floating=True),
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
