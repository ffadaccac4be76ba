"""Channel permutation for 2:4: our search beside stripe groups, the search of NVIDIA's ASP, on real layers.

    python benchmarks/pruning/permutation.py MODEL.safetensors [--tensors NAME ...]

Stripe groups are written out here in plain torch, after Pool and Yu (NeurIPS 2021): the best of the 35 divisions of every two
stripes of four columns, applied best first until none is better; then a column of one stripe is swapped with one of another at
random and the search goes on, 100 times; the best order seen counts. ASP's own code needs a GPU; its times are not compared.
Rows: benchmarks/results/pruning_permutation.jsonl.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from pathlib import Path

import torch
from experiment import Rows
from safetensors import safe_open
from torch import Tensor

from bisparse import Pattern, solve
from bisparse.pruning.channels.permute import search_order
from record import RESULTS

TENSORS = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.2.attention.output.dense.weight",
    "encoder.layer.5.attention.self.value.weight",
)
ESCAPES = 100
DIVISIONS = torch.tensor([(0, *rest, *(k for k in range(1, 8) if k not in rest)) for rest in combinations(range(1, 8), 3)])
CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tensors", nargs="+", default=TENSORS)
    parser.add_argument("--escapes", type=int, default=ESCAPES)
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning_permutation.jsonl")
    options = parser.parse_args()
    rows = Rows(options.results)
    search_order(torch.rand(16, 16), Pattern(2, 4))  # compiles
    for name in options.tensors:
        with safe_open(options.model, "pt") as file:
            scores = file.get_tensor(name).float().abs()
        for method in ("ours", "stripe groups"):
            key = {"tensor": name, "shape": list(scores.shape), "method": method, "pattern": "2:4", "escapes": options.escapes}
            with rows.new(key) as row:
                if row is None:
                    continue
                start = time.perf_counter()
                order = search_order(scores, Pattern(2, 4)) if method == "ours" else stripe_groups(scores, options.escapes)
                row["seconds"] = time.perf_counter() - start
                assert torch.equal(order.sort().values, torch.arange(scores.shape[1]))
                total = float(scores.double().sum())
                row["kept_before"], row["kept"] = (solve(part, "2:4").value / total for part in (scores, scores[:, order]))


def stripe_groups(scores: Tensor, escapes: int) -> Tensor:
    """An order of the columns by stripe groups of two, with bounded regressions."""
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(scores.shape[1]).view(-1, 4).clone()
    pairs = torch.triu_indices(len(order), len(order), 1).t()
    gains, choices = divisions(scores, order, pairs)
    best, best_kept = order.clone(), kept(scores, order)
    while True:
        while bool((gains > 1e-3).any()):
            changed = torch.zeros(len(order), dtype=torch.bool)
            for p in gains.argsort(descending=True)[: int((gains > 1e-3).sum())].tolist():
                pair = pairs[p]
                if not changed[pair].any():
                    order[pair] = order[pair].reshape(8)[DIVISIONS[choices[p]]].view(2, 4)
                    changed[pair] = True
            again = changed[pairs].any(1)
            gains[again], choices[again] = divisions(scores, order, pairs[again])
        if (now := kept(scores, order)) > best_kept:
            best, best_kept = order.clone(), now
        if escapes == 0:
            return best.flatten()
        escapes -= 1
        pair, places = torch.randperm(len(order), generator=generator)[:2], torch.randint(4, (2,), generator=generator)
        order[pair, places] = order[pair, places].flip(0)
        again = torch.isin(pairs, pair).any(1)
        gains[again], choices[again] = divisions(scores, order, pairs[again])


def divisions(scores: Tensor, order: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair of stripes what the best division gains, and which it is."""
    gains, choices = [], []
    for part in pairs.split(CHUNK):
        columns = scores.t()[order[part].flatten(1)]  # (P, 8, R)
        high = {(i, j): torch.maximum(columns[:, i], columns[:, j]) for i, j in combinations(range(8), 2)}
        both = {(i, j): columns[:, i] + columns[:, j] for i, j in high}

        def two_of(a: int, b: int, c: int, d: int, high=high, both=both) -> Tensor:  # type: ignore[no-untyped-def]
            return torch.maximum(torch.maximum(both[a, b], both[c, d]), high[a, b] + high[c, d])

        values = torch.stack([(two_of(*way[:4]) + two_of(*way[4:])).sum(1) for way in DIVISIONS.tolist()], 1)
        most, choice = values.max(1)
        gains.append(most - values[:, 0])
        choices.append(choice)
    return torch.cat(gains), torch.cat(choices)


def kept(scores: Tensor, order: Tensor) -> float:
    return float(scores[:, order].topk(2, dim=-1).values.double().sum())


if __name__ == "__main__":
    main()
