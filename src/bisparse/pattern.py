"""The structures a mask may have: N:M, transposable, sequential, paired, unstructured.

N is the number of weights KEPT of every M, as in NVIDIA's 2:4. (SparseGPT, Wanda and the paper this library implements
count the zeros; at 50 % the two readings agree.) Every structure allows AT MOST its number: that is what hardware
checks, and it survives cropping at the edge of a matrix.

A group is M consecutive entries of one row (or, for the transpose, of one column); a tile is an M x M square.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bisparse.arguments import check_flag, is_number

__all__ = ["Paired", "Pattern", "Sequential", "Structure", "Unstructured", "parse_pattern"]

LARGE_MATRIX = 1 << 14
"""Entries from which matrices are counted one by one."""
_FORMS = "'2:4' (N kept of M), '4:8-T' (transposable), '4:8-seq' (sequential), '4:8-paired', or '50%' (unstructured density)"


class Structure(ABC):
    """What a mask must obey. Final subclasses: `Pattern`, `Sequential`, `Paired`, `Unstructured`."""

    @property
    @abstractmethod
    def density(self) -> float:
        """Largest fraction of weights kept, in (0, 1]."""

    @abstractmethod
    def row_violations(self, mask: Bool[Tensor, "*B R C"]) -> Bool[Tensor, "*B R G"]:
        """Groups along the last dimension that break the structure, `True` = broken. The last group may be short."""

    @staticmethod
    def parse(text: str | Structure) -> Structure:
        """Read a structure from its text; a structure passes through. See `parse_pattern`."""
        return parse_pattern(text)


def _check_n_m(structure: Paired | Pattern | Sequential) -> None:
    n, m = structure.n, structure.m
    if not (isinstance(n, int) and isinstance(m, int)) or isinstance(n, bool) or isinstance(m, bool):
        raise ValueError(f"pattern {n!r}:{m!r}: N and M must be whole numbers, like 2:4")
    if m < 2 or not 1 <= n <= m:
        raise ValueError(
            f"pattern {n}:{m} does not exist: N (kept) must be between 1 and M, and M at least 2. "
            "N counts the weights KEPT of every M, as in NVIDIA's 2:4."
        )


def row_groups(mask: Bool[Tensor, "*B R C"], m: int) -> Bool[Tensor, "*B R G M"]:
    """Split the last dimension into groups of `m`; a short last group is completed with pruned entries."""
    missing = -mask.shape[-1] % m
    if missing:
        mask = torch.nn.functional.pad(mask, (0, missing), value=False)
    return mask.unflatten(-1, (mask.shape[-1] // m, m))


@dataclass(frozen=True)
class Pattern(Structure):
    """At most `n` kept of every `m` consecutive weights along `in_features`; if transposable along `out_features` too.

    >>> Pattern(4, 8, transposable=True), str(Pattern(4, 8, transposable=True))
    (Pattern(n=4, m=8, transposable=True), '4:8-T')
    >>> Pattern.parse("2:4").density
    0.5
    """

    n: int
    m: int
    transposable: bool = False

    def __post_init__(self) -> None:
        check_flag("transposable", self.transposable)
        _check_n_m(self)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + ("-T" if self.transposable else "")

    @property
    def density(self) -> float:
        return self.n / self.m

    def row_violations(self, mask: Bool[Tensor, "*B R C"]) -> Bool[Tensor, "*B R G"]:
        kept: Int[Tensor, "*B R G"] = row_groups(mask, self.m).sum(-1)
        return kept > self.n


@dataclass(frozen=True)
class Sequential(Structure):
    """N:M whose `m - n` zeros are adjacent in every group ("sequential" in the paper, section 3)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        _check_n_m(self)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}-seq"

    @property
    def density(self) -> float:
        return self.n / self.m

    def row_violations(self, mask: Bool[Tensor, "*B R C"]) -> Bool[Tensor, "*B R G"]:
        groups = row_groups(mask, self.m)
        zeros = self.m - self.n
        if zeros == 0:
            return torch.zeros(groups.shape[:-1], dtype=torch.bool, device=mask.device)
        # A group obeys if some window of `zeros` entries has nothing kept.
        return groups.unfold(-1, zeros, 1).any(-1).all(-1)


