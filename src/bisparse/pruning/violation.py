"""Pattern violation: how far a mask is from a pattern, compared with random masks, and the sparsest pattern that fits.

    v_w = fraction of the kept weights (or of their score) that the best mask of the pattern must drop
    v_b = fraction of the pattern's groups that keep too many

Both are compared with random masks: unstructured ones of the same density, and ones of the N:M that the mask obeys.

Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, section 5: conversion without training works for small violation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor
from torch.nn import functional

from bisparse._solve import solve
from bisparse.arguments import check_dense, check_flag, is_number
from bisparse.pattern import Pattern, Structure, Unstructured, parse_pattern, row_groups
from bisparse.tiles import Layout, default_layout, to_matrices
from bisparse.verification import verify

__all__ = [
    "CONFIDENCE",
    "PatternViolation",
    "check_group",
    "kept_counts",
    "predicted_violation",
    "sparsest_for",
    "sparsest_pattern",
    "violation",
]

MAX_M = 1024
"""Of larger groups, numbers of masks exceed float64."""
SIMULATED_TILES = 256
MAX_PERIOD = 512
"""Simulated matrices are enlarged to all alignments of two sizes of groups up to this least common multiple."""
CONFIDENCE = 0.95
"""Minimum fraction of groups that fit a pattern for it to be proposed."""
ORIGINS = (2, 4, 8, 16, 32, 64)
"""Group sizes M for which the mask is tested for an N:M."""
FULL = 0.98
"""Minimum fraction of the weights allowed by an N:M that a mask must keep to count as a mask of that N:M."""


@dataclass(frozen=True)
class PatternViolation:
    """How far a mask is from a pattern. All figures are fractions in [0, 1]."""

    pattern: Structure
    weights: float
    """v_w: fraction of the kept weights (of their score, if scores were given) that the pattern must drop."""
    groups: float
    """v_b: fraction of the pattern's groups, of W and for transposable patterns of W^T, that keep too many."""
    predicted_weights: float | None
    """v_w of a random unstructured mask of the same density; None if the pattern is unstructured."""
    predicted_groups: float | None
    """v_b of a random unstructured mask of the same density; None if the pattern is unstructured."""
    origin: Pattern | None = None
    """The N:M of smallest M that the mask obeys and fills; None if there is none."""
    origin_weights: float | None = None
    """v_w of a random mask of `origin`."""
    origin_groups: float | None = None
    """v_b of a random mask of `origin`."""


MAX_GROUP = 1 << 16
"""Maximum group size."""


def check_group(name: str, m: int) -> None:
    """Raise ValueError unless m is the size of a group."""
    if isinstance(m, bool) or not isinstance(m, int) or not 2 <= m <= MAX_GROUP:
        raise ValueError(f"{name}={m!r:.40}: expected the size of a group, 2 to {MAX_GROUP}")


def _check_fraction(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r:.40}: expected a fraction in [0, 1]")


def violation(
    mask: Shaped[Tensor, "..."],
    pattern: str | Structure,
    scores: Real[Tensor, "..."] | None = None,
    *,
    layout: Layout | None = None,
) -> PatternViolation:
    """Measure how far a mask, or the non-zeros of a weight, is from a pattern.

    Args:
        mask: bool, or a weight whose non-zeros are the mask.
        pattern: the target. For an unstructured one the violation is the excess over its density, and random masks are not
            compared with.
        scores: the value of each weight; by default every kept weight counts the same.

    >>> mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    >>> found = violation(mask, "2:4")
    >>> round(found.weights, 3), found.groups
    (0.2, 0.5)
    """
    pattern = parse_pattern(pattern)
    check_dense("mask", mask)
    if scores is not None:
        check_dense("scores", scores)
        if scores.shape != mask.shape:
            raise ValueError(f"a mask of shape {tuple(mask.shape)} needs scores of that shape, not {tuple(scores.shape)}")
    kept: Bool[Tensor, "..."] = mask if mask.dtype == torch.bool else mask != 0
    layout = default_layout(kept.ndim) if layout is None else layout
    worth = kept.float() if scores is None else torch.where(kept, scores.double(), 0.0)
    total = float(worth.double().sum())
    solution = solve(worth, pattern, layout=layout)
    lost = 1 - solution.value / total if total > 0 else 0.0
    found = verify(kept, pattern, layout=layout)
    density = float(kept.double().mean()) if kept.numel() else 0.0
    groups = found.violations / max(1, found.groups)
    origin = _origin(kept, layout, density)
    if isinstance(pattern, Unstructured):
        return PatternViolation(pattern, max(0.0, lost), groups, None, None, origin)
    chance = predicted_violation(density, pattern)
    if origin is None:
        return PatternViolation(pattern, max(0.0, lost), groups, *chance)
    return PatternViolation(pattern, max(0.0, lost), groups, *chance, origin, *predicted_violation(origin, pattern))


