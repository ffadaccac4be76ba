"""The number of masks that a structure allows, and its hardware cost: properties that need no training.

Mask diversity counts the masks that keep exactly N of M (of a tensor with T weights); a larger number leaves the optimum
less constrained. Per weight, in bits, it does not depend on the tensor.

Source: Hubara et al., "Accelerated Sparse Neural Training" (NeurIPS 2021, arXiv 2102.08124), section 3. Departure: the
paper's formula for transposable masks counts the zeros of a row in order, as if they were labelled, so it is too large, and
not the same for N and M - N; ``method="exact"`` counts the matrices themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from typing import Literal

from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured, parse_pattern

__all__ = ["Hardware", "MaskDiversity", "count_tile_masks", "hardware", "mask_diversity"]

COUNT_BITS = 1 << 20
"""A count with more bits than this is given only as its logarithm: the integer would take megabytes."""
EXACT_EFFORT = 4_000_000
"""Largest `_effort` at which the masks of a tile are counted, a second or two of work: 7:16 and 4:32 are below, 9:18 is above."""
HALF_OF_16 = 34812290428176298285394893936773707951192224124239796250
"""`count_tile_masks` at 8:16, OEIS A058527; the recursion finds it in a few seconds."""
MAX_M = 100_000
"""Largest M of which masks are counted; larger integers take minutes."""
PRODUCT_BY_INTEGERS = 512
"""Up to this M the paper's product of factorials is an integer first and a logarithm after."""
COMBINATIONS_BY_INTEGERS = 1 << 15
"""Up to this many weights a binomial coefficient is an integer first and a logarithm after."""


@dataclass(frozen=True)
class MaskDiversity:
    """How many masks a structure allows on a tensor."""

    structure: Structure
    size: int
    """Weights of the tensor, T."""
    method: Literal["exact", "paper"]
    log2: float
    """Base-2 logarithm of the number of masks."""
    exact: bool
    """False where a tile's masks are too many to enumerate and their number is an asymptotic one (see `count_tile_masks`)."""
    power: tuple[int, int] | None = field(repr=False)
    """Base and exponent of the number itself; None where `count` is."""

    def __str__(self) -> str:
        return f"{self.scientific} masks of {self.size:,} weights at {self.structure}, {self.log2_per_weight:.4f} bits per weight"

    @cached_property
    def count(self) -> int | None:
        """The number itself; None where it is asymptotic, above 2**1048576, or where T is no whole number of groups or tiles."""
        return None if self.power is None else self.power[0] ** self.power[1]

    @property
    def log2_per_weight(self) -> float:
        """Bits per weight, at most 1."""
        return self.log2 / self.size

    @property
    def scientific(self) -> str:
        """The number to four digits, however large.

        >>> mask_diversity("4:8-T", 64).scientific, mask_diversity("2:4", (8192, 8192)).scientific
        ('1.170e+11', '4.058e+13055211')
        """
        if self.log2 < 14 and self.count is not None and self.count < 10_000:
            return str(self.count)
        log10 = self.log2 * math.log10(2)
        if not self.exact:  # the logarithm is good to six digits, which says nothing about a mantissa
            return f"about 10^{float(f'{log10:.5g}'):.10g}"
        power = math.floor(log10)
        mantissa = f"{10 ** (log10 - power):.3f}"
        return f"1.000e+{power + 1}" if mantissa == "10.000" else f"{mantissa}e+{power}"


