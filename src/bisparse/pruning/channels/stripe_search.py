"""Better groups of four columns: tries every division of two stripes, best pairs first, with random escapes.

Guarantee: the score kept never falls, and at the end no division of two stripes is better, nor was one after `MAX_ESCAPES` swaps
drawn at random. Cost: (C / 4)^2 / 2 pairs of stripes, 35 divisions each, over R rows; later sweeps visit only changed pairs. If a
sweep would exceed `MAX_WORK`, it uses a subset of evenly spaced rows.
Source: Pool and Yu, "Channel permutations for N:M sparsity", NeurIPS 2021: stripe groups of two, bounded regressions.
Departures: it starts from several divisions; an escape is undone if the search after it does not recover the loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["refine_stripes"]

MAX_ESCAPES = 100
MAX_WORK = 1 << 36
"""Largest R x C^2 that is searched: some seconds for the first sweep."""
MIN_RELATIVE_GAIN = 1e-6
"""Minimum gain of a division relative to the two stripes' score; above the rounding error of float32 sums."""


class _Stripes:
    """Stripes, with the gain of the best division for each pair of them."""

    def __init__(self, columns: Float[Tensor, "C R"], members: Int[Tensor, "S 4"], n: int) -> None:
        from bisparse.pruning.channels.stripe_kernel import DIVISIONS, best_divisions  # numba takes a second to import

        self.divisions, self.search = torch.tensor(DIVISIONS, device="cpu"), best_divisions
        self.columns, self.members, self.n = columns, members.clone(), n
        self.pairs = torch.triu_indices(len(members), len(members), 1, device="cpu").t().contiguous()
        self.gains, self.choices = (
            torch.zeros(len(self.pairs), dtype=torch.float64, device="cpu"),
            torch.zeros(len(self.pairs), dtype=torch.int64, device="cpu"),
        )
        self.look_again(torch.ones(len(members), dtype=torch.bool, device="cpu"))

    def look_again(self, changed: Bool[Tensor, " S"]) -> None:
        """Search the pairs again that have a changed stripe."""
        where = changed[self.pairs].any(1).nonzero()[:, 0]
        self.gains[where], self.choices[where] = self.search(
            self.columns, self.members, self.pairs[where], self.n, MIN_RELATIVE_GAIN
        )

    def settle(self) -> float:
        """Divide pairs again, best first, until no division is better; returns the score gained."""
        gained = 0.0
        while True:
            better = (self.gains > 0).nonzero()[:, 0]
            if not len(better):
                return gained
            changed = torch.zeros(len(self.members), dtype=torch.bool, device="cpu")
            for p in better[self.gains[better].argsort(descending=True, stable=True)].tolist():
                pair = self.pairs[p]
                if not changed[pair].any():
                    changed[pair] = True
                    self.members[pair] = self.members[pair].reshape(8)[self.divisions[self.choices[p]]].view(2, 4)
                    gained += float(self.gains[p])
            self.look_again(changed)

    def kept(self, stripes: Int[Tensor, " S"]) -> float:
        """The score that some stripes keep."""
        return float(self.columns[self.members[stripes]].topk(self.n, dim=1).values.sum(dtype=torch.float64))


def refine_stripes(
    scores: Float[Tensor, "R C"], starts: Int[Tensor, "K S 4"], n: int, generator: torch.Generator
) -> Int[Tensor, "S 4"]:
    """Stripes of four columns that keep more at n of four, refined from the best start; deterministic for a generator.

    Args:
        scores: non-negative.
        starts: divisions of the same columns into stripes.
    """
    from bisparse.pruning.channels.stripe_kernel import LANES

    step = max(1, -(-scores.shape[0] * scores.shape[1] ** 2 // MAX_WORK))
    rows = scores[::step].detach().cpu().float()
    columns = torch.nn.functional.pad(rows.t(), (0, -len(rows) % LANES)).contiguous()
    settled = [_Stripes(columns, members.cpu(), n) for members in starts]
    count = starts.shape[1]
    for stripes in settled:
        stripes.settle()
    stripes = max(settled, key=lambda one: one.kept(torch.arange(count, device="cpu")))
    for _ in range(MAX_ESCAPES if count > 1 else 0):
        before = stripes.members.clone(), stripes.gains.clone(), stripes.choices.clone()
        pair = torch.randperm(count, generator=generator, device="cpu")[:2]
        places = torch.randint(4, (2,), generator=generator, device="cpu")
        kept = stripes.kept(pair)
        stripes.members[pair, places] = stripes.members[pair, places].flip(0)
        lost = kept - stripes.kept(pair)
        stripes.look_again(torch.zeros(count, dtype=torch.bool, device="cpu").index_fill_(0, pair, True))
        if stripes.settle() <= lost + MIN_RELATIVE_GAIN * kept:
            stripes.members, stripes.gains, stripes.choices = before
    return stripes.members.to(starts.device)
