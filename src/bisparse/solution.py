"""Solutions, and proofs of their optimality.

Nothing here calls a solver. The proof is LP duality: for any prices u (rows) and v (columns) of a tile with integer
scores q, ::

    bound(u, v) = N sum(u) + N sum(v) + sum_ij max(0, q_ij - u_i - v_j)  >=  the value of any feasible mask

(u, v >= 0 for "at most N", free for "exactly N"), so a mask whose value equals a bound is optimal, and 2M integers prove it.

Scores are real, the proof is in integers: each tile's scores are multiplied by 2**exponent and rounded half to even. For
float32, float16 and bfloat16 the exponent puts the tile's largest score in [2**23, 2**24), so a score moves by at most half
a unit, unit = 2**-exponent <= 2**-23 * max(tile), and the mask is within N * M units of the optimum of the given numbers (in
practice equal to it). float64, integers from 2**52 on, and tiles whose scores span too wide a range are rounded to 52 bits, other
integers not at all. `Solution.gap` refers to the scores as given, so it includes what rounding may have lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

from bisparse.gap import Prices, kept_total, tile_failure, tiles_gap
from bisparse.kernels.figures.cpu import kept_and_total, priced_figures
from bisparse.pattern import Pattern, Structure
from bisparse.selection_gap import selection_failure, selection_gap
from bisparse.tiles import Layout, to_matrices
from bisparse.verification import PatternError, verify

__all__ = [
    "Certificate",
    "CertificateError",
    "ScoreRangeError",
    "Solution",
]


class CertificateError(ValueError):
    """The certificate does not prove that the mask is optimal."""


class ScoreRangeError(ValueError, OverflowError):
    """A figure of a solution exceeds what float64 holds; scale the scores by a power of two, which changes no mask."""


@dataclass(frozen=True)
class Certificate:
    """Dual prices of every tile, in units of ``2**-exponent`` of the scores.

    Tiles are numbered band by band, left to right, over the padded matrices one below the other.
    """

    u: Int[Tensor, "B M"]
    """Row prices, int64."""
    v: Int[Tensor, "B M"]
    """Column prices, int64."""
    exponent: Int[Tensor, " B"]
    """Scores are rounded to integers as ``score * 2**exponent``, int64."""
    exactly: bool = False
    """Prices of the "= N" program, which may be negative."""

    def to(self, device: torch.device) -> Certificate:
        """The same prices on another device; itself where they are there."""
        if self.u.device == self.v.device == self.exponent.device == device:
            return self
        return replace(self, u=self.u.to(device), v=self.v.to(device), exponent=self.exponent.to(device))


def _no_certificate() -> None:
    """For solvers that give no certificate."""


@dataclass(frozen=True)
class Solution:
    """A mask for given scores, and what is known about its optimality. All figures are in score units."""

    mask: Bool[Tensor, "..."] = field(repr=False)
    """`True` = kept; of the scores' shape."""
    scores: Real[Tensor, "..."] = field(repr=False)
    pattern: Structure
    layout: Layout
    exactly: bool = False
    certify: Callable[[], Certificate | None] = field(default=_no_certificate, repr=False, compare=False)
    """Makes the certificate when it is first asked for."""
    _version: int | None = field(default=None, init=False, repr=False, compare=False)
    """torch's version counter of the scores when this was made."""

    def __post_init__(self) -> None:
        known = self.__dict__
        if self.scores.is_inference():  # whose changes torch does not count
            known["scores"] = self.scores.clone()
        known["_version"] = _version_of(self.scores)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.mask.shape))
        return f"{self.pattern} mask of {shape}: keeps {int(self.mask.count_nonzero()):,} of {self.mask.numel():,} weights"

    def __getstate__(self) -> dict[str, object]:
        # Copies of the scores have version counters of their own, and what makes a certificate may refer to the original.
        unchanged = self._version == _version_of(self.scores)
        known = {"certificate": self.certificate} if unchanged else {}
        return {**self.__dict__, **known, "certify": _no_certificate, "_version": None if unchanged else -1}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._version is None:
            self.__dict__["_version"] = _version_of(self.scores)

    @cached_property
    def certificate(self) -> Certificate | None:
        """Dual prices for a transposable pattern; None for structures whose optimum is a plain selection."""
        return self.certify()

    @cached_property
    def value(self) -> float:
        """Total score kept, with a relative error of about 1e-15.

        Raises:
            ScoreRangeError: the total exceeds float64.
            ValueError: the mask is no bool tensor of the scores' shape, or the scores were changed in place after solving. The
                same for `bound`, `gap`, `relative_gap` and `retained`.
        """
        return _float(*self._kept, "value")

    @cached_property
    def gap(self) -> float:
        """How much better, at most, any other mask could be in the scores as given: ``bound - value``, without cancellation.

        It has a relative error of about 1e-15 of itself, so 0 means optimal in the scores as given (but for sequential and paired
        structures, whose sums of floats are rounded: see `bisparse.selection_gap`). The scores are read once, in bands.
        """
        scores, mask = self._unchanged()
        matrices, masks = to_matrices(scores, self.layout), to_matrices(mask, self.layout)
        if not isinstance(self.pattern, Pattern) or not self.pattern.transposable:
            gap = selection_gap(matrices, masks, self.pattern)
        else:
            prices = self._prices(matrices)
            figures = priced_figures(matrices, masks, *prices, self.pattern.n, self.exactly)
            if figures is not None and math.isfinite(figures[0]):
                self.__dict__.setdefault("_sums", ((figures[1], 0), (figures[2], 0)))
                return figures[0]
            try:
                gap = tiles_gap(matrices, masks, prices, self.pattern.n, self.pattern.m, self.exactly)
            except ValueError as error:
                raise CertificateError(str(error)) from None
        if not math.isfinite(gap):
            return _float(math.inf, 0, "gap")
        return gap

    @property
    def bound(self) -> float:
        """An upper bound on the score that any mask of this pattern can keep: ``value + gap``, from prices and scores alone."""
        return _float(self.value + self.gap, 0, "bound")

    @property
    def relative_gap(self) -> float:
        """`gap` as a fraction of the bound, 0 for an all-zero matrix."""
        gap = self.gap
        kept, power = self._kept
        return gap * 2.0**-power / (kept + gap * 2.0**-power) if gap > 0 else 0.0

    @property
    def retained(self) -> float:
        """Fraction of the total score kept, in [0, 1]; 1 for an all-zero matrix."""
        kept, power = self._kept
        total, power_of_total = self._total
        return kept / total * 2.0 ** (power - power_of_total) if total > 0 else 1.0

    def check(self) -> Solution:
        """Check the proof: the mask is feasible, and bound(u, v) equals its value, in integers, on every tile.

        Returns the solution itself. A plain selection is proved by comparing what is kept with what is pruned, group by group.

        Raises:
            PatternError: the mask breaks the pattern, or is no bool tensor of the scores' shape.
            CertificateError: the prices do not prove optimality; the message names the first tile.
            ValueError: the scores were changed in place after solving.
        """
        scores, mask = self._unchanged()
        verify(mask, self.pattern, layout=self.layout).check()
        matrices, masks = to_matrices(scores, self.layout), to_matrices(mask, self.layout)
        if not isinstance(self.pattern, Pattern) or not self.pattern.transposable:
            if scores.numel() and not _all_scores(scores):
                raise CertificateError("the scores are not all finite and >= 0: nothing is proved about them")
            if reason := selection_failure(matrices, masks, self.pattern):
                raise CertificateError(reason)
            return self
        prices, certificate = self._prices(matrices), self._certificate_or_error()
        if certificate.exactly and not self.exactly:
            raise CertificateError('prices of the "exactly N" program prove nothing about "at most N"')
        if failure := tile_failure(matrices, masks, prices, self.pattern.n, self.pattern.m, self.exactly):
            raise CertificateError(f"tile {failure.tile}: {failure.reason}")
        return self

    @property
    def total(self) -> float:
        """Sum of all scores, kept or not.

        Raises:
            ScoreRangeError: it exceeds float64.
        """
        return _float(*self._total, "total")

    @property
    def _kept(self) -> tuple[float, int]:
        return self._sums[0]

    @property
    def _total(self) -> tuple[float, int]:
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """Sums of the kept scores and of all, as `kept_total` gives them."""
        scores, mask = self._unchanged()
        if (sums := kept_and_total(scores, mask)) is not None:
            return (sums[0], 0), (sums[1], 0)
        return kept_total(scores, mask), kept_total(scores, None)

    def _unchanged(self) -> tuple[Tensor, Tensor]:
        """Scores and mask, if they are what was solved."""
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or self.mask.shape != self.scores.shape:
            given = f"{tuple(self.mask.shape)}, {self.mask.dtype}" if isinstance(self.mask, Tensor) else type(self.mask).__name__
            raise PatternError(
                f"the mask is {given}; scores of shape {tuple(self.scores.shape)} need a bool tensor of that shape"
            )
        if self._version != _version_of(self.scores):
            raise ValueError(
                "the scores were changed in place after solving, so their value, gap and proof are no longer known; solve again, "
                "or pass solve() a copy, as by scores.clone()"
            )
        return self.scores.detach(), self.mask

    def _prices(self, matrices: Real[Tensor, "B O I"]) -> Prices:
        """The certificate's, if their shapes fit."""
        certificate = self._certificate_or_error()
        assert isinstance(self.pattern, Pattern)
        m = self.pattern.m
        tiles = len(matrices) * -(-matrices.shape[1] // m) * -(-matrices.shape[2] // m)
        u, v, exponent = certificate.u, certificate.v, certificate.exponent
        if u.shape != (tiles, m) or v.shape != (tiles, m) or exponent.shape != (tiles,):
            raise CertificateError(
                f"{tiles} tiles of side {m} need prices of shape ({tiles}, {m}) and exponents ({tiles},); the certificate has "
                f"{tuple(u.shape)}, {tuple(v.shape)} and {tuple(exponent.shape)}"
            )
        if any(side.is_floating_point() or side.dtype == torch.bool or side.is_complex() for side in (u, v, exponent)):
            raise CertificateError(
                f"prices and exponents must be integers; the certificate has {u.dtype}, {v.dtype}, {exponent.dtype}"
            )
        return Prices(u, v, exponent)

    def _certificate_or_error(self) -> Certificate:
        if self.certificate is None:
            raise CertificateError(
                f"this solution at {self.pattern} carries no certificate: of the solvers only Exact gives one. To judge this "
                "mask, compare its value with that of solve(scores, pattern), which is the proved optimum"
            )
        return self.certificate


def _version_of(scores: Tensor) -> int | None:
    return None if scores.is_inference() else scores._version


def _all_scores(scores: Real[Tensor, "..."]) -> bool:
    least, largest = torch.aminmax(scores)
    return bool(least >= 0) and bool(largest < math.inf)


def _float(number: float, power: int, what: str) -> float:
    try:
        number = math.ldexp(number, power)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise ScoreRangeError(
            f"the {what} of these scores exceeds float64; scale them by a power of two before solving, which changes no mask"
        )
    return number