@dataclass(frozen=True)
class Paired(Structure):
    """N:M whose entries are kept or pruned in adjacent pairs: 4:8-paired is what FP4 sparse tensor cores take."""

    n: int
    m: int

    def __post_init__(self) -> None:
        _check_n_m(self)
        if self.n % 2 or self.m % 2:
            raise ValueError(f"pattern {self.n}:{self.m}-paired: N and M must be even, since pairs are kept together")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}-paired"

    @property
    def density(self) -> float:
        return self.n / self.m

    def row_violations(self, mask: Bool[Tensor, "*B R C"]) -> Bool[Tensor, "*B R G"]:
        pairs = row_groups(mask, self.m).unflatten(-1, (self.m // 2, 2)).any(-1)
        return pairs.sum(-1) > self.n // 2


@dataclass(frozen=True)
class Unstructured(Structure):
    """Any entries, at most a fraction `fraction` of each matrix: a matrix of T weights keeps at most round(fraction * T)."""

    fraction: float

    def __post_init__(self) -> None:
        if not (is_number(self.fraction) and 0.0 < self.fraction <= 1.0):
            raise ValueError(f"unstructured density {self.fraction!r}: must be above 0 % and at most 100 %")

    def __str__(self) -> str:
        return f"{100 * self.fraction:.10g}%"

    @property
    def density(self) -> float:
        return self.fraction

    def kept(self, size: int) -> int:
        """Number of weights kept in a matrix of `size` weights."""
        return round(self.fraction * size)

    def row_violations(self, mask: Bool[Tensor, "*B R C"]) -> Bool[Tensor, "*B R G"]:
        # The whole matrix is one group; it is reported at its first row.
        broken = torch.zeros((*mask.shape[:-1], 1), dtype=torch.bool, device=mask.device)
        if mask.shape[-2]:
            if mask.numel() and mask.shape[-2] * mask.shape[-1] >= LARGE_MATRIX:
                # Twenty times as fast as a sum over dimensions of a bool tensor.
                matrices = mask.reshape(-1, *mask.shape[-2:])
                counts = torch.stack([one.count_nonzero() for one in matrices]).view(mask.shape[:-2])
            else:
                counts = mask.sum((-2, -1))
            broken[..., 0, 0] = counts > self.kept(mask.shape[-2] * mask.shape[-1])
        return broken


def parse_pattern(text: str | Structure) -> Structure:
    """Read a structure from its text; `str` is the inverse.

    >>> [str(parse_pattern(t)) for t in ("2:4", "4:8-T", "4:8-seq", "4:8-paired", "50%")]
    ['2:4', '4:8-T', '4:8-seq', '4:8-paired', '50%']

    Raises:
        ValueError: the text is no structure, or one that cannot exist such as ``"5:4"``.
    """
    if isinstance(text, str):
        return _parse_text(text)
    if not isinstance(text, Structure):
        raise ValueError(f"pattern {text!r}: expected a text such as {_FORMS}")
    return text


@lru_cache
def _parse_text(text: str) -> Structure:
    stripped = text.strip()
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", stripped):
        return Unstructured(float(percent[1]) / 100)
    if ratio := re.fullmatch(r"(\d{1,6}):(\d{1,6})(?:-(T|seq|paired))?", stripped):
        n, m = int(ratio[1]), int(ratio[2])
        match ratio[3]:
            case "seq":
                return Sequential(n, m)
            case "paired":
                return Paired(n, m)
            case suffix:
                return Pattern(n, m, transposable=suffix == "T")
    meant = _meant(stripped)
    hint = f"; did you mean {meant!r}? Expected" if meant else ": expected"
    raise ValueError(f"pattern {text!r:.100} is unknown{hint} {_FORMS}")


def _meant(text: str) -> str | None:
    """The pattern that a text with another case, separator or suffix stands for; None if it resembles none."""
    if ratio := re.fullmatch(r"(\d{1,6})\s*[:/;,x]\s*(\d{1,6})[\s_-]*([a-z]*)", text.lower()):
        suffix = next((f"-{one}" for one in ("T", "seq", "paired") if ratio[3] and _resembles(ratio[3], one)), "")
        candidate = f"{ratio[1]}:{ratio[2]}{suffix}" if suffix or not ratio[3] else ""
    elif fraction := re.fullmatch(r"(\d*\.?\d+)\s*(?:%|percent)?", text.lower()):
        value = float(fraction[1])
        candidate = f"{100 * value:.10g}%" if value < 1 else f"{value:.10g}%"
    else:
        return None
    try:
        return str(_parse_text(candidate)) if candidate and candidate != text else None
    except ValueError:
        return None


def _resembles(given: str, suffix: str) -> bool:
    """Whether one of them begins with the other: "t", "transposable", "sequential", "pair"."""
    known = {"T": "transposable", "seq": "sequential", "paired": "paired"}[suffix]
    return known.startswith(given) or given.startswith(known[:5])
