"""The judge: what a solution is, how its optimality is proved, and whether a mask obeys its structure.

Nothing here calls a solver. The proof is LP duality: for any prices u (rows) and v (columns) of a tile with integer
scores q, ::

    bound(u, v) = N sum(u) + N sum(v) + sum_ij max(0, q_ij - u_i - v_j)  >=  the value of any feasible mask

(u, v >= 0 for "at most N", free for "exactly N"), so a mask whose value equals a bound is optimal, and 2M integers prove it.

Scores are real, the proof is in integers: each tile's scores are multiplied by 2**exponent and rounded half to even. For
float32, float16 and bfloat16 the exponent puts the tile's largest score in [2**23, 2**24), so a score moves by at most half
a unit, unit = 2**-exponent <= 2**-23 * max(tile), and the mask is within N * M units of the optimum of the given numbers (in
practice equal to it). A larger exponent proves more; one at which every score is a whole number proves the mask exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int, Real, Shaped
from torch import Tensor, nn

from bisparse.layers import Filter, Skipped, find_layers
from bisparse.pattern import Pattern, Structure, parse_pattern
from bisparse.tiles import Layout, default_layout, pad_to_multiple, to_matrices, to_tiles

__all__ = ["Certificate", "CertificateError", "PatternError", "Solution", "Verification", "Violation", "verify"]

FAST_BITS = 24
"""Bits of a quantised score in the fast mode; `Certificate.exponent` may not be coarser than this implies."""


class CertificateError(ValueError):
    """The certificate does not prove that the mask is optimal."""


class PatternError(ValueError):
    """A mask breaks the structure it was said to obey."""


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
    wide: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Prices, as Python integers, of the tiles whose scores do not fit 64 bits at their exponent."""

    def to(self, device: torch.device) -> Certificate:
        """The same prices on another device; itself where they are there."""
        if self.u.device == self.v.device == self.exponent.device == device:
            return self
        return replace(self, u=self.u.to(device), v=self.v.to(device), exponent=self.exponent.to(device))


@dataclass(frozen=True)
class Solution:
    """A mask for given scores, and what is known about its optimality. All figures are in score units."""

    mask: Bool[Tensor, "..."]
    """`True` = kept; of the scores' shape."""
    scores: Real[Tensor, "..."] = field(repr=False)
    pattern: Structure
    layout: Layout
    exactly: bool = False
    certify: Callable[[], Certificate | None] = field(default=lambda: None, repr=False, compare=False)
    """Makes the certificate when it is first asked for."""

    @cached_property
    def certificate(self) -> Certificate | None:
        """Dual prices for a transposable pattern; None for structures whose optimum is a plain selection."""
        return self.certify()

    @cached_property
    def value(self) -> float:
        """Total score kept."""
        nothing = torch.zeros((), dtype=self.scores.dtype, device=self.scores.device)
        return float(torch.where(self.mask, self.scores, nothing).sum(dtype=torch.float64))

    @property
    def bound(self) -> float:
        """An upper bound on the score that any mask of this pattern can keep, from the prices and the scores alone."""
        matrices = to_matrices(self.scores, self.layout)
        if not isinstance(self.pattern, Pattern) or not self.pattern.transposable:
            return _selection_bound(matrices, self.pattern)
        certificate = self._certificate_or_error()
        tiles = _tiles_of(matrices, self.pattern.m).double()
        u, v = _dequantise(certificate)
        slack = (tiles - u[:, :, None] - v[:, None, :]).clamp(min=0)
        return float(self.pattern.n * (u.sum() + v.sum()) + slack.sum())

    @property
    def gap(self) -> float:
        """``bound - value``: how much better, at most, any other mask could be."""
        return max(0.0, self.bound - self.value)

    @property
    def relative_gap(self) -> float:
        """`gap` as a share of the bound, 0 for an all-zero matrix."""
        bound = self.bound
        return max(0.0, bound - self.value) / bound if bound > 0 else 0.0

    @property
    def retained(self) -> float:
        """Share of the total score kept, in [0, 1]; 1 for an all-zero matrix."""
        total = float(self.scores.double().sum())
        return self.value / total if total > 0 else 1.0

    def check(self) -> Solution:
        """Check the proof: the mask is feasible, and bound(u, v) equals its value, in integers, on every tile.

        Returns the solution itself.

        Raises:
            PatternError: the mask breaks the pattern.
            CertificateError: the prices do not prove optimality; the message names the first tile.
        """
        verify(self.mask, self.pattern, layout=self.layout).check()
        matrices = to_matrices(self.scores, self.layout)
        if not isinstance(self.pattern, Pattern) or not self.pattern.transposable:
            best = _selection_bound(matrices, self.pattern)
            if not math.isclose(best, self.value, rel_tol=1e-12, abs_tol=0.0):
                raise CertificateError(f"the mask keeps {self.value!r}, but {best!r} can be kept at {self.pattern}")
            return self
        m = self.pattern.m
        masks = _tiles_of(to_matrices(self.mask, self.layout), m)
        cropped = ~_tiles_of(torch.ones_like(matrices, dtype=torch.bool), m).flatten(1).all(1)
        _check_prices(_tiles_of(matrices, m), masks, cropped, self._certificate_or_error(), self.pattern.n, self.exactly)
        return self

    def _certificate_or_error(self) -> Certificate:
        if self.certificate is None:
            raise CertificateError(f"this solution at {self.pattern} carries no certificate: of the solvers only Exact gives one")
        return self.certificate


