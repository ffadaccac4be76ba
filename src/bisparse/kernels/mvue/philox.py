"""Philox4x32-10, a counter-based random number generator: any number of a stream can be computed alone, equally on all devices.

A key of two and a counter of four 32-bit numbers give four 32-bit numbers. So a kernel computes random numbers where it needs
them, instead of reading them from memory, and every device draws the same. The key is a seed tensor: a recorded CUDA graph draws
other numbers when the seed changes. This is the specification in plain torch; Triton has the generator as `tl.philox`.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3; known answers in their
library Random123.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

__all__ = ["draw_seed", "philox", "uniforms"]

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF
Counter = tuple[Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]]


def philox(counter: Counter, key: tuple[Int[Tensor, "..."], Int[Tensor, "..."]]) -> Counter:
    """Four random numbers per counter; all are int64 tensors of numbers in [0, 2**32) that broadcast.

    >>> zero = torch.tensor(0)
    >>> [hex(int(number)) for number in philox((zero, zero, zero, zero), (zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        # A product may overflow int64; its low 64 bits are right all the same.
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = (second >> 32 & LOW) ^ c1 ^ k0, second & LOW
        c2, c3 = (first >> 32 & LOW) ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + WEYL[0] & LOW, k1 + WEYL[1] & LOW
    return c0, c1, c2, c3


def uniforms(seed: Int64[Tensor, "1"], groups: int, outputs: int, dtype: torch.dtype) -> Float[Tensor, "G O"]:
    """A multiple of 2**-24 in [0, 1) for each group and output: number g mod 4 of those of counter (o, g div 4, 0, 0)."""
    output = torch.arange(outputs, device=seed.device)
    four_groups = torch.arange(-(-groups // 4), device=seed.device)[:, None]
    zero = torch.zeros_like(output)
    numbers = torch.stack(philox((output, four_groups, zero, zero), (seed & LOW, seed >> 32 & LOW)), dim=1)
    return (numbers.flatten(0, 1)[:groups] >> 8).to(dtype) * 2.0**-24


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Int64[Tensor, "1"]:
    """A seed from torch's generator, on a device, without synchronisation."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)
