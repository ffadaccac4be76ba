"""Packed products on this processor against torch's Linear, a dense loop of the same style, and one pass over the packed bytes.

    python benchmarks/cpu.py [--quick] [--patterns PATTERN ...] [--seconds S]

Every packed product is verified against float64 before anything is timed. Contenders take turns in one run, in random order;
figures are medians, and the fastest turn next to them, since a machine that others use delays long calls more often than short.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from bisparse import solve
from bisparse.accelerate.backends.cpu import int8_reason
from bisparse.kernels.numba_runtime.thread_pool import Kernel, array_at, kernel, over_bands
from bisparse.kernels.packed_cpu.direct import Product
from bisparse.kernels.packed_cpu.instructions import NUMBERS, Way, multiply_block, usable_ways
from bisparse.kernels.packed_cpu.int8 import pack_int8
from bisparse.kernels.packed_cpu.layout import BitmaskPacked, linear_bitmask, pack_bitmask
from record import RESULTS, Record

SHAPES = ((4096, 4096), (4096, 14336), (2048, 8192), (576, 576), (1536, 576), (576, 1536), (49152, 576))
PATTERNS = ("4:8-T", "2:4-T", "8:16-T", "16:32-T", "50%")
TOKENS = (1, 4, 16, 512)
MAX_PACKED_TOKENS = 16
SECONDS = 4.0
"""Of turns per row, after one to warm up; at least 5 and at most 200."""


def pruned(rows: int, columns: int, pattern: str) -> Tensor:
    """A Gaussian bfloat16 weight under the best mask of a pattern; tiled from a band of 512 rows, to save time."""
    band = torch.randn(min(rows, 512), columns, generator=torch.Generator().manual_seed(0))
    band = band * solve(band.abs(), pattern).mask
    return band.repeat(-(-rows // band.shape[0]), 1)[:rows].bfloat16()


def verify(packed: BitmaskPacked, weight: Tensor) -> None:
    """Stop unless products with 1, 4 and 16 tokens, packed and by bands, are those of the dense weight."""
    for tokens in (1, 4, 16):
        x = torch.randn(tokens, weight.shape[1]).bfloat16()
        exact = linear(x.double(), weight.double())
        for most in (0, MAX_PACKED_TOKENS):
            found = linear_bitmask(x, packed, None, weight.shape[0], most).double()
            error = float((found - exact).norm() / exact.norm())
            if not error < 2**-8:
                raise SystemExit(f"{tuple(weight.shape)}, {tokens} tokens: relative error {error:.2e}; nothing is timed")


@cache
def dense_kernel(way: int) -> Kernel:
    """The inner loop of the packed product, on a matrix that is expanded already."""
    kind = NUMBERS[torch.bfloat16]
    group_bytes = 256 if way == Way.AVX512_BF16 else 512

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        matrix, x, out, groups, tokens, x_stride, out_stride = array_at(arguments, (7,), np.int64)
        for block in range(first, last):
            rows, to, token = matrix + group_bytes * groups * block, out + 8 * block, x
            for _ in range(tokens // 4):
                multiply_block(way, kind, 4, 0, rows, 0, groups, token, x_stride, 0, 0, to, out_stride)
                token, to = token + 4 * x_stride, to + 4 * out_stride
            for _ in range(tokens % 4):
                multiply_block(way, kind, 1, 0, rows, 0, groups, token, x_stride, 0, 0, to, out_stride)
                token, to = token + x_stride, to + out_stride
        return 1

    return kernel(entry)


@cache
def read_kernel() -> Kernel:
    """A sum over int64 numbers, 512 at a time. Arguments: numbers, room for a sum per band."""

    def entry(arguments, first, last):  # type: ignore[no-untyped-def]
        numbers, sums = array_at(arguments, (2,), np.int64)
        total = np.int64(0)
        for number in array_at(numbers, (512 * last,), np.int64)[512 * first :]:
            total += number
        array_at(sums, (last,), np.int64)[first] = total
        return 1

    return kernel(entry)


def contenders(weight: Tensor, packed: BitmaskPacked, tokens: int) -> dict[str, Callable[[], Any]]:
    """What takes turns: name -> call."""
    rows, columns = weight.shape
    way = usable_ways(torch.bfloat16)[0]
    x = torch.randn(tokens, columns).bfloat16()
    wide, wide_x = weight.float(), x.float()
    product = Product(packed, rows, columns, MAX_PACKED_TOKENS)  # as accelerated layers call it
    found: dict[str, Callable[[], Any]] = {
        "packed": lambda: product(x, None),
        "torch_bf16": lambda: linear(x, weight),
        "torch_f32": lambda: linear(wide_x, wide),
    }
    if int8_reason(torch.bfloat16) is None:
        rounded = Product(pack_int8(weight), rows, columns, MAX_PACKED_TOKENS)
        found["int8"] = lambda: rounded(x, None)
    if tokens <= MAX_PACKED_TOKENS:
        groups = columns // 32
        blocked = weight.view(rows // 4, 4, groups, 32).transpose(1, 2).contiguous()
        operand, own = (blocked, x) if way == Way.AVX512_BF16 else (blocked.float(), x.float())
        out = torch.empty(tokens, rows, dtype=torch.bfloat16)
        arguments = operand, own, out, groups, tokens, own.element_size() * columns, 2 * rows
        found["dense_loop"] = lambda: over_bands(dense_kernel(int(way)), arguments, rows // 4, 1, max(1, 16384 // columns))
    if tokens == 1:
        bytes_ = torch.cat([one.contiguous().view(-1).view(torch.uint8) for one in packed])
        count = bytes_.numel() // 4096
        sums = np.empty(max(1, count), np.int64)
        found["one_pass"] = lambda: over_bands(read_kernel(), (bytes_, sums), count, 1, 32)
    return found


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median and fastest milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start = time.perf_counter()
    for call in calls.values():
        call()
    turns = int(min(200, max(5, seconds / (time.perf_counter() - start))))
    for _ in range(turns):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {f"{name}_ms": round(statistics.median(own), 5) for name, own in times.items()}
    return medians | {f"{name}_min_ms": round(min(own), 5) for name, own in times.items()} | {"turns": turns}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4:8-T only, and not the largest two shapes; nothing is recorded")
    parser.add_argument("--patterns", nargs="*", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of turns per row")
    chosen = parser.parse_args()
    quick = chosen.quick
    if not usable_ways(torch.bfloat16):
        raise SystemExit(
            "this processor has neither AVX-512 nor AVX2: packed products run by the specification, no faster than dense"
        )
    random.seed(0)
    record = Record(RESULTS / "cpu.jsonl")
    cores = torch.get_num_threads()
    for rows, columns in SHAPES:
        for pattern in PATTERNS[:1] if quick else chosen.patterns:
            if quick and rows * columns > 1 << 24:
                continue
            weight = pruned(rows, columns, pattern)
            packed = pack_bitmask(weight)
            verify(packed, weight)
            for tokens in TOKENS if pattern == "4:8-T" else (1,):
                for threads in sorted({1, cores}):
                    key = {"rows": rows, "columns": columns, "pattern": pattern, "tokens": tokens, "threads": threads}
                    if not quick and record.find(key):
                        continue
                    torch.set_num_threads(threads)
                    figures: dict[str, Any] = measure(contenders(weight, packed, tokens), 0.5 if quick else chosen.seconds)
                    figures["bytes"] = sum(one.nbytes for one in packed)
                    figures["bytes_dense"] = weight.nbytes
                    figures["load"] = round(os.getloadavg()[0], 2)
                    torch.set_num_threads(cores)
                    if not quick:
                        record.add(key, figures)
                    best = min(figures["torch_bf16_ms"], figures["torch_f32_ms"])
                    print(
                        key,
                        f"packed {figures['packed_ms']:.3f} ms, torch's best {best:.3f} ms: {best / figures['packed_ms']:.2f}x",
                    )


if __name__ == "__main__":
    main()