def mask_diversity(
    pattern: str | Structure, size: int | Sequence[int], method: Literal["exact", "paper"] = "exact"
) -> MaskDiversity:
    """Count the masks a structure allows on a tensor that keep exactly its number of weights.

    ==============  ==================================================================================
    50% (density)   C(T, kept)
    N:M             C(M, N) ** (T / M)
    N:M-seq         (N + 1) ** (T / M)
    N:M-paired      C(M/2, N/2) ** (T / M)
    N:M-T           (M x M matrices of 0 and 1 with all row and column sums N) ** (T / M**2)
    N:M-T, paper    (M! (M-1)! ... (N+1)!) ** (T / M**2)
    ==============  ==================================================================================

    Where T is no whole number of groups (or tiles) the exponent is a fraction, as in the formulas.

    Args:
        pattern: the structure or its text; N is the number kept.
        size: weights of the tensor, or its shape.
        method: "exact", or "paper" for the paper's formula, which differs for transposable patterns only.

    Raises:
        ValueError: a size that is not positive, an unknown method, or M above 100,000.

    >>> [mask_diversity(p, 64).count for p in ("4:8-seq", "2:4-T", "4:8-T")]
    [390625, 65610000, 116963796250]
    >>> mask_diversity("4:8-T", 64, method="paper").count
    17557585920000
    """
    structure = parse_pattern(pattern)
    if method not in ("exact", "paper"):
        raise ValueError(f"method={method!r}: expected 'exact' or 'paper'")
    sides = (size,) if isinstance(size, int) else tuple(size)
    if not sides or any(not isinstance(side, int) or isinstance(side, bool) or not 1 <= side < 1 << 63 for side in sides):
        raise ValueError(f"size={size!r}: expected a positive number of weights, or a shape of positive sides")
    weights = math.prod(sides)
    _check_size(structure)
    if isinstance(structure, Unstructured):
        log2, count = _combinations(weights, structure.kept(weights))
        return MaskDiversity(structure, weights, method, log2, True, None if count is None else (count, 1))
    one: int | None
    match structure:
        case Pattern(n, m, transposable=False):
            one, unit = math.comb(m, n), m
        case Sequential(n, m):
            one, unit = (n + 1 if n < m else 1), m
        case Paired(n, m):
            one, unit = math.comb(m // 2, n // 2), m
        case Pattern(n, m):
            unit = m * m
            if method == "paper" and m > PRODUCT_BY_INTEGERS:
                nats = math.fsum(math.lgamma(side + 1) for side in range(n + 1, m + 1))
                return MaskDiversity(structure, weights, method, weights / unit * nats / math.log(2), True, None)
            one = math.prod(math.factorial(side) for side in range(n + 1, m + 1)) if method == "paper" else count_tile_masks(n, m)
        case _:
            raise AssertionError(structure)
    exponent = Fraction(weights, unit)
    if one is None:
        return MaskDiversity(
            structure, weights, method, float(exponent) * _log2_tile_masks(structure.n, structure.m), False, None
        )
    log2 = float(exponent) * math.log2(one)
    whole = exponent.denominator == 1 and log2 <= COUNT_BITS
    return MaskDiversity(structure, weights, method, log2, True, (one, exponent.numerator) if whole else None)


def _check_size(structure: Structure) -> None:
    if getattr(structure, "m", 0) > MAX_M:
        raise ValueError(f"{structure}: masks are counted up to M = {MAX_M:,}")


def _combinations(total: int, chosen: int) -> tuple[float, int | None]:
    """log2 C(total, chosen), and the integer where it is no larger than `COUNT_BITS`."""
    if total <= COMBINATIONS_BY_INTEGERS:
        count = math.comb(total, chosen)
        return math.log2(count), count
    nats = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return nats / math.log(2), None


def _effort(n: int, m: int) -> int:
    """Roughly how long `count_tile_masks` takes: multisets of column sums, times rows."""
    return math.comb(m + n, n) * m


def count_tile_masks(n: int, m: int) -> int | None:
    """Number of m x m matrices of 0 and 1 whose rows and columns all sum to n; None where enumeration would take too long.

    Row by row, over the multiset of column sums, to half of the rows; the other half is the same seen from below. Exact
    for all m <= 16, and beyond where n or m - n is small. Elsewhere `mask_diversity` uses the asymptotic count of Canfield and
    McKay (Electronic Journal of Combinatorics 12, 2005, R29), whose relative error at 50 % is about 1/(60 m).

    >>> [count_tile_masks(n, m) for n, m in ((1, 2), (1, 4), (2, 4), (2, 8), (4, 8))]
    [2, 24, 90, 187530840, 116963796250]
    """
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in (n, m)) or not 0 <= n <= m <= MAX_M:
        raise ValueError(f"n={n!r:.40}, m={m!r:.40}: expected whole numbers, 0 <= n <= m <= {MAX_M:,}")
    n = min(n, m - n)  # the complement of a mask has the other sums
    if n <= 1:
        return math.factorial(m) if n else 1
    if (n, m) == (8, 16):
        return HALF_OF_16
    return _count_by_rows(n, m) if _effort(n, m) <= EXACT_EFFORT else None