def _origin(kept: Bool[Tensor, "..."], layout: Layout, density: float) -> Pattern | None:
    if not 0 < density < 1:
        return None
    _, rows, columns = to_matrices(kept, layout).shape
    for m in (size for size in ORIGINS if columns % size == 0):
        most = int(kept_counts(kept, m, layout=layout).nonzero().max())
        if most < m and density >= FULL * most / m:
            both = int(kept_counts(kept, m, transposable=True, layout=layout).nonzero().max())
            return Pattern(most, m, transposable=both == most and rows % m == 0)
    return None


def predicted_violation(origin: float | str | Structure, pattern: str | Structure) -> tuple[float, float]:
    """Expected (v_w, v_b) of random masks of a density, or of random masks that obey an N:M.

    With Z = M - N required zeros and every weight pruned with probability p, a group fits with probability
    ``sum over i >= Z of C(M, i) p^i (1-p)^(M-i)``; from an N:M mask the counts are hypergeometric, or sums of these where
    neither M divides the other. For a transposable pattern v_w has no closed form and is measured on random tiles (seeded,
    solved exactly); so are both for paired and sequential patterns.

    >>> [round(share, 4) for share in predicted_violation(0.5, "2:4")]  # density 0.5
    [0.1875, 0.3125]
    >>> [round(share, 4) for share in predicted_violation("4:8", "2:4")]
    [0.1286, 0.2429]
    """
    pattern = parse_pattern(pattern)
    if isinstance(pattern, Unstructured):
        raise ValueError(
            f"the violation of {pattern} by random masks is not defined: expected a pattern such as '2:4' or '4:8-T'"
        )
    if isinstance(origin, float | int):
        _check_fraction("origin", origin)
    else:
        origin = parse_pattern(origin)
        if not isinstance(origin, Pattern):
            origin = origin.density
    for one in (pattern, origin):
        if getattr(one, "m", 1) > MAX_M:
            raise ValueError(f"{one}: the violation by random masks is computed for M up to {MAX_M}")
    if not isinstance(pattern, Pattern):
        return _simulated(origin, pattern)
    chances = _count_chances(origin, pattern.m)
    over = {count: chance for count, chance in chances.items() if count > pattern.n}
    mean = sum(count * chance for count, chance in chances.items())
    groups = sum(over.values())
    weights = sum((count - pattern.n) * chance for count, chance in over.items()) / mean if mean else 0.0
    if pattern.transposable:
        # Along the columns, entries are independent, since a plain N:M only constrains rows.
        plain = isinstance(origin, Pattern) and not origin.transposable
        columns = _count_chances(origin.density, pattern.m) if plain and isinstance(origin, Pattern) else chances
        groups = (groups + sum(chance for count, chance in columns.items() if count > pattern.n)) / 2
        weights = _simulated(origin, pattern)[0] if groups > 0 else 0.0
    return weights, groups


