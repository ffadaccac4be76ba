"""One expert of a mixture, pruned on the tokens routed to it or on all tokens: which has the smaller error on routed tokens?

    python benchmarks/pruning/expert_tokens.py

Synthetic: tokens come from 12 clusters, each with its own mean and covariance, whose spectrum falls by a factor of 150; a random
linear router sends each to 2 experts; the expert is a random square matrix at 2:4. The error is that of the expert's output on
20,000 fresh tokens, those routed to it only. No trained mixture is measured. Rows: benchmarks/results/pruning_experts.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from experiment import Rows
from torch import Tensor, nn

from bisparse.pruning import prune_
from record import results_file

CLUSTERS = 12


def tokens(number: int, clusters: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (number, K) of clusters (C, K + 1, K): a square root of each covariance, then the mean."""
    width = clusters.shape[2]
    chosen = torch.randint(len(clusters), (number,), generator=generator)
    found = torch.randn(number, width, generator=generator)
    for cluster, own in enumerate(clusters):
        found[chosen == cluster] = found[chosen == cluster] @ own[:width] + own[width]
    return found


def error(weight: Tensor, method: str, seen: Tensor, judged: Tensor) -> float:
    layer = nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(requires_grad=False)
    layer.weight.copy_(weight)
    prune_(nn.Sequential(layer), "2:4", method, list(seen.split(max(1, len(seen) // 10)))[:10])
    target = judged @ weight.t()
    return float(((layer(judged) - target).square().sum() / target.square().sum()).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rows = Rows(results_file(options.results, "pruning_experts.jsonl", quick=options.quick))
    for width in (64,) if options.quick else (64, 256):
        for experts in (8, 16):
            for draw in range(1 if options.quick else options.draws):
                generator = torch.Generator().manual_seed(draw)
                clusters = torch.randn(CLUSTERS, width + 1, width, generator=generator) / width**0.5
                clusters[:, :width] *= 2 * torch.linspace(0, -5, width).exp().sqrt()[:, None]
                router = torch.randn(experts, width, generator=generator)
                weight = torch.randn(width, width, generator=generator) / width**0.5

                def routed(x: Tensor, router: Tensor = router) -> Tensor:
                    return x[(x @ router.t()).topk(2, 1).indices.eq(0).any(1)]

                judged = routed(tokens(20_000, clusters, generator))
                stream = tokens(4 * width * experts * 3, clusters, generator)
                for ratio in (0.5, 1.0, 2.0, 4.0):
                    share = int(ratio * width * len(stream) / max(1, len(routed(stream))))
                    everything = stream[:share]
                    own = routed(everything)
                    for method in ("sparsegpt", "adaprune"):
                        key = {"inputs": width, "experts": experts, "draw": draw, "routed_per_input": ratio, "method": method}
                        with rows.new(key) as row:
                            if row is not None:
                                row["routed"], row["all"] = len(own), len(everything)
                                row["error_routed"] = error(weight, method, own, judged)
                                row["error_all"] = error(weight, method, everything, judged)


if __name__ == "__main__":
    main()