def _tiles_of(matrices: Shaped[Tensor, "B O I"], m: int) -> Shaped[Tensor, "T M M"]:
    padded = pad_to_multiple(matrices, m)
    return to_tiles(padded.flatten(0, -2), m)


def _dequantise(certificate: Certificate) -> tuple[Tensor, Tensor]:
    scale = torch.ldexp(torch.ones_like(certificate.exponent, dtype=torch.float64), -certificate.exponent)[:, None]
    u, v = certificate.u.double() * scale, certificate.v.double() * scale
    for tile, (wide_u, wide_v) in certificate.wide.items():
        unit = Fraction(2) ** -int(certificate.exponent[tile])
        u[tile] = torch.tensor([float(price * unit) for price in wide_u], dtype=torch.float64)
        v[tile] = torch.tensor([float(price * unit) for price in wide_v], dtype=torch.float64)
    return u, v


def _selection_bound(matrices: Real[Tensor, "B O I"], pattern: Structure) -> float:
    """Best total score of a structure without coupling between groups, written out independently of the solvers."""
    from bisparse.pattern import Paired, Sequential, Unstructured

    matrices = matrices.double()
    if isinstance(pattern, Unstructured):
        kept = pattern.kept(matrices.shape[-1] * matrices.shape[-2])
        return float(matrices.flatten(1).sort(-1, descending=True).values[:, :kept].sum())
    assert isinstance(pattern, Pattern | Sequential | Paired)
    padded = torch.nn.functional.pad(matrices, (0, -matrices.shape[-1] % pattern.m))
    groups = padded.reshape(-1, pattern.m)
    if isinstance(pattern, Sequential):
        zeros = pattern.m - pattern.n
        if zeros == 0:
            return float(groups.sum())
        windows = torch.stack([groups[:, start : start + zeros].sum(-1) for start in range(pattern.n + 1)])
        return float((groups.sum(-1) - windows.amin(0)).sum())
    if isinstance(pattern, Paired):
        groups = groups.unflatten(1, (-1, 2)).sum(-1)
        return float(groups.sort(-1, descending=True).values[:, : pattern.n // 2].sum())
    return float(groups.sort(-1, descending=True).values[:, : pattern.n].sum())


def _check_prices(
    scores: Real[Tensor, "B M M"],
    masks: Bool[Tensor, "B M M"],
    cropped: Bool[Tensor, " B"],
    certificate: Certificate,
    n: int,
    exactly: bool,
) -> None:
    tiles, m, _ = scores.shape
    if certificate.u.shape != (tiles, m) or certificate.v.shape != (tiles, m) or certificate.exponent.shape != (tiles,):
        raise CertificateError(
            f"{tiles} tiles of side {m} need prices of shape ({tiles}, {m}) and exponents ({tiles},); the certificate has "
            f"{tuple(certificate.u.shape)}, {tuple(certificate.v.shape)} and {tuple(certificate.exponent.shape)}"
        )
    if tiles == 0:
        return
    if certificate.exactly and not exactly:
        raise CertificateError('prices of the "exactly N" program prove nothing about "at most N"')
    if exactly:
        # A tile over the edge keeps the rest of its N in the padding, where the scores are zero.
        sums_hold = cropped | ((masks.sum(-1) == n).all(-1) & (masks.sum(-2) == n).all(-1))
        if not bool(sums_hold.all()):
            tile = int((~sums_hold).nonzero()[0])
            raise CertificateError(f"tile {tile}: a row or column does not keep exactly {n}")
    numbers = scores.detach().cpu()
    is_float = numbers.is_floating_point()
    numbers = numbers.double() if is_float else numbers.long()
    masks = masks.cpu()
    u, v, exponent = certificate.u.long().cpu(), certificate.v.long().cpu(), certificate.exponent.long().cpu()
    largest = numbers.flatten(1).amax(1)
    if is_float:
        # frexp writes a number as f * 2**k, 1/2 <= f < 1, so the largest score has the power of two k - 1.
        power = torch.frexp(largest).exponent.long() - 1
        coarse = (exponent < FAST_BITS - 1 - power) & (largest > 0)
    else:
        coarse = exponent < 0
    if bool(coarse.any()):
        tile = int(coarse.nonzero()[0])
        raise CertificateError(
            f"tile {tile}: exponent {int(exponent[tile])} rounds the scores more coarsely than {FAST_BITS} bits"
        )

    # 64-bit integers wherever no sum can overflow, Python's own elsewhere.
    headroom = 62 - 2 * math.ceil(math.log2(m)) - 1
    reach = torch.ldexp(largest.double(), exponent.clamp(max=2000)).nan_to_num(posinf=math.inf)
    price = torch.maximum(u.abs().amax(1), v.abs().amax(1)).double()
    narrow = (torch.maximum(reach, price) < 2.0**headroom) & (exponent <= 1000)
    for tile in certificate.wide:
        narrow[tile] = False
    q = (
        torch.ldexp(numbers[narrow].double(), exponent[narrow][:, None, None]).round().long()
        if is_float
        else (numbers[narrow] << exponent[narrow][:, None, None])
    )
    kept = (q * masks[narrow]).sum((1, 2))
    slack = (q - u[narrow][:, :, None] - v[narrow][:, None, :]).clamp(min=0)
    bound = n * (u[narrow].sum(1) + v[narrow].sum(1)) + slack.sum((1, 2))
    fails = kept != bound
    if not exactly:
        fails |= (u[narrow] < 0).any(1) | (v[narrow] < 0).any(1)
    if bool(fails.any()):
        where = int(fails.nonzero()[0])
        tile = int(narrow.nonzero()[where])
        raise CertificateError(
            f"tile {tile}: the mask keeps {int(kept[where])}, the prices bound the optimum by {int(bound[where])} "
            f"(units of 2**-{int(exponent[tile])}): not proved optimal"
        )
    for tile in (~narrow).nonzero()[:, 0].tolist():
        prices = certificate.wide.get(tile, (tuple(u[tile].tolist()), tuple(v[tile].tolist())))
        _check_wide_tile(tile, numbers[tile], masks[tile], prices, int(exponent[tile]), n, exactly)


def _check_wide_tile(
    tile: int,
    scores: Tensor,
    mask: Tensor,
    prices: tuple[tuple[int, ...], tuple[int, ...]],
    exponent: int,
    n: int,
    exactly: bool,
) -> None:
    u, v = (np.array(side, dtype=object) for side in prices)
    scale = Fraction(2) ** exponent
    q = np.array([[round(Fraction(x) * scale) for x in row] for row in scores.tolist()], dtype=object)
    kept = int((q * mask.numpy().astype(object)).sum())
    bound = int(n * (u.sum() + v.sum()) + np.maximum(q - u[:, None] - v[None, :], 0).sum())
    if kept != bound or (not exactly and min(*u, *v) < 0):
        raise CertificateError(f"tile {tile}: the mask keeps {kept}, the prices bound the optimum by {bound}: not proved optimal")


@dataclass(frozen=True)
class Violation:
    """One group that keeps too many weights."""

    side: str
    """"W" or "W^T"."""
    matrix: int
    """Which of the layer's GEMM matrices (kernel position, group, part or expert); 0 where there is one."""
    row: int
    """Row of that side's matrix."""
    group: int
    """Group along the row: entries ``group * M`` to ``group * M + M - 1``."""
    kept: int
    """How many weights the group keeps."""
    layer: str = ""

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        matrix = f"matrix {self.matrix}, " if self.matrix else ""
        return f"{where}{self.side}, {matrix}row {self.row}, group {self.group} keeps {self.kept}"


@dataclass(frozen=True)
class Verification:
    """Whether a mask, weight or model obeys a structure; truthy when it does."""

    pattern: Structure
    groups: int
    """Groups looked at, W and W^T together."""
    violations: int
    """How many of them break the structure."""
    first: Violation | None
    """The first one, in the order W before W^T, matrix, row, group."""
    density: float
    """Share of non-zero weights."""
    layer: str = ""
    layers: tuple[Verification, ...] = ()
    """For a model or a checkpoint, one entry per layer that was checked."""
    unchecked: tuple[Skipped, ...] = ()
    """For a checkpoint, the layers whose zeros could not be seen or are not constrained, and why."""
    left_out: tuple[Skipped, ...] = ()
    """For a checkpoint, the tensors that are no layers to prune by default, or that the caller left out."""

    def __bool__(self) -> bool:
        return self.violations == 0 and not (self.unchecked and not self.layers)

    @property
    def message(self) -> str:
        """One sentence: holds, or how many groups break it and where the first one is; and what was not checked."""
        subject = f"{self.layer}: " if self.layer else ""
        patterns = ", ".join(dict.fromkeys(str(one.pattern) for one in self.layers)) or str(self.pattern)
        if self.unchecked and not self.layers:
            return f"no layer was checked; {self._not_checked}"
        if self.first is not None:
            found = f"{self.violations} of {self.groups} groups break {patterns}; the first: {self.first}"
        elif self.unchecked:
            count = len(self.layers)
            found = f"{patterns} holds on {count} of {count + len(self.unchecked)} layers, {self.groups} groups"
        else:
            found = f"{patterns} holds on {self.groups} groups"
        return f"{subject}{found}; {self._not_checked}" if self.unchecked else f"{subject}{found}"

    @property
    def _not_checked(self) -> str:
        examples = "; ".join(f"{one.name} ({one.reason})" for one in self.unchecked[:4])
        more = f"; and {len(self.unchecked) - 4} more" if len(self.unchecked) > 4 else ""
        return f"{len(self.unchecked)} {'was' if len(self.unchecked) == 1 else 'were'} not checked: {examples}{more}"

    def check(self) -> Verification:
        """Raise `PatternError` unless the structure holds; returns itself."""
        if not self:
            raise PatternError(self.message)
        return self


def verify(
    target: Shaped[Tensor, "..."] | nn.Module,
    pattern: str | Structure,
    *,
    layout: Layout | None = None,
    name: str = "",
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
) -> Verification:
    """Check that a mask, a weight or every prunable layer of a model obeys a structure as the GEMMs see it.

    A weight counts as kept where it is not zero (NaN included). Transposable patterns are checked on W and on W^T.

    Args:
        target: bool mask or weight: 2-D (O, I), 3-D a batch of matrices, 4-D and 5-D a convolution; or a module.
        pattern: the structure or its text.
        layout: how a bare tensor stores its matrices, where the default above does not fit.
        name: the layer's name for messages.
        include, exclude: of a module, its layers as `prune_` was told them; by default those that `find_layers` chooses,
            without output heads and the first convolution.
        layouts: of a module, how single layers store their matrices, as `prune_` was told.
    """
    pattern = parse_pattern(pattern)
    if isinstance(target, nn.Module):
        found, _ = find_layers(target, include, exclude, layouts=layouts)
        results = tuple(verify(layer.weight, pattern, layout=layer.layout, name=layer.name) for layer in found)
        if not results:
            raise ValueError(
                "the model has no layer that a pattern applies to by default: nothing was verified; name output heads and first "
                "convolutions by include=, as in pruning"
            )
        weights = sum(layer.weight.numel() for layer in found)
        return Verification(
            pattern,
            sum(result.groups for result in results),
            sum(result.violations for result in results),
            next((result.first for result in results if result.first), None),
            sum(result.density * layer.weight.numel() for result, layer in zip(results, found, strict=True)) / max(weights, 1),
            layers=results,
        )
    if not isinstance(target, Tensor):
        raise ValueError(f"verify needs a tensor or a module, not {type(target).__name__}")
    if include is not None or exclude is not None or layouts is not None:
        raise ValueError("include, exclude and layouts are about layers of a module, and this is a tensor")
    target = target.detach()
    mask = target if target.dtype == torch.bool else target != 0
    matrices = to_matrices(mask, layout or default_layout(mask.ndim))
    sides = [("W", matrices)]
    if isinstance(pattern, Pattern) and pattern.transposable:
        sides.append(("W^T", matrices.transpose(1, 2)))
    groups, violations, first = 0, 0, None
    for side, matrix in sides:
        broken = pattern.row_violations(matrix)
        groups += broken.numel()
        violations += int(broken.sum())
        if first is None and bool(broken.any()):
            index, row, group = broken.nonzero()[0].tolist()
            span = getattr(pattern, "m", None)
            entries = matrix[index, row, group * span : (group + 1) * span] if span else matrix[index]
            first = Violation(side, index, row, group, int(entries.sum()), name)
    density = float(mask.double().mean()) if mask.numel() else 0.0
    return Verification(pattern, groups, violations, first, density, layer=name)