def _count_chances(origin: float | Pattern, m: int) -> dict[int, float]:
    """Probability of each number of kept weights in a group of m."""
    if not isinstance(origin, Pattern):
        return {k: comb(m, k) * origin**k * (1 - origin) ** (m - k) for k in range(m + 1)}
    if origin.m % m == 0:
        ways = comb(origin.m, origin.n)
        return {k: comb(m, k) * comb(origin.m - m, origin.n - k) / ways for k in range(min(m, origin.n) + 1)}
    if m % origin.m == 0:
        return {origin.n * (m // origin.m): 1.0}
    return _straddling_chances(origin, m)


def _straddling_chances(origin: Pattern, m: int) -> dict[int, float]:
    """The same for groups that begin or end within groups of `origin`, which are independent, over all alignments of both."""
    pieces = _piece_chances(origin)
    starts = range(0, origin.m, math.gcd(origin.m, m))
    chances = torch.zeros(m + 1, dtype=torch.float64, device="cpu")
    for start in starts:
        head = min(-start % origin.m, m)
        whole, tail = divmod(m - head, origin.m)
        first, last = (pieces[length, : min(length, origin.n) + 1] for length in (head, tail))
        both = functional.conv1d(first[None, None], last.flip(0)[None, None], padding=len(last) - 1)[0, 0]
        chances[whole * origin.n :][: len(both)] += both
    return {count: chance / len(starts) for count, chance in enumerate(chances.tolist()) if chance > 0}


def _piece_chances(origin: Pattern) -> Float[Tensor, " M N+1"]:
    """Probability of each number of kept weights in a part of each size of a group of `origin`, from 0 to M - 1."""
    counts = torch.arange(origin.n + 1, dtype=torch.float64, device="cpu")
    chances = torch.zeros(origin.m, origin.n + 1, dtype=torch.float64, device="cpu")
    chances[0, 0] = 1
    for length in range(1, origin.m):
        # Of the weights not yet in the part, one more is kept with this probability.
        kept = ((origin.n - counts) / (origin.m - length + 1)).clamp(max=1)
        chances[length] = chances[length - 1] * (1 - kept)
        chances[length, 1:] += (chances[length - 1] * kept)[:-1]
    return chances


def _simulated(origin: float | Pattern, pattern: Structure) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    side = whole = getattr(pattern, "m", 1) * math.isqrt(SIMULATED_TILES)
    if isinstance(origin, Pattern):
        period = math.lcm(getattr(pattern, "m", 1), origin.m)  # of alignments of both groups
        if period <= max(side, MAX_PERIOD):
            side = _rounded_up(side, period)
        whole = _rounded_up(side, origin.m)
    draws = torch.rand(whole, whole, generator=generator, dtype=torch.float32, device="cpu")
    mask = solve(draws, origin).mask[:side, :side] if isinstance(origin, Pattern) else draws < origin
    total = float(mask.sum())
    found = verify(mask, pattern)
    return 1 - solve(mask.float(), pattern).value / total if total else 0.0, found.violations / found.groups


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def kept_counts(
    kept: Bool[Tensor, "..."], m: int, *, transposable: bool = False, layout: Layout | None = None
) -> Int[Tensor, " M+1"]:
    """The numbers of groups of `m` that keep 0, 1, ..., m; of W and, if transposable, of W^T."""
    matrices = to_matrices(kept, default_layout(kept.ndim) if layout is None else layout)
    sides = [matrices, matrices.transpose(1, 2)] if transposable else [matrices]
    return torch.stack([row_groups(side, m).sum(-1).flatten().bincount(minlength=m + 1) for side in sides]).sum(0)


def sparsest_for(counts: Int[Tensor, " M+1"], confidence: float = CONFIDENCE, *, transposable: bool = False) -> Pattern | None:
    """The sparsest N:M that at least a fraction `confidence` of the groups in `kept_counts` fits; None if no N < M does."""
    total, fitting = int(counts.sum()), counts.cumsum(0).tolist()
    m = len(fitting) - 1
    return next((Pattern(n, m, transposable) for n in range(1, m) if total and fitting[n] >= confidence * total), None)


def sparsest_pattern(
    zeros: float | Shaped[Tensor, "..."],
    m: int,
    *,
    confidence: float = CONFIDENCE,
    transposable: bool = False,
    layout: Layout | None = None,
) -> Pattern | None:
    """The sparsest N:M for existing zeros: at least a fraction `confidence` of the groups keeps N or fewer.

    Args:
        zeros: the fraction of zeros, at random positions (the `extract_topk` idea of the paper's code); or a mask or weight,
            whose own groups are counted.

    Returns:
        The pattern, or None if even (M - 1):M does not fit.

    >>> str(sparsest_pattern(0.8, 8))
    '4:8'
    """
    if not (is_number(confidence) and 0 < confidence <= 1):
        raise ValueError(f"confidence={confidence!r}: expected a fraction above 0 and at most 1")
    check_group("m", m)
    check_flag("transposable", transposable)
    if isinstance(zeros, Tensor):
        check_dense("zeros", zeros)
        kept = zeros if zeros.dtype == torch.bool else zeros != 0
        return sparsest_for(kept_counts(kept, m, transposable=transposable, layout=layout), confidence, transposable=transposable)
    _check_fraction("zeros", zeros)
    chances = _count_chances(1 - float(zeros), m)
    for n in range(1, m):
        if sum(chance for count, chance in chances.items() if count <= n) >= confidence:
            return Pattern(n, m, transposable)
    return None
