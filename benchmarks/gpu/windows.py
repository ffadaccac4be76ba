"""Does 4:8 gain on 2:4 tensor cores? Three overlapping windows of four hold any 4 of 8, at 1.5 times the reduction length.

    python benchmarks/gpu/windows.py [--size 4096] [--tokens 16384] [--rehearse]

The product is first shown to be the same, in whole numbers, for every one of the 70 groups. Then, on a GPU: the dense product,
the 2:4 product of the same shape, the expanded product, and the expansion of the inputs. Rows go to
benchmarks/results/gpu_windows.jsonl. See docs/decisions/0007-4-of-8-on-2-of-4-hardware.md.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch
from environment import clocked, need_gpu, record_on, take_turns
from torch import Tensor

from bisparse import verify
from bisparse.accelerate import usable_backends
from bisparse.accelerate.backends import BACKENDS
from record import RESULTS

WINDOWS = (0, 2, 4)
"""Where in a group of eight the windows of four begin."""


def expanded_inputs(inputs: Tensor) -> Tensor:
    """Inputs (T, K) for an expanded weight: (T, 1.5 K), the middle four of every eight twice."""
    groups = inputs.unflatten(-1, (-1, 8))
    return torch.cat([groups[..., start : start + 4] for start in WINDOWS], -1).flatten(-2)


def expanded_weight(weight: Tensor) -> Tensor:
    """A 4:8 weight (O, K) as a 2:4 weight (O, 1.5 K): of each half of a group, two stay in its window, the others go between.

    At most two do: a half that keeps three or four leaves one or none to the other half; and what is left over lies among the
    middle four, for the first two of the lower half and the last two of the upper have gone.
    """
    groups = weight.unflatten(-1, (-1, 8))
    kept = groups != 0
    first = kept[..., :4] & (kept[..., :4].cumsum(-1) <= 2)
    last = kept[..., 4:] & (kept[..., 4:].flip(-1).cumsum(-1).flip(-1) <= 2)
    outer = torch.cat([first, last], -1)
    between = (kept & ~outer)[..., 2:6]
    zero = torch.zeros_like(groups[..., :4])
    parts = [
        torch.where(first, groups[..., :4], zero),
        torch.where(between, groups[..., 2:6], zero),
        torch.where(last, groups[..., 4:], zero),
    ]
    return torch.cat(parts, -1).flatten(-2)


def every_group() -> Tensor:
    """The 70 groups that keep four of eight, as rows of whole numbers."""
    weight = torch.zeros(70, 8, dtype=torch.float64)
    for row, kept in enumerate(combinations(range(8), 4)):
        weight[row, list(kept)] = torch.arange(1.0, 5.0, dtype=torch.float64)
    return weight


def prove() -> None:
    """The expansion is 2:4 and exact for every group, and for groups that keep fewer."""
    weight = torch.cat([every_group() * keep for keep in torch.tensor([[1] * 8, [1, 0] * 4, [0] * 4 + [1] * 4])])
    expanded = expanded_weight(weight)
    verify(expanded, "2:4").check()
    inputs = torch.randint(-99, 100, (16, 8)).double()
    assert torch.equal(expanded_inputs(inputs) @ expanded.t(), inputs @ weight.t())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_windows.jsonl")
    parser.add_argument("--fresh", action="store_true", help="start over, losing the rows there are")
    parser.add_argument("--rehearse", action="store_true", help="only show, on the CPU, that the product is the same")
    options = parser.parse_args()
    prove()
    if options.rehearse:
        print("the expanded product is the same for all 70 groups")
        return
    device = need_gpu("windows.py")
    if (reason := usable_backends(device)["cusparselt"]) is not None:
        # Not an error: the programs after this one in `make bench-gpu` run without it.
        print(f"benchmarks/gpu/windows.py is left out: {reason}")
        return
    record = record_on(device, options.results, options.fresh)
    size, tokens = options.size, options.tokens
    weight = torch.zeros(size, size, dtype=torch.bfloat16, device=device)
    best = torch.rand(size, size // 8, 8, device=device).topk(4).indices
    weight.view(size, -1, 8).scatter_(-1, best, torch.randn(best.shape, device=device).bfloat16())
    half = weight.view(size, -1, 4).clone()
    half[..., 2:] = 0
    inputs = torch.randn(tokens, size, device=device).bfloat16()
    library = BACKENDS["cusparselt"]
    wide, sparse = library.pack(expanded_weight(weight)), library.pack(half.view(size, size))

    def product(packed: tuple[Tensor, Tensor], dense: Tensor) -> Tensor:
        """By the fastest algorithm that the library has for the shape."""
        return library.multiply(*packed, dense.t(), size, transposed=True, search=True)

    ready = expanded_inputs(inputs)
    expected = inputs.float() @ weight.float().t()
    found = product(wide, ready).float()
    assert float((found - expected).norm() / expected.norm()) < 1e-2, "the expanded product is wrong on this device"
    products = {
        "dense": lambda: torch.nn.functional.linear(inputs, weight),
        "2:4, same shape": lambda: product(sparse, inputs),
        "4:8 expanded, inputs ready": lambda: product(wide, ready),
        "4:8 expanded, inputs expanded each time": lambda: product(wide, expanded_inputs(inputs)),
    }
    programs = {name: lambda call=call: clocked(call, device=device) for name, call in products.items()}
    for name, (medians, spreads) in take_turns(programs, 50).items():
        key = {"benchmark": "4:8 on 2:4", "contender": name, "size": size, "tokens": tokens, "dtype": "bfloat16"}
        record.add(key, {"time_ms": medians[0], "spread": spreads[0]})
        print(f"{name:42s} {medians[0]:8.4f} ms", flush=True)


if __name__ == "__main__":
    main()