@cache
def _count_by_rows(n: int, m: int) -> int:
    bits = m.bit_length()
    top = _column_sums(m // 2, m, n)
    bottom = _column_sums(m - m // 2, m, n) if m % 2 else top
    matrices = 0
    for state, ways in top.items():
        histogram = [state >> bits * total & (1 << bits) - 1 for total in range(n + 1)]
        rest = sum(columns << bits * (n - total) for total, columns in enumerate(histogram))
        if rest in bottom:
            arrangements = math.factorial(m) // math.prod(math.factorial(columns) for columns in histogram)
            matrices += ways * bottom[rest] // arrangements
    return matrices


def _column_sums(rows: int, m: int, n: int) -> dict[int, int]:
    """Matrices of `rows` rows that keep n of m each, no column above n, counted by the multiset of their column sums.

    A multiset is encoded as an integer: its s-th field of ``m.bit_length()`` bits is the number of columns with sum s.
    """
    bits = m.bit_length()
    choose = [[math.comb(size, chosen) for chosen in range(size + 1)] for size in range(m + 1)]
    states = {m: 1}
    for row in range(rows):
        following: dict[int, int] = {}
        for state, ways in states.items():
            # Classes of columns with equal sums; one more kept entry moves a column to the next class.
            classes = [
                (size, (1 << bits * (total + 1)) - (1 << bits * total))
                for total in range(min(row, n - 1) + 1)
                if (size := state >> bits * total & (1 << bits) - 1)
            ]
            room = sum(size for size, _ in classes)
            partial = [(n, state, ways)]
            for size, move in classes[:-1]:
                room -= size
                partial = [
                    (left - chosen, reached + chosen * move, count * choose[size][chosen])
                    for left, reached, count in partial
                    for chosen in range(max(0, left - room), min(size, left) + 1)
                ]
            size, move = classes[-1]
            for left, reached, count in partial:
                if left <= size:
                    end = reached + left * move
                    following[end] = following.get(end, 0) + count * choose[size][left]
        states = following
    return states


def _log2_tile_masks(n: int, m: int) -> float:
    """Canfield and McKay's estimate of log2 `count_tile_masks`: C(m,n)^2m / C(m^2,mn) ((m-1)/m)^(m-1) e^(1/2)."""
    pairs = 2 * m * _combinations(m, n)[0] - _combinations(m * m, m * n)[0]
    return pairs + ((m - 1) * math.log1p(-1 / m) + 0.5) / math.log(2)


@dataclass(frozen=True)
class Hardware:
    """What it takes hardware to multiply by weights of a pattern, and which products get sparse: returned by `hardware`."""

    structure: Structure
    density: float
    """Largest fraction of weights kept."""
    selectors: int | None
    """Multiplexers per group to fetch the inputs of its kept weights; None for an unstructured mask."""
    selector_inputs: int | None
    """Inputs of each: the k-th kept entry of N:M sits in one of M - N + 1 places, a (M-N+1):1 selector."""
    metadata_bits_packed: float | None
    """Bits per weight of the index of each group's kept set among those that the structure allows."""
    metadata_bits_per_kept: int | None
    """Bits per kept entry (per kept pair, for paired patterns) of its position in the group, as hardware stores it."""
    sparse_gemms: int
    """How many of a training step's three GEMMs (forward, input gradient, weight gradient) the weight's mask makes sparse."""
    sparse_gemms_with_gradient: int
    """The same where the output gradient is itself made 2:4 by an unbiased estimator (MVUE, Chmiel et al., arXiv 2203.10991)."""
    tensor_cores: bool
    """Whether today's sparse tensor cores support it."""
    note: str
    """What that means, in a sentence or two."""

    @property
    def selector(self) -> str:
        """The selector's ratio, such as ``"5:1"``; empty for an unstructured mask."""
        return f"{self.selector_inputs}:1" if self.selector_inputs else ""


def hardware(pattern: str | Structure) -> Hardware:
    """Selectors, metadata, sparse GEMMs and today's tensor cores, for one structure.

    >>> h = hardware("4:8-T")
    >>> h.selectors, h.selector, h.metadata_bits_per_kept, h.sparse_gemms, h.tensor_cores
    (4, '5:1', 3, 2, False)
    """
    structure = parse_pattern(pattern)
    _check_size(structure)
    runs, note = _tensor_cores(structure)
    if isinstance(structure, Unstructured):
        return Hardware(structure, structure.density, None, None, None, None, 0, 1, runs, note)
    assert isinstance(structure, Pattern | Sequential | Paired)
    n, m = structure.n, structure.m
    match structure:
        case Sequential():
            # A kept entry stands before the zeros or after them: one of two places.
            selectors, inputs, masks, places = n, 2, n + 1, m
        case Paired():
            selectors, inputs, masks, places = n // 2, (m - n) // 2 + 1, math.comb(m // 2, n // 2), m // 2
        case Pattern():
            selectors, inputs, masks, places = n, m - n + 1, math.comb(m, n), m
    gemms = 2 if isinstance(structure, Pattern) and structure.transposable else 1
    if n == m:
        selectors, inputs, masks, places, gemms = 0, 1, 1, 1, 0
    return Hardware(structure, n / m, selectors, inputs, _bits(masks) / m, _bits(places), gemms, gemms + 1, runs, note)


def two_of_four_windows(pattern: Pattern) -> int | None:
    """How many windows of four neighbouring inputs per group, each keeping two, hold every mask of an N:M pattern.

    With windows at inputs 0-3, 2-5, ... of a group of M = 2k, k - 1 windows hold every (M-2):M, and every sparser pattern. None
    where that does not apply, and for M above 8, where it saves little. Source: SlideSparse, arXiv 2603.05232.

    >>> [two_of_four_windows(Pattern(*one, transposable=False)) for one in ((4, 6), (6, 8), (4, 8), (7, 8))]
    [2, 3, 3, None]
    """
    n, m = pattern.n, pattern.m
    return m // 2 - 1 if m in (6, 8) and n <= m - 2 else None


def _bits(states: int) -> int:
    return (states - 1).bit_length()


def _tensor_cores(structure: Structure) -> tuple[bool, str]:
    if isinstance(structure, Unstructured):
        return False, "No tensor core skips unstructured zeros: storage shrinks, the GEMMs stay dense."
    assert isinstance(structure, Pattern | Sequential | Paired)
    n, m = structure.n, structure.m
    if n == m:
        return False, "Nothing is pruned."
    # Structures that cannot keep 3 of an aligned 4: it touches two groups at most where N is 1, one where 4 divides M.
    if n == 1 or (n == 2 and m % 4 == 0):
        both_ways = isinstance(structure, Pattern) and structure.transposable
        runs = "forward and input gradient run" if both_ways else "the forward pass runs"
        subject = "It" if isinstance(structure, Pattern) and m == 4 and n == 2 else f"Every {structure} mask is also 2:4, which"
        return True, f"{subject} is what sparse tensor cores take (NVIDIA, since Ampere): {runs} on them today."
    if isinstance(structure, Paired) and (n, m) == (4, 8):
        return True, "It is what FP4 sparse tensor cores take (NVIDIA Blackwell), in FP4 only: the forward pass runs on them."
    if isinstance(structure, Pattern) and (windows := two_of_four_windows(structure)) is not None:
        work = 4 * windows / (2 * m)
        return False, (
            f"No tensor core takes it today. 2:4 hardware can carry it as {windows} overlapping 2:4 windows per {m} inputs, at "
            f"{work:.3g} of the dense product's work, so at most {1 / work:.3g} times as fast; bisparse does not run it that way."
        )
    inputs = 2 if isinstance(structure, Sequential) else m - n + 1
    return False, f"No tensor core takes it today: it saves storage, and waits for hardware with {inputs}:1 selectors."
